"""Rotary embeddings: frequencies by hand, one rotation by hand, and the relative-position rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import rope
from tlt_jax.config import RopeScaling


def test_frequencies_without_scaling():
    found = rope.frequencies(8, 10_000.0, RopeScaling())
    np.testing.assert_allclose(found, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


def test_llama3_scaling_by_hand():
    # 1571 tokens hold 250.032, 25.003, 2.50032 and 0.25003 turns of the four frequencies. Above 4
    # turns nothing changes, below 1 the factor 8 divides, and 2.50032 lies (2.50032 - 1) / 3 =
    # 0.500108 of the way: 0.01 * 0.500108 + 0.00125 * 0.499892 = 0.00562595.
    scaling = RopeScaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=1571
    )
    found = rope.frequencies(8, 10_000.0, scaling)
    np.testing.assert_allclose(found, [1.0, 0.1, 0.00562595, 0.000125], rtol=2e-6)


@pytest.mark.parametrize(("turns", "share"), [(1.0, 1 / 8), (4.0, 1.0)])
def test_llama3_scaling_has_no_step_at_its_limits(turns, share):
    # The frequency is 1 radian per token, so this length holds `turns` turns.
    for nudge in (-1e-4, 1e-4):
        scaling = RopeScaling(factor=8.0, original_max_length=2 * np.pi * turns + nudge)
        found = rope.frequencies(2, 10_000.0, scaling)
        np.testing.assert_allclose(found, [share], atol=1e-4)


def test_rotation_by_hand():
    # Frequencies 1 and 0.1: after 2 tokens the pairs (x0, x2) and (x1, x3) turn by 2 and by 0.2.
    x = jnp.array([1.0, 0.0, 0.0, 1.0]).reshape(1, 1, 1, 1, 4)
    cos, sin = rope.angles(jnp.array([[2]]), jnp.array([1.0, 0.1]))
    assert cos.shape == sin.shape == (1, 1, 1, 1, 2)
    expected = [np.cos(2), -np.sin(0.2), np.sin(2), np.cos(0.2)]
    np.testing.assert_allclose(rope.rotate(x, cos, sin).ravel(), expected, rtol=1e-6)


@jax.jit
def _scores(q, k, query_positions, key_positions):
    """q . k after rotation, for one query and one key at each pair of positions, [pairs]."""
    freqs = rope.frequencies(8, 100.0, RopeScaling(factor=4.0, original_max_length=64))

    def turned(x, positions):
        rows = jnp.broadcast_to(x[None, :], (positions.size, 8)).reshape(1, -1, 1, 1, 8)
        return rope.rotate(rows, *rope.angles(positions[None], freqs)).reshape(-1, 8)

    return jnp.sum(turned(q, query_positions) * turned(k, key_positions), axis=-1)


def test_scores_depend_on_the_distance_alone():
    q, k = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    starts, distance = jnp.array([0, 1, 7, 100, 400]), 5
    same = _scores(q, k, starts + distance, starts)
    np.testing.assert_allclose(same, np.full(5, same[0]), atol=2e-4)
    others = _scores(q, k, starts[0] + jnp.arange(5), jnp.zeros(5, jnp.int32))
    assert np.min(np.abs(others - same[0])) > 1e-2
    np.testing.assert_allclose(others[0], q @ k, rtol=1e-5)  # no distance: no rotation


def test_rotation_keeps_dtype_and_norm():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 2, 2, 8)), jnp.bfloat16)
    angles = rope.angles(jnp.array([[0, 1, 2], [5, 6, 90]]), jnp.array([1.0, 0.5, 0.1, 0.01]))
    turned = rope.rotate(x, *angles)
    assert turned.dtype == jnp.bfloat16
    before, after = (np.linalg.norm(np.asarray(y, np.float32), axis=-1) for y in (x, turned))
    np.testing.assert_allclose(after, before, rtol=1e-2)
    np.testing.assert_array_equal(turned[0, 0], x[0, 0])  # position 0
