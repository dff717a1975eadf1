"""The policy: a naive numpy decoder, then packed rows, then every way of decoding with a cache."""

import dataclasses

import jax
import jax.numpy as jnp
import naive_decoder
import numpy as np
import pytest

from tlt_jax import policy
from tlt_jax.types import INVALID

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 10, 7, 0, 0]], np.int32)
SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2, -1, -1]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 0]], np.int32)
CACHE_LENGTH = 12

_decode = jax.jit(policy.decode, static_argnames="config")
_packed = jax.jit(policy.packed_forward, static_argnames="config")


def _plain_rows(count):
    """Positions and segment ids of rows that hold one sequence each, [2, count]."""
    shape = (2, count)
    segments = jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32)[:, None], shape)
    return jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), shape), segments


def _with_layers(config):
    """The config with features of both layers, the second first."""
    return dataclasses.replace(config, feature_layers=(1, 0))


def _one_by_one(params, config, tokens, cache, lengths):
    """Feeds tokens [B, T] one at a time; hidden states [B, T, D] and the cache."""
    found = []
    for index in range(tokens.shape[1]):
        hidden, _, cache = _decode(
            params, config, tokens[:, index : index + 1], cache, lengths + index
        )
        found.append(hidden)
    return jnp.concatenate(found, axis=1), cache


@pytest.fixture(scope="module")
def params(family, random_params):
    return random_params(policy.param_specs(family), 0)


@pytest.fixture(scope="module")
def forward(params, family):
    """Hidden states of `TOKENS` as two sequences of eight tokens, by `packed_forward`."""
    return _packed(params, _with_layers(family), TOKENS, *_plain_rows(8))


def test_packed_forward_is_the_naive_decoder_on_every_segment(params, family):
    hidden, features = _packed(params, _with_layers(family), TOKENS, POSITIONS, SEGMENTS)
    streams = np.split(features, 3, axis=-1)
    np.testing.assert_array_equal(streams[2], hidden)
    found = policy.logits(params, hidden)
    assert found.dtype == jnp.float32 and found.shape == (2, 8, 11)
    for row, segment in ((0, 0), (0, 1), (1, 2)):
        here = SEGMENTS[row] == segment
        expected, logits, layers = naive_decoder.decoder(params, family, TOKENS[row, here])
        np.testing.assert_allclose(hidden[row, here], expected, atol=2e-5)
        np.testing.assert_allclose(found[row, here], logits, atol=1e-4)
        np.testing.assert_allclose(streams[0][row, here], layers[1], atol=5e-5)
        np.testing.assert_allclose(streams[1][row, here], layers[0], atol=5e-5)


def test_decoding_one_by_one_or_at_once_is_the_packed_forward(params, family, forward):
    cache, start = policy.empty_cache(family, 2, CACHE_LENGTH), jnp.zeros((2,), jnp.int32)
    at_once, features, filled = _decode(params, _with_layers(family), TOKENS, cache, start)
    stepwise, filled_stepwise = _one_by_one(params, family, TOKENS, cache, start)
    np.testing.assert_allclose(at_once, forward[0], atol=1e-5)
    np.testing.assert_allclose(stepwise, forward[0], atol=1e-5)
    np.testing.assert_allclose(features, forward[1], atol=2e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), filled, filled_stepwise)


def test_right_padding_of_the_prefill_leaves_no_trace(params, family, forward):
    prompt = np.where(np.arange(8) < np.array([[3], [5]]), TOKENS, 7)  # padded with garbage
    lengths = jnp.array([3, 5], jnp.int32)
    cache, start = policy.empty_cache(family, 2, CACHE_LENGTH), jnp.zeros((2,), jnp.int32)
    prefilled, _, cache = _decode(params, family, prompt, cache, start)
    following = np.stack([TOKENS[0, 3:6], TOKENS[1, 5:8]])
    decoded, _ = _one_by_one(params, family, following, cache, lengths)
    for row, length in enumerate((3, 5)):
        expected = forward[0][row]
        np.testing.assert_allclose(prefilled[row, :length], expected[:length], atol=1e-5)
        np.testing.assert_allclose(decoded[row], expected[length : length + 3], atol=1e-5)


def test_each_branch_of_a_tree_is_the_branch_decoded_alone(params, family):
    #   0 - 1 - 3      nodes 1 and 2 are rivals for one position, as are 3 and 4
    #     \ 2 - 4
    parents, depths = [-1, 0, 0, 1, 2], np.array([0, 1, 1, 2, 2], np.int32)
    mask = np.eye(5, dtype=bool)
    for node in range(1, 5):
        mask[node] |= mask[parents[node]]
    cache, start = policy.empty_cache(family, 2, CACHE_LENGTH), jnp.zeros((2,), jnp.int32)
    _, _, cache = _decode(params, family, TOKENS, cache, start)
    lengths = jnp.array([4, 6], jnp.int32)  # what lies beyond is overwritten
    nodes = np.array([[2, 7, 8, 1, 0], [9, 4, 6, 6, 3]], np.int32)
    tree, _, _ = _decode(
        params,
        family,
        nodes,
        cache,
        lengths,
        draft_mask=jnp.asarray(np.stack([mask, mask])),
        depths=jnp.asarray(np.stack([depths, depths])),
    )
    for branch in ([0, 1, 3], [0, 2, 4]):
        alone, _ = _one_by_one(params, family, nodes[:, branch], cache, lengths)
        np.testing.assert_allclose(tree[:, branch], alone, atol=1e-5)


def test_masks_and_depths_may_be_shared_by_the_rows(tiny_config, random_params):
    params = random_params(policy.param_specs(tiny_config), 0)
    mask = jnp.array([[True, False, False], [True, True, False], [True, False, True]])
    depths = jnp.array([0, 1, 1], jnp.int32)
    cache, lengths = policy.empty_cache(tiny_config, 2, CACHE_LENGTH), jnp.array([0, 4], jnp.int32)
    arguments = (params, tiny_config, TOKENS[:, :3], cache, lengths)
    shared, _, _ = _decode(*arguments, draft_mask=mask, depths=depths)
    by_row, _, _ = _decode(
        *arguments, draft_mask=jnp.stack([mask, mask]), depths=jnp.stack([depths, depths])
    )
    np.testing.assert_array_equal(shared, by_row)


def test_a_later_token_or_another_segment_changes_nothing(tiny_config, random_params):
    params = random_params(policy.param_specs(tiny_config), 0)
    base, _ = _packed(params, tiny_config, TOKENS, POSITIONS, SEGMENTS)
    changed = TOKENS.copy()
    changed[0, :3] = [8, 8, 8]  # segment 0
    changed[0, 6] = 0  # the fourth token of segment 1
    changed[1, 6:] = 9  # padding
    other, _ = _packed(params, tiny_config, changed, POSITIONS, SEGMENTS)
    np.testing.assert_array_equal(other[0, 3:6], base[0, 3:6])
    np.testing.assert_array_equal(other[1, :6], base[1, :6])
    assert np.all(np.any(other[0, 6:] != base[0, 6:], axis=-1))


def test_bfloat16_stays_bfloat16_and_near_float32(tiny_config, random_params):
    narrow = dataclasses.replace(tiny_config, dtype="bfloat16")
    params = random_params(policy.param_specs(tiny_config), 0, "bfloat16")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    cache, start = policy.empty_cache(narrow, 2, CACHE_LENGTH), jnp.zeros((2,), jnp.int32)
    hidden, _, cache = _decode(params, narrow, TOKENS, cache, start)
    packed, _ = _packed(params, narrow, TOKENS, *_plain_rows(8))
    expected, alone = _packed(wide, tiny_config, TOKENS, *_plain_rows(8))
    np.testing.assert_array_equal(alone, expected)  # without further layers these are the features
    assert {x.dtype for x in jax.tree.leaves((hidden, packed, cache))} == {jnp.dtype("bfloat16")}
    assert policy.logits(params, hidden).dtype == jnp.float32
    # bfloat16 rounds by up to 2^-9 = 0.002 of a value; some ten roundings lie on each path, and
    # hidden states reach about 3.
    for found in (hidden, packed):
        error = np.abs(np.asarray(found, np.float32) - np.asarray(expected))
        assert np.max(error) < 0.1 and np.mean(error) < 0.02


def test_parameters_are_those_of_the_family(family):
    made = jax.eval_shape(lambda key: policy.init(family, key), jax.random.key(0))
    assert ("head" in made) == (not family.tie_embeddings)
    assert ("qkv_bias" in made["layers"][0]) == family.qkv_bias
    assert ("q_norm" in made["layers"][0]) == family.qk_norm
    specs = policy.param_specs(family)
    for spec, array in zip(jax.tree.leaves(specs), jax.tree.leaves(made), strict=True):
        assert array.shape == spec.shape and array.dtype == jnp.float32


def test_packed_rows_of_padding_alone_are_finite(tiny_config, random_params):
    params = random_params(policy.param_specs(tiny_config), 0)
    hidden, _ = _packed(params, tiny_config, TOKENS, POSITIONS, np.full_like(SEGMENTS, INVALID))
    assert np.all(np.isfinite(hidden))
