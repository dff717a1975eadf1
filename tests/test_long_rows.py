"""Drafter training on rows that are worked on in blocks: the same numbers, in less memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import attention, blocks, drafter, objectives, policy, sampling
from tlt_jax.buffer import Microbatch
from tlt_jax.config import DrafterConfig, PolicyConfig

W, D = 11, 16
SEGMENTS = np.array([[4, 4, 4, 4, 4, 7, 7, 7, 7, -1, -1], [5] * 11], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0], list(range(11))], np.int32)
SAMPLING = sampling.make_params(0.8, 0, 1.0, filtered=False)
CONFIG = DrafterConfig(ffn_width=20, row_length=W, microbatch_tokens=W, train_depth=3)
# Of two rows with four heads, scores of 2 queries: blocks of 8 tokens at the head with its 11
# logits, of 4 in the drafter's feed-forward, of 3 and 2 in the policy's.
SMALL = 2 * 2 * 4 * W
DEPTH = 3


@pytest.fixture(scope="module")
def target(tiny_config, random_params):
    return random_params(policy.param_specs(tiny_config), 0)


@pytest.fixture(scope="module")
def params(tiny_config, random_params):
    return random_params(drafter.param_specs(tiny_config, CONFIG), 1)


@pytest.fixture(scope="module")
def microbatch():
    rng = np.random.default_rng(2)
    return Microbatch(
        tokens=jnp.asarray(rng.integers(0, 11, (2, W)), jnp.int32),
        features=jnp.asarray(rng.standard_normal((2, W, D)), jnp.float32),
        segment_ids=jnp.asarray(SEGMENTS),
        positions=jnp.asarray(POSITIONS),
        starts=jnp.zeros(2, jnp.int32),
    )


def _both(monkeypatch, function, *arguments):
    """What a function gives on whole rows and in small blocks, each compiled anew."""
    whole = jax.jit(lambda *given: function(*given))(*arguments)
    monkeypatch.setattr(blocks, "LIMIT", SMALL)
    return whole, jax.jit(lambda *given: function(*given))(*arguments)


def _assert_close(found, expected, tolerance):
    close = functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance)
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("tokens", [W, 7], ids=["whole rows", "parts"])
@pytest.mark.parametrize("objective", ["hass", "eagle3"])
def test_loss_and_gradients_do_not_depend_on_blocks(
    monkeypatch, params, target, tiny_config, microbatch, objective, tokens
):
    config = dataclasses.replace(CONFIG, objective=objective, microbatch_tokens=tokens)
    given = microbatch.replace(starts=jnp.array([0, W - tokens], jnp.int32))

    def run(params):
        return objectives.loss_sum(params, target, tiny_config, config, given)

    gradient = jax.value_and_grad(run, has_aux=True)
    ((loss, count), gradients), found = _both(monkeypatch, gradient, params)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))
    assert float(count) == float(found[0][1]) > 0
    _assert_close(found[0][0], loss, 1e-5)
    _assert_close(found[1], gradients, 1e-4)


@pytest.mark.parametrize("rejection", [False, True], ids=["coupled", "rejection"])
def test_acceptance_does_not_depend_on_blocks(
    monkeypatch, params, target, tiny_config, microbatch, rejection
):
    """Features are made anew here, so the policy runs in blocks, too."""
    drawn = dataclasses.replace(SAMPLING, rejection=rejection)
    bare = microbatch.replace(features=None)

    def run(params):
        return objectives.acceptance_sums(
            params, target, tiny_config, CONFIG, drawn, bare, depth=DEPTH
        )

    (accepted, counted), found = _both(monkeypatch, run, params)
    np.testing.assert_array_equal(found[1], counted)
    assert np.all(counted > 0)
    _assert_close(found[0], accepted, 1e-5)


def test_a_policy_forward_does_not_depend_on_blocks(monkeypatch, target, tiny_config, microbatch):
    config = dataclasses.replace(tiny_config, feature_layers=(0,))

    def run(target):
        return policy.packed_forward(target, config, microbatch.tokens, POSITIONS, SEGMENTS)

    whole, found = _both(monkeypatch, run, target)
    _assert_close(found, whole, 1e-5)


def test_a_later_pair_or_another_segment_changes_nothing_in_blocks(
    monkeypatch, params, target, tiny_config, microbatch
):
    monkeypatch.setattr(blocks, "LIMIT", SMALL)
    monkeypatch.setattr(attention, "STRETCHES", 2)

    @jax.jit
    def run(features):
        return drafter.packed_steps(
            params,
            tiny_config,
            features,
            policy.embed(target, microbatch.tokens),
            POSITIONS,
            SEGMENTS,
            microbatch.starts,
            count=W,
            steps=DEPTH,
        )

    base = run(microbatch.features)
    for row, place, end in ((0, 1, 5), (0, 6, 9), (1, 6, W)):
        other = run(microbatch.features.at[row, place].add(2.0))
        touched = np.zeros((2, W), bool)
        touched[row, place:end] = True
        for (one, exists), (two, _) in zip(base, other, strict=True):
            differs = np.any(np.asarray(one != two), axis=-1)
            assert not np.any(differs & np.asarray(exists) & ~touched)
        np.testing.assert_array_equal(np.any(base[0][0] != other[0][0], axis=-1), touched)


SHAPE = PolicyConfig(
    vocab_size=4096,
    num_layers=1,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    ffn_width=512,
    tie_embeddings=False,
)


def _temporaries(row_length, tokens, *, what):
    """Bytes that the compiled program for one row of tokens needs besides what goes in and out."""
    config = DrafterConfig(
        ffn_width=512, row_length=row_length, microbatch_tokens=tokens, train_depth=1
    )
    target = jax.eval_shape(functools.partial(policy.init, SHAPE), jax.random.key(0))
    params = jax.eval_shape(functools.partial(drafter.init, SHAPE, config), jax.random.key(0))
    number = jax.ShapeDtypeStruct((1, row_length), jnp.int32)
    features = jax.ShapeDtypeStruct((1, row_length, SHAPE.width), jnp.float32)
    given = Microbatch(
        tokens=number,
        features=None if what == "forward" else features,
        segment_ids=number,
        positions=number,
        starts=jax.ShapeDtypeStruct((1,), jnp.int32),
    )

    def gradient(params, target, given):
        shared = params, target, SHAPE, config
        if what == "forward":
            return objectives.acceptance_sums(*shared, SAMPLING, given, depth=1)
        return jax.grad(objectives.loss_sum, has_aux=True)(*shared, given)

    compiled = jax.jit(gradient).lower(params, target, given).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("what", ["gradient", "forward"])
def test_memory_grows_with_the_length_of_a_row_and_not_faster(monkeypatch, what):
    """Four times the row takes at most about four times the memory, and nothing [T, V] or [T, T].

    "forward" is the acceptance of drafts whose features the policy makes first.
    """
    monkeypatch.setattr(blocks, "LIMIT", 2**14)  # numbers; 64 KiB in float32
    monkeypatch.setattr(attention, "STRETCHES", 2)  # compiles sooner
    long = 2048
    short, whole = (_temporaries(length, length, what=what) for length in (long // 4, long))
    part = _temporaries(long, long // 4, what=what)
    print(
        f"{what}: {short} bytes at {long // 4} tokens, {whole} at {long}, {part} for a part of it"
    )
    assert part <= whole < 4.5 * short
    assert whole < long * min(long, 4 * SHAPE.vocab_size)
