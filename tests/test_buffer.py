"""The drafter's data buffer: by hand, then against a ring in plain Python."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import buffer as buffer_lib
from tlt_jax.config import DrafterConfig, PolicyConfig
from tlt_jax.types import INVALID

ROWS, ROW_LENGTH, WIDTH, LONGEST = 3, 8, 2, 10

_insert_each = jax.jit(buffer_lib.insert_each)
_sample = jax.jit(buffer_lib.sample, static_argnames=("rows", "tokens"))


def test_a_budget_gives_rows():
    """A row of 512 tokens of 64 float32 features and 3 numbers takes 512 * (256 + 12) bytes."""
    narrow = PolicyConfig(width=64)
    config = DrafterConfig(row_length=512, buffer_megabytes=2.2)
    assert config.row_megabytes(narrow) == pytest.approx(0.137216)
    assert config.buffer_rows(narrow) == 16  # 2.195 of 2.2
    assert config.buffer_rows(PolicyConfig(width=64, feature_layers=(2, 8))) == 5  # 780 bytes each
    assert config.buffer_rows(PolicyConfig(width=64, dtype="bfloat16")) == 30  # 140 bytes each
    bare = dataclasses.replace(config, store_features=False)
    assert bare.buffer_rows(narrow) == 358  # 12 bytes each
    made = buffer_lib.empty(config, PolicyConfig(width=64, feature_layers=(2, 8)))
    assert made.features.shape == (5, 512, 192) and made.tokens.shape == (5, 512)


def _empty():
    room = ROWS * ROW_LENGTH * (4 * WIDTH + 12) * 1e-6
    config = DrafterConfig(row_length=ROW_LENGTH, buffer_megabytes=1.1 * room)
    return buffer_lib.empty(config, PolicyConfig(width=WIDTH))


def _sequences(first, count):
    """Tokens 100 n + position of the n-th sequence, and features that name the same two."""
    number = np.arange(first, first + count)[:, None]
    position = np.broadcast_to(np.arange(LONGEST), (count, LONGEST))
    tokens = 100 * number + position
    features = np.stack([np.broadcast_to(number, tokens.shape), position], axis=-1)
    return tokens.astype(np.int32), features.astype(np.float32)


def _insert(buffer, *lengths, first=0):
    """Inserts sequences numbered from `first` on, with these lengths; those of length 0 not."""
    given = jnp.array(lengths, jnp.int32)
    return _insert_each(buffer, *_sequences(first, len(lengths)), given, given > 0)


def _check_alignment(packed):
    """Wherever a segment is, token, feature and position tell of the same place."""
    here = np.asarray(packed.segment_ids) != INVALID
    tokens, positions = np.asarray(packed.tokens)[here], np.asarray(packed.positions)[here]
    features = np.asarray(packed.features)[here]
    np.testing.assert_array_equal(tokens % 100, positions)
    np.testing.assert_array_equal(features[:, 0], tokens // 100)
    np.testing.assert_array_equal(features[:, 1], positions)


def test_an_empty_buffer_holds_nothing():
    buffer = _empty()
    assert np.all(np.asarray(buffer.segment_ids) == INVALID)
    assert [int(x) for x in (buffer.row, buffer.used, buffer.segments, buffer.filled)] == [0] * 4
    assert buffer.features.shape == (ROWS, ROW_LENGTH, WIDTH)


def test_rows_are_filled_in_order_by_hand():
    buffer = _insert(_empty(), 3, 5, 2)  # 3 + 5 fill row 0 to its end, 2 begins row 1
    np.testing.assert_array_equal(buffer.tokens[0], [0, 1, 2, 100, 101, 102, 103, 104])
    np.testing.assert_array_equal(buffer.segment_ids[0], [0, 0, 0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(buffer.positions[0], [0, 1, 2, 0, 1, 2, 3, 4])
    np.testing.assert_array_equal(buffer.tokens[1, :2], [200, 201])
    np.testing.assert_array_equal(buffer.segment_ids[1], [2, 2] + [INVALID] * 6)
    np.testing.assert_array_equal(buffer.segment_ids[2], [INVALID] * 8)
    state = (buffer.row, buffer.used, buffer.segments, buffer.filled)
    assert [int(x) for x in state] == [1, 2, 3, 2]
    _check_alignment(buffer)


def test_the_ring_wraps_to_the_oldest_row_and_clears_it():
    buffer = _insert(_empty(), 3, 5, 7, 6, 2, 4)  # rows 3 + 5, 7, 6 + 2, and 4 on row 0 again
    np.testing.assert_array_equal(buffer.tokens[0, :4], [500, 501, 502, 503])
    np.testing.assert_array_equal(buffer.segment_ids[0], [5] * 4 + [INVALID] * 4)
    np.testing.assert_array_equal(buffer.segment_ids[1], [2] * 7 + [INVALID])
    np.testing.assert_array_equal(buffer.segment_ids[2], [3] * 6 + [4] * 2)
    state = (buffer.row, buffer.used, buffer.segments, buffer.filled)
    assert [int(x) for x in state] == [0, 4, 6, 3]
    _check_alignment(buffer)


def test_only_the_wanted_sequences_are_stored():
    base = _insert(_empty(), 3, 4)
    given = (*_sequences(0, 2), jnp.array([3, 4], jnp.int32))
    with_gaps = _insert_each(_empty(), *given, jnp.array([True, False]))
    with_gaps = _insert_each(with_gaps, *given, jnp.array([False, True]))
    jax.tree.map(np.testing.assert_array_equal, with_gaps, base)
    nothing = _insert_each(base, *given, jnp.array([False, False]))
    jax.tree.map(np.testing.assert_array_equal, nothing, base)


def test_length_zero_stores_nothing():
    base = _insert(_empty(), 3, 4)
    one = jax.jit(buffer_lib.insert)(base, *(x[0] for x in _sequences(9, 1)), jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, one, base)


def test_only_filled_rows_are_drawn_and_all_of_them():
    buffer, keys = _insert(_empty(), 8, 5), jax.random.split(jax.random.key(0), 20)
    drawn = jax.vmap(lambda key: _sample(buffer, key, rows=2, tokens=ROW_LENGTH))(keys)
    assert drawn.tokens.shape == (20, 2, ROW_LENGTH)
    assert np.all(np.asarray(drawn.segment_ids)[..., 0] != INVALID)
    assert set(np.asarray(drawn.segment_ids)[..., 0].ravel().tolist()) == {0, 1}
    _check_alignment(drawn)


def test_the_newest_tokens_are_those_at_the_rows_ends():
    """Rows 0 .. 2 hold 7, 6 and 3 tokens, row 2 is being filled: its last 4 begin at 0."""
    buffer = _insert(_empty(), 7, 6, 3)
    found = buffer_lib.newest(buffer, rows=3, tokens=4)
    np.testing.assert_array_equal(found.tokens, buffer.tokens[jnp.array([2, 1, 0])])
    np.testing.assert_array_equal(found.starts, [0, 2, 3])
    assert buffer_lib.newest(_empty(), rows=1, tokens=4).starts.tolist() == [0]


def test_a_microbatch_depends_on_its_key():
    buffer = _insert(_empty(), 8, 8, 8)
    drawn = [
        np.asarray(_sample(buffer, jax.random.key(n), rows=6, tokens=4).tokens) for n in (0, 1, 0)
    ]
    assert not np.array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_sequences_are_drawn_from_their_beginning_to_their_end():
    buffer = _insert(_empty(), 3, 3, 2, 7, 2)  # rows 3 + 3 + 2, 7, and 2
    drawn = _sample(buffer, jax.random.key(0), rows=50, tokens=2)
    held = zip(np.asarray(drawn.segment_ids), np.asarray(drawn.positions), strict=True)
    lengths = (3, 3, 2, 7, 2)
    for segments, positions in held:
        for segment in set(segments.tolist()) - {INVALID}:
            assert positions[segments == segment].tolist() == list(range(lengths[segment]))


def test_parts_that_hold_anything_are_drawn_alike():
    """Of rows with 8, 5 and 4 tokens: pieces of two, the last one of 5 half empty."""
    buffer = _insert(_empty(), 8, 5, 4)
    drawn = _sample(buffer, jax.random.key(0), rows=3000, tokens=2)
    row = np.asarray(drawn.segment_ids)[:, 0]
    for index, parts in enumerate(([0, 2, 4, 6], [0, 2, 4], [0, 2])):
        found, counts = np.unique(np.asarray(drawn.starts)[row == index], return_counts=True)
        assert found.tolist() == parts
        assert np.all(np.abs(counts / 1000 - 1 / len(parts)) < 0.1)


class _PlainRing:
    """The same buffer as lists of (token, segment, position)."""

    def __init__(self):
        self.rows = [[] for _ in range(ROWS)]
        self.row = self.segments = 0
        self.filled = 0

    def insert(self, tokens):
        if not tokens:
            return
        if len(self.rows[self.row]) + len(tokens) > ROW_LENGTH:
            self.row = (self.row + 1) % ROWS
            self.rows[self.row] = []
        self.rows[self.row] += [(token, self.segments, at) for at, token in enumerate(tokens)]
        self.segments += 1
        self.filled = max(self.filled, self.row + 1)


@pytest.mark.parametrize("seed", range(6))
def test_random_lengths_give_the_plain_ring(seed):
    rng = np.random.default_rng(seed)
    buffer, ring = _empty(), _PlainRing()
    for first in range(0, 24, 6):
        lengths = rng.integers(0, ROW_LENGTH + 1, 6) * rng.integers(0, 2, 6)
        tokens, _ = _sequences(first, 6)
        for row, length in zip(tokens, lengths, strict=True):
            ring.insert(row[:length].tolist())
        buffer = _insert(buffer, *lengths.tolist(), first=first)
        for index, expected in enumerate(ring.rows):
            count = len(expected)
            found = (buffer.tokens[index], buffer.segment_ids[index], buffer.positions[index])
            assert list(zip(*(x[:count].tolist() for x in found), strict=True)) == expected
            assert np.all(np.asarray(buffer.segment_ids)[index, count:] == INVALID)
        assert (int(buffer.row), int(buffer.used)) == (ring.row, len(ring.rows[ring.row]))
        assert (int(buffer.segments), int(buffer.filled)) == (ring.segments, ring.filled)
        _check_alignment(buffer)
