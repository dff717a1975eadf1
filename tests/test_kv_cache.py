"""The cache of one layer: what a write changes, and what it leaves alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import kv_cache

_write = jax.jit(kv_cache.write)


def _numbers(*shape):
    return jnp.arange(1, 1 + np.prod(shape), dtype=jnp.float32).reshape(shape)


def test_an_empty_cache_is_zeros():
    cache = kv_cache.empty(2, 3, 5, 4, jnp.dtype("bfloat16"))
    for x in (cache.k, cache.v):
        assert x.shape == (2, 3, 5, 4) and x.dtype == jnp.bfloat16 and not np.any(x)


def test_a_write_lands_at_each_rows_own_position():
    cache = kv_cache.LayerCache(k=-_numbers(2, 1, 5, 2), v=-10 * _numbers(2, 1, 5, 2))
    k = jnp.array([[1.0, 2], [3, 4], [5, 6], [7, 8]]).reshape(2, 2, 1, 2)
    found = _write(cache, k, 10 * k, jnp.array([1, 3], jnp.int32))
    by_hand = [
        [[-1, -2], [1, 2], [3, 4], [-7, -8], [-9, -10]],
        [[-11, -12], [-13, -14], [-15, -16], [5, 6], [7, 8]],  # up to the very end
    ]
    np.testing.assert_array_equal(found.k[:, 0], by_hand)
    np.testing.assert_array_equal(found.v[:, 0], 10 * np.array(by_hand))


def test_heads_stay_apart():
    cache, k = kv_cache.empty(2, 3, 5, 4, jnp.dtype("float32")), _numbers(2, 2, 3, 4)
    found = _write(cache, k, -k, jnp.array([0, 2], jnp.int32))
    for row, start in ((0, 0), (1, 2)):
        for head in range(3):
            np.testing.assert_array_equal(found.k[row, head, start : start + 2], k[row, :, head])
            np.testing.assert_array_equal(found.v[row, head, start : start + 2], -k[row, :, head])
    assert np.count_nonzero(found.k) == k.size


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("rows", [1, 5])
def test_rows_are_written_along_either_axis(rows, axis):
    shape, new_shape = [rows, 3, 7, 2], [rows, 3, 7, 2]
    new_shape[axis] = 2
    whole, new = -_numbers(*shape), _numbers(*new_shape)
    starts = jnp.arange(rows, dtype=jnp.int32) % (shape[axis] - 1)
    found = kv_cache.put_rows(whole, new, starts, axis=axis)
    expected = np.array(whole)
    for row, start in enumerate(starts.tolist()):
        np.moveaxis(expected[row], axis - 1, 0)[start : start + 2] = np.moveaxis(
            np.asarray(new)[row], axis - 1, 0
        )
    np.testing.assert_array_equal(found, expected)


def test_what_does_not_fit_is_not_written():
    whole, new = _numbers(2, 3, 2), -_numbers(2, 2, 2)
    found = kv_cache.put_rows(whole, new, jnp.array([2, 1], jnp.int32), axis=1)
    np.testing.assert_array_equal(found[0], whole[0])
    np.testing.assert_array_equal(found[1, 1:], new[1])


def test_a_part_of_each_row_is_taken():
    whole = _numbers(2, 5, 3)
    found = kv_cache.take_rows(whole, jnp.array([3, 0], jnp.int32), 2)
    np.testing.assert_array_equal(found, [whole[0, 3:], whole[1, :2]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_write_keeps_the_caches_dtype(dtype):
    cache, k = kv_cache.empty(1, 1, 3, 2, jnp.dtype(dtype)), jnp.full((1, 1, 1, 2), 1.0009765625)
    found = _write(cache, k, k, jnp.array([1], jnp.int32))
    assert found.k.dtype == found.v.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(found.k[0, 0, 1], k[0, 0, 0].astype(dtype))


def test_an_accepted_path_is_moved_together():
    """Nodes 0, 2 and 4 of the first row's tree; the second row's path ends at node 1."""
    cache = kv_cache.LayerCache(k=_numbers(2, 2, 8, 1), v=-_numbers(2, 2, 8, 1))
    starts, path = jnp.array([1, 3], jnp.int32), jnp.array([[0, 2, 4], [0, 1, 0]], jnp.int32)
    found = jax.jit(kv_cache.move)(cache, starts, path)
    by_hand = [
        [[1, 2, 4, 6, 5, 6, 7, 8], [9, 10, 12, 14, 13, 14, 15, 16]],
        [[17, 18, 19, 20, 21, 20, 23, 24], [25, 26, 27, 28, 29, 28, 31, 32]],
    ]
    np.testing.assert_array_equal(found.k[..., 0], by_hand)
    np.testing.assert_array_equal(found.v[..., 0], -np.array(by_hand))
