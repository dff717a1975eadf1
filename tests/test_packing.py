"""Packing by hand arithmetic, and bounds that hold for any batch."""

import numpy as np
import pytest

from tlt_jax import packing
from tlt_jax.types import INVALID


def test_token_weights_by_hand():
    np.testing.assert_allclose(packing.token_weights([2, 6], "token"), [1 / 8, 1 / 8])
    np.testing.assert_allclose(packing.token_weights([2, 6], "sequence"), [1 / 4, 1 / 12])


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_weights_of_a_batch_sum_to_one(aggregation):
    lengths = [3, 1, 17, 9]
    weights = packing.token_weights(lengths, aggregation)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(np.dot(weights, lengths), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([4, 6, 3, 5], [[1, 0], [3, 2]]),
        ([10, 10], [[0], [1]]),
        ([2, 2, 2, 2, 2, 2], [[0, 1, 2, 3, 4], [5]]),
        ([7, 6, 4, 3], [[0, 3], [1, 2]]),
        ([], []),
    ],
)
def test_first_fit_by_hand(lengths, rows):
    """Rows of ten."""
    assert packing.first_fit(lengths, 10) == rows


def _batch(lengths, prompts, *, row_length=8, rows=2, aggregation="token"):
    tokens = [100 * i + np.arange(n, dtype=np.int32) for i, n in enumerate(lengths)]
    behaviour = [-(i + 1) - np.arange(n, dtype=np.float32) / 10 for i, n in enumerate(lengths)]
    return packing.pack(
        tokens,
        prompts,
        behaviour,
        [10.0 * i for i in range(len(lengths))],
        aggregation=aggregation,
        row_length=row_length,
        rows=rows,
    )


def test_a_batch_by_hand():
    """Sequences of 3, 5 and 6 tokens in rows of eight: (2), (1, 0) in one microbatch."""
    batch = _batch([3, 5, 6], [1, 2, 4])
    assert batch.tokens.shape == (1, 2, 8)
    assert batch.tokens[0].tolist() == [
        [200, 201, 202, 203, 204, 205, 0, 0],
        [100, 101, 102, 103, 104, 0, 1, 2],
    ]
    assert batch.positions[0].tolist() == [[0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 2, 3, 4, 0, 1, 2]]
    assert batch.segment_ids[0].tolist() == [
        [2, 2, 2, 2, 2, 2, INVALID, INVALID],
        [1, 1, 1, 1, 1, 0, 0, 0],
    ]
    share = 1 / 7  # two, three and two response tokens
    np.testing.assert_allclose(
        batch.weights[0],
        [
            [0, 0, 0, 0, share, share, 0, 0],
            [0, 0, share, share, share, 0, share, share],
        ],
        rtol=1e-6,
    )
    np.testing.assert_allclose(batch.advantages[0, 1], [10, 10, 10, 10, 10, 0, 0, 0])
    np.testing.assert_allclose(batch.behaviour[0, 1, 5:], [-1.0, -1.1, -1.2])


def test_the_last_microbatch_may_have_empty_rows():
    batch = _batch([8, 8, 8], [1, 1, 1])
    assert batch.tokens.shape == (2, 2, 8)
    assert np.all(batch.segment_ids[1, 1] == INVALID) and not batch.weights[1, 1].any()


def test_padding_adds_microbatches_without_weight():
    batch = _batch([3, 5, 6], [1, 2, 4])
    padded = packing.pad_microbatches(batch, 4)
    for whole, own in zip(padded, batch, strict=True):
        assert whole.shape == (4, *own.shape[1:]) and whole.dtype == own.dtype
        np.testing.assert_array_equal(whole[:1], own)
    assert not padded.weights[1:].any()
    empty = packing.empty_batch(4, 2, 8)
    assert [x.shape for x in empty] == [x.shape for x in padded]
    assert [x.dtype for x in empty] == [x.dtype for x in padded]


@pytest.mark.parametrize("seed", range(40))
def test_no_batch_has_more_microbatches_than_foreseen(seed):
    """And every sequence is in exactly one row, whole, in a row that holds it."""
    rng = np.random.default_rng(seed)
    longest, sequences = int(rng.integers(2, 40)), int(rng.integers(1, 40))
    row_length, rows = longest + int(rng.integers(0, 3 * longest)), int(rng.integers(1, 4))
    # Just over a half or a third of a row is what first fit packs worst.
    worst = [x for x in (row_length // 2 + 1, row_length // 3 + 1, longest) if x <= longest]
    lengths = [int(rng.choice([*worst, rng.integers(2, longest + 1)])) for _ in range(sequences)]
    plan = packing.first_fit(lengths, row_length)
    assert sorted(index for row in plan for index in row) == list(range(sequences))
    assert all(sum(lengths[index] for index in row) <= row_length for row in plan)
    batch = _batch(lengths, [1] * sequences, row_length=row_length, rows=rows)
    most = packing.most_microbatches(sequences, longest, row_length, rows)
    assert len(batch.tokens) <= most
    np.testing.assert_allclose(batch.weights.sum(), 1.0, rtol=1e-4)


def test_most_microbatches_by_hand():
    """Rows of 10, sequences of up to 5: two a row. Of up to 4: by tokens no more than 2.5 a row."""
    assert packing.most_microbatches(8, 5, 10, 2) == 2
    assert packing.most_microbatches(8, 10, 10, 2) == 4
    assert packing.most_microbatches(7, 5, 10, 3) == 2
