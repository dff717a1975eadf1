"""Key/value cache of one attention layer, updated in place by loops that carry it.

Axes: B rows, K kv heads, S cache length, H head size, T new tokens.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class LayerCache:
    """Keys and values of one layer."""

    k: jax.Array  # [B, K, S, H]
    v: jax.Array  # [B, K, S, H]


def empty(rows: int, kv_heads: int, length: int, head_size: int, dtype: jnp.dtype) -> LayerCache:
    """A cache of zeros, [B, K, S, H] for keys and for values."""
    shape = (rows, kv_heads, length, head_size)
    return LayerCache(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))


def write(cache: LayerCache, k: jax.Array, v: jax.Array, starts: jax.Array) -> LayerCache:
    """Writes T tokens of every row from its own position on.

    Args:
      cache: the layer's cache.
      k: keys [B, T, K, H].
      v: values [B, T, K, H].
      starts: first cache position per row, [B] int32; `starts + T` must not pass S, because what
        does not fit is not written.
    """

    def place(whole: jax.Array, new: jax.Array) -> jax.Array:
        new = new.swapaxes(1, 2).astype(whole.dtype)  # [B, K, T, H]
        return put_rows(whole, new, starts, axis=2)

    # Without the barrier XLA:CPU fuses the update into the attention that reads it and once more
    # into the loop's carry, and then copies the cache to keep the two apart.
    return jax.lax.optimization_barrier(LayerCache(k=place(cache.k, k), v=place(cache.v, v)))


def move(cache: LayerCache, starts: jax.Array, path: jax.Array) -> LayerCache:
    """Moves the entries of an accepted path together: `starts + path[:, j]` to `starts + j`.

    Args:
      cache: the layer's cache.
      starts: position of the draft tree's first node, [B] int32.
      path: node at each depth, [B, T] int32.
    """
    places = (starts[:, None] + path)[:, None, :, None]  # [B, 1, T, 1]

    def moved(whole: jax.Array) -> jax.Array:
        return put_rows(whole, jnp.take_along_axis(whole, places, axis=2), starts, axis=2)

    return jax.lax.optimization_barrier(LayerCache(k=moved(cache.k), v=moved(cache.v)))


def put_rows(whole: jax.Array, new: jax.Array, starts: jax.Array, *, axis: int) -> jax.Array:
    """Writes `new` into `whole` in place, row b from `starts[b]` on along `axis`; B rows lead.

    One batched scatter. A scatter of a single update XLA makes a slice update, which XLA:CPU fuses
    into two places and copies the cache to keep them apart; so a single row gets a second update
    that falls outside and is dropped.
    """
    rows = jnp.arange(whole.shape[0], dtype=jnp.int32)
    if whole.shape[0] == 1:
        rows = jnp.arange(2, dtype=jnp.int32)
        starts, new = jnp.concatenate([starts, starts]), jnp.concatenate([new, new])
    dimensions = jax.lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(1, whole.ndim)),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, axis),
    )
    return jax.lax.scatter(
        whole,
        jnp.stack([rows, starts], axis=1),
        new,
        dimensions,
        indices_are_sorted=True,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )


def take_rows(whole: jax.Array, starts: jax.Array, count: int) -> jax.Array:
    """Entries `starts .. starts + count - 1` of each row: [B, S, ...] -> [B, count, ...]."""

    def take(row: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(row, start, count, axis=0)

    return jax.vmap(take)(whole, starts)
