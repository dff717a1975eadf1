"""The two attentions of the library: over a cache, and inside packed training rows.

Axes: B rows, T query tokens, S cache length, N heads, K kv heads, H head size.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.verify_attention import verify_attention
from tlt_jax.kv_cache import LayerCache, write
from tlt_jax.sampling import MASKED
from tlt_jax.types import INVALID

QUERY_BLOCK = 128


def cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: LayerCache,
    lengths: jax.Array,
    *,
    draft_mask: jax.Array | None = None,
    backend: str,
) -> tuple[jax.Array, LayerCache]:
    """Writes T new tokens into the cache and lets them attend to it.

    Args:
      q: queries [B, T, N, H].
      k: new keys [B, T, K, H].
      v: new values [B, T, K, H].
      cache: the layer's cache, [B, K, S, H].
      lengths: tokens already in the cache, [B] int32; the new ones go to `lengths + 0 .. T - 1`.
      draft_mask: which new token sees which, [T, T] or [B, T, T] bool; None is a causal chain.
      backend: of `pallas_kernels.verify_attention`.

    Returns:
      The output [B, T, N, H] and the written cache.
    """
    cache = write(cache, k, v, lengths)
    return verify_attention(q, cache.k, cache.v, lengths, draft_mask, backend=backend), cache


def packed_mask(segment_ids: jax.Array) -> jax.Array:
    """Causal mask inside segments, [B, T, T] bool from segment ids [B, T].

    Segment ids 0 0 1 1 -1 give

        1 . . . .
        1 1 . . .
        . . 1 . .
        . . 1 1 .
        . . . . 1     padding sees itself, so that no softmax is empty
    """
    count = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((count, count), bool))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    real = (segment_ids != INVALID)[:, :, None]
    return (causal & same & real) | jnp.eye(count, dtype=bool)


def packed(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attention inside packed rows.

    Query blocks read keys up to their own end only, which skips nearly half of a causal mask.

    Args:
      q: queries [B, T, N, H].
      k: keys [B, T, K, H].
      v: values [B, T, K, H].
      mask: [B, T, T] bool from `packed_mask`.

    Returns:
      [B, T, N, H] in the dtype of `q`; the softmax is float32.
    """
    batch, count, heads, size = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, count, kv_heads, heads // kv_heads, size) * size**-0.5
    blocks = []
    for start in range(0, count, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, count)
        blocks.append(
            _attend(grouped[:, start:end], k[:, :end], v[:, :end], mask[:, start:end, :end])
        )
    out = jnp.concatenate(blocks, axis=1)
    return out.reshape(batch, count, heads, size).astype(q.dtype)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention of scaled grouped queries [B, T, K, G, H] over keys [B, S, K, H]."""
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, preferred_element_type=jnp.float32)
