"""Blocks of tokens: their size by hand, and a function of tokens on all of them at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import blocks

B, T, D = 2, 9, 3


@pytest.mark.parametrize(
    ("count", "per_token", "expected"),
    [(9, 7, 9), (9, 8, 8), (9, 16, 4), (9, 21, 2), (9, 64, 1), (9, 65, 1), (0, 1000, 0)],
)
def test_the_size_of_a_block_by_hand(monkeypatch, count, per_token, expected):
    monkeypatch.setattr(blocks, "LIMIT", 64)
    assert blocks.size(count, per_token) == expected


def _inputs():
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32) for _ in range(2))
    return x, y, jnp.asarray(rng.standard_normal((D, 5)), jnp.float32)


def _wide(weights, x, pair):
    """Two results for each token, of what is wider than it."""
    y, numbers = pair
    wide = jnp.tanh(x @ weights) * numbers[..., None]
    return wide @ weights.T + y, jnp.sum(wide**2, axis=-1)


def _loss(weights, x, y, size):
    numbers = jnp.broadcast_to(jnp.arange(T), (B, T))
    both, squares = blocks.over_tokens(
        lambda *arrays: _wide(weights, *arrays), (x, (y, numbers)), size
    )
    assert both.shape == (B, T, D) and squares.shape == (B, T)
    places = jnp.arange(1.0, T + 1)
    return jnp.sum(both * places[:, None]) + jnp.sum(squares * places), (both, squares)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_blocks_are_the_whole_and_so_are_their_gradients(size):
    """A size of 2 fills up a block, 4 makes three blocks of 3, 8 two of 5."""
    x, y, weights = _inputs()
    run = jax.jit(jax.value_and_grad(_loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    (_, whole), of_whole = run(weights, x, y, T)
    (_, found), gradients = run(weights, x, y, size)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients, of_whole, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_no_token_is_told_of_another_block():
    x, y, weights = _inputs()
    _, base = _loss(weights, x, y, 2)
    _, other = _loss(weights, x.at[0, 3].add(1.0), y, 2)
    for one, two in zip(base, other, strict=True):
        same = np.all(np.reshape(one == two, (B, T, -1)), axis=-1)
        np.testing.assert_array_equal(np.argwhere(~same), [[0, 3]])
