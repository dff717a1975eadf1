"""The drafter: its pairs by hand, a naive layer, and training rows against cached decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import naive_decoder
import numpy as np
import pytest

from tlt_jax import drafter
from tlt_jax.config import DrafterConfig
from tlt_jax.types import INVALID

DRAFTER = DrafterConfig(ffn_width=20)
T, D = 8, 16
SEGMENTS = np.array([[0, 0, 0, 0, 7, 7, 7, 7], [5, 5, 5, 5, 5, 5, -1, -1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 0, 0]], np.int32)

_decode = jax.jit(drafter.decode, static_argnames="config")
_packed_steps = jax.jit(drafter.packed_steps, static_argnames=("config", "count", "steps"))


def _steps(*arguments, steps):
    """Estimates of whole rows at every depth, and where they exist."""
    return _packed_steps(*arguments, jnp.zeros(2, jnp.int32), count=T, steps=steps)


def _packed(*arguments):
    """Estimates at depth 1, [B, T, D]."""
    ((estimates, _),) = _steps(*arguments, steps=1)
    return estimates


@pytest.fixture(scope="module")
def params(tiny_config, random_params):
    return random_params(drafter.param_specs(tiny_config, DRAFTER), 0)


@pytest.fixture(scope="module")
def pairs():
    """Features h[t] and embeddings of x[t + 1], both [2, T, D]."""
    drawn = np.random.default_rng(0).standard_normal((2, 2, T, D))
    return tuple(jnp.asarray(x, jnp.float32) for x in drawn)


def test_training_pairs_by_hand():
    # Segments 4 4 4 7 7 -1: pair t is fed h[t] and x[t + 1], and is held against h[t + 1].
    tokens = jnp.array([[10, 11, 12, 20, 21, 99]])
    segments = jnp.array([[4, 4, 4, 7, 7, INVALID]])
    features = jnp.arange(6.0).reshape(1, 6, 1) + 0.5
    pairs = drafter.training_pairs(tokens, features, segments)
    np.testing.assert_array_equal(pairs.weights, [[1, 1, 0, 1, 0, 0]])
    used = np.asarray(pairs.weights, bool)
    np.testing.assert_array_equal(pairs.features[used, 0], [0.5, 1.5, 3.5])
    np.testing.assert_array_equal(pairs.next_tokens[used], [11, 12, 21])
    np.testing.assert_array_equal(pairs.target_features[used, 0], [1.5, 2.5, 4.5])
    assert pairs.weights.dtype == jnp.float32
    assert pairs.next_tokens.shape == (1, 6) and pairs.target_features.shape == (1, 6, 1)


@pytest.mark.parametrize("segments", [[3, 3, 3], [INVALID] * 3, [1, 2, 3]])
def test_the_last_pair_of_a_row_and_padding_have_no_target(segments):
    found = drafter.training_pairs(
        jnp.array([[1, 2, 3]]), jnp.ones((1, 3, 2)), jnp.array([segments])
    )
    expected = [1, 1, 0] if segments == [3, 3, 3] else [0, 0, 0]
    np.testing.assert_array_equal(found.weights, [expected])


def test_packed_forward_is_the_naive_layer_on_every_segment(params, tiny_config, pairs):
    found = _packed(params, tiny_config, *pairs, POSITIONS, SEGMENTS)
    weights = naive_decoder.unpack(params["layer"], tiny_config)
    eps = tiny_config.norm_eps
    fuse = np.asarray(params["fuse"], np.float64)
    for row, segment in ((0, 0), (0, 7), (1, 5)):
        here = SEGMENTS[row] == segment
        features, embedded = (x[row, here] for x in pairs)
        both = np.concatenate(
            [
                naive_decoder.rms_norm(features, params["feature_norm"], eps),
                naive_decoder.rms_norm(embedded, params["token_norm"], eps),
            ],
            axis=-1,
        )
        stream = naive_decoder.layer(weights, tiny_config, both @ np.concatenate(fuse))
        expected = naive_decoder.rms_norm(stream, params["norm"], eps)
        np.testing.assert_allclose(found[row, here], expected, atol=2e-5)


def test_several_hidden_states_are_normed_one_by_one_and_read_as_one(tiny_config, random_params):
    config = dataclasses.replace(tiny_config, feature_layers=(0, 1))
    params = random_params(drafter.param_specs(config, DRAFTER), 0)
    drawn = np.random.default_rng(1).standard_normal((2, T, 3, D)).astype(np.float32)
    drawn *= np.array([[1.0], [30.0], [0.1]], np.float32)  # residual streams grow with depth
    expected = sum(
        naive_decoder.rms_norm(drawn[:, :, part], params["read_norm"][part], config.norm_eps)
        @ np.asarray(params["read"][part], np.float64)
        for part in range(3)
    )
    features = jnp.asarray(drawn.reshape(2, T, 3 * D))
    read = drafter.read(params, config, features)
    np.testing.assert_allclose(read, expected, rtol=1e-4, atol=1e-4)

    embedded = jnp.asarray(np.random.default_rng(2).standard_normal((2, T, D)), jnp.float32)
    steps = _steps(params, config, features, embedded, POSITIONS, SEGMENTS, steps=2)
    known = _steps(params, tiny_config, read, embedded, POSITIONS, SEGMENTS, steps=2)
    for (found, _), (wanted, _) in zip(steps, known, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert "read" not in drafter.param_specs(tiny_config, DRAFTER)


def test_a_widened_drafter_gives_what_it_gave(params, tiny_config, pairs):
    """Whatever the other layers hold; and all of what it reads with can be trained."""
    config = dataclasses.replace(tiny_config, feature_layers=(0,))
    features, embedded = pairs
    other = jnp.asarray(np.random.default_rng(4).standard_normal(features.shape), jnp.float32)
    wide = jnp.concatenate([other, features], axis=-1)
    widened = drafter.widened(params, config)
    shapes = jax.tree.map(jnp.shape, drafter.init(config, DRAFTER, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, widened) == shapes

    def estimates(params, config, features):
        return _steps(params, config, features, embedded, POSITIONS, SEGMENTS, steps=2)

    for (found, _), (known, _) in zip(
        estimates(widened, config, wide), estimates(params, tiny_config, features), strict=True
    ):
        np.testing.assert_allclose(found, known, atol=2e-2)  # the norms' epsilon is 1e-3 here
    gradient = jax.grad(lambda params: estimates(params, config, wide)[1][0].sum())(widened)
    assert np.all(np.any(np.asarray(gradient["read"]) != 0, axis=(1, 2)))


def test_decoding_pair_by_pair_is_the_packed_row(params, tiny_config, pairs):
    whole = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    expected = _packed(params, tiny_config, *pairs, whole, np.zeros((2, T), np.int32))
    cache = drafter.empty_cache(tiny_config, 2, T + 2)
    at_once, filled = _decode(params, tiny_config, *pairs, cache, jnp.zeros((2,), jnp.int32))
    np.testing.assert_allclose(at_once, expected, atol=1e-5)
    for index in range(T):
        one = (x[:, index : index + 1] for x in pairs)
        found, cache = _decode(params, tiny_config, *one, cache, jnp.full((2,), index, jnp.int32))
        np.testing.assert_allclose(found[:, 0], expected[:, index], atol=1e-5)
    np.testing.assert_allclose(cache.k, filled.k, atol=1e-5)


def test_each_row_has_its_own_first_pair(params, tiny_config, pairs):
    """Rows 3 and 6 pairs long get two more, over what an earlier, longer guess left behind."""
    whole = np.broadcast_to(np.arange(T, dtype=np.int32), (2, T))
    expected = _packed(params, tiny_config, *pairs, whole, np.zeros((2, T), np.int32))
    known, starts = np.array([[3], [6]]), jnp.array([3, 6], jnp.int32)
    wrong = [jnp.where(np.arange(T)[None, :, None] < known[..., None], x, 9.0) for x in pairs]
    cache = drafter.empty_cache(tiny_config, 2, T + 2)
    _, cache = _decode(params, tiny_config, *wrong, cache, jnp.zeros((2,), jnp.int32))
    for step in range(2):
        one = (jnp.stack([x[0, 3 + step], x[1, 6 + step]])[:, None] for x in pairs)
        found, cache = _decode(params, tiny_config, *one, cache, starts + step)
        np.testing.assert_allclose(found[0, 0], expected[0, 3 + step], atol=1e-5)
        np.testing.assert_allclose(found[1, 0], expected[1, 6 + step], atol=1e-5)


def test_deeper_steps_are_what_drafting_from_each_place_gives(params, tiny_config, pairs):
    """From every place of a segment on: true pairs up to it, then the drafter's own estimates."""
    steps = _steps(params, tiny_config, *pairs, POSITIONS, SEGMENTS, steps=3)
    empty, zero = drafter.empty_cache(tiny_config, 1, T + 3), jnp.zeros((1,), jnp.int32)
    for row, first, last in ((0, 0, 4), (0, 4, 8), (1, 0, 6)):
        # The segment comes first; slots beyond a draft's start are overwritten before use.
        features, embedded = (jnp.roll(x[row : row + 1], -first, axis=1) for x in pairs)
        estimates, filled = _decode(params, tiny_config, features, embedded, empty, zero)
        for start in range(last - first):
            estimate, cache = estimates[:, start : start + 1], filled
            np.testing.assert_allclose(steps[0][0][row, first + start], estimate[0, 0], atol=1e-5)
            for depth in range(1, min(3, last - first - start)):
                slot = start + depth
                token = embedded[:, slot : slot + 1]
                estimate, cache = _decode(
                    params, tiny_config, estimate, token, cache, jnp.full((1,), slot, jnp.int32)
                )
                found = steps[depth][0][row, first + slot]
                np.testing.assert_allclose(found, estimate[0, 0], atol=1e-5)


def test_a_tree_fed_level_by_level_is_each_of_its_paths(params, tiny_config, pairs):
    """Two levels of two nodes behind three pairs: 0 -> 2, 1 -> 3."""
    features = pairs[0][:, :4]
    embedded = jax.random.normal(jax.random.key(3), features.shape)
    start = jnp.full((features.shape[0],), 3, jnp.int32)
    feed = jax.jit(drafter.decode, static_argnums=1, static_argnames=("first_node", "depth"))
    cache = drafter.empty_cache(tiny_config, features.shape[0], 12)
    _, before = feed(
        params, tiny_config, features[:, :3], embedded[:, :3], cache, jnp.zeros_like(start)
    )
    nodes = jax.random.normal(jax.random.key(4), (2, *features.shape))  # feature and token, 4 nodes
    masks = jnp.array([[[1, 0], [0, 1]]], bool), jnp.array([[[1, 0, 1, 0], [0, 1, 0, 1]]], bool)
    found, cache = [], before
    for level, mask in enumerate(masks):
        own = nodes[:, :, 2 * level : 2 * level + 2]
        mask = jnp.broadcast_to(mask, (features.shape[0], *mask.shape[1:]))
        estimates, cache = feed(
            params,
            tiny_config,
            *own,
            cache,
            start,
            draft_mask=mask,
            first_node=2 * level,
            depth=level,
        )
        found.append(estimates)
    for branch in range(2):
        path = nodes[:, :, branch::2]
        wanted, _ = feed(params, tiny_config, *path, before, start)
        got = jnp.stack([level[:, branch] for level in found], axis=1)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("starts", [(0, 0), (4, 2), (3, 4)])
def test_a_part_of_a_row_is_trained_with_all_that_it_sees(params, tiny_config, pairs, starts):
    """At every depth the same as in the whole row, but for drafts that began before the part."""
    whole = _steps(params, tiny_config, *pairs, POSITIONS, SEGMENTS, steps=3)
    given = (*pairs, POSITIONS, SEGMENTS, jnp.array(starts, jnp.int32))
    part = _packed_steps(params, tiny_config, *given, count=4, steps=3)
    for depth in range(3):
        for row, start in enumerate(starts):
            here = slice(start, start + 4)
            expected = np.array(whole[depth][1][row, here])
            expected[:depth] = False
            np.testing.assert_array_equal(part[depth][1][row], expected)
            found, wanted = part[depth][0][row], whole[depth][0][row, here]
            np.testing.assert_allclose(found[expected], wanted[expected], atol=1e-5)


def test_where_deeper_steps_exist_by_hand(params, tiny_config, pairs):
    steps = _steps(params, tiny_config, *pairs, POSITIONS, SEGMENTS, steps=3)
    real = SEGMENTS != INVALID
    by_hand = [
        [[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]],
        [[0, 1, 1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1, 0, 0]],
        [[0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]],
    ]
    for (_, exists), expected in zip(steps, by_hand, strict=True):
        np.testing.assert_array_equal(exists & real, np.array(expected, bool))


@pytest.mark.parametrize("part", [0, 1], ids=["feature", "token"])
def test_a_later_pair_or_another_segment_changes_nothing(params, tiny_config, pairs, part):
    base = _packed(params, tiny_config, *pairs, POSITIONS, SEGMENTS)
    for position, untouched in ((2, [0, 1, 4, 5, 6, 7]), (6, [0, 1, 2, 3, 4, 5])):
        disturbed = list(pairs)
        disturbed[part] = disturbed[part].at[0, position].add(2.0)
        other = _packed(params, tiny_config, *disturbed, POSITIONS, SEGMENTS)
        np.testing.assert_array_equal(other[0, untouched], base[0, untouched])
        assert np.all(np.any(other[0, position : position + 2] != base[0, position : position + 2]))


def test_the_drafters_tree_holds_neither_embedding_nor_head(tiny_config):
    made = jax.eval_shape(lambda key: drafter.init(tiny_config, DRAFTER, key), jax.random.key(0))
    assert set(made) == {"feature_norm", "token_norm", "fuse", "layer", "norm"}
    specs = drafter.param_specs(tiny_config, DRAFTER)
    for spec, array in zip(jax.tree.leaves(specs), jax.tree.leaves(made), strict=True):
        assert array.shape == spec.shape and array.dtype == jnp.float32
    assert tiny_config.vocab_size not in {n for x in jax.tree.leaves(made) for n in x.shape}
