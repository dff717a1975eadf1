"""The two attentions of the library: over a cache, and inside packed training rows.

Axes: B rows, T query tokens, S cache length, N heads, K kv heads, H head size.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels.verify_attention import verify_attention
from tlt_jax import blocks, sharding
from tlt_jax.kv_cache import LayerCache, write
from tlt_jax.sampling import MASKED
from tlt_jax.types import INVALID, UserError

# Queries that read keys up to their own end, where all scores of a row are kept at once.
QUERY_BLOCK = 128
# Where they are not: longer stretches of queries do, so that no program grows with its rows.
STRETCHES = 8
# Query rows (tokens x query heads of a kv head) of one kernel call; twice as many do not fit VMEM.
KERNEL_ROWS = 1024


def cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: LayerCache,
    lengths: jax.Array,
    *,
    draft_mask: jax.Array | None = None,
    first_node: int = 0,
    backend: str,
) -> tuple[jax.Array, LayerCache]:
    """Writes T new tokens into the cache and lets them attend to it.

    The new tokens are draft nodes `first_node + 0 .. T - 1` of those that follow committed tokens.

    Args:
      q: queries [B, T, N, H].
      k: new keys [B, T, K, H].
      v: new values [B, T, K, H].
      cache: the layer's cache, [B, K, S, H].
      lengths: committed tokens in the cache, [B] int32; draft nodes follow from there on.
      draft_mask: which new token sees which of M draft nodes, [T, M] or [B, T, M] bool with
        M = first_node + T; None is a causal chain.
      first_node: draft nodes that are in the cache already.
      backend: of `pallas_kernels.verify_attention`.

    Returns:
      The output [B, T, N, H] and the written cache.
    """
    with jax.named_scope("cache_write"):
        cache = write(cache, k, v, lengths + first_node)
    if draft_mask is None:  # every node sees all before it, as it sees committed tokens
        lengths = lengths + first_node
    with jax.named_scope("attention_scores"):
        if backend == "tpu":
            return _kernel_on_each_device(q, cache.k, cache.v, lengths, draft_mask), cache
        return verify_attention(q, cache.k, cache.v, lengths, draft_mask, backend=backend), cache


def _kernel_on_each_device(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, draft_mask: jax.Array | None
) -> jax.Array:
    """The TPU kernel on each device's own heads; arguments as of `verify_attention`.

    XLA cannot partition a kernel, so an automatic `tensor` axis is made manual around it. Where
    no such axis is in sight, a device's heads are all heads already.
    """
    mesh = jax.sharding.get_abstract_mesh()  # of the `shard_map` over slices around this call
    if sharding.TENSOR not in mesh.auto_axes:
        return _kernel_in_blocks(q, k, v, lengths, draft_mask)
    heads = sharding.spec((None, None, "heads", None), sharding.ROLLOUT_RULES)
    kv_heads = sharding.spec((None, "kv_heads", None, None), sharding.ROLLOUT_RULES)
    return jax.shard_map(
        _kernel_in_blocks,
        mesh=mesh,
        in_specs=(heads, kv_heads, kv_heads, P(), P()),
        out_specs=heads,
        axis_names={sharding.TENSOR},
        check_vma=False,
    )(q, k, v, lengths, draft_mask)


def _kernel_in_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, draft_mask: jax.Array | None
) -> jax.Array:
    """The TPU kernel on as many tokens of a chain at a time as its memory holds.

    For a block of a chain, the tokens before it are committed ones. A tree is always one block.
    """
    attend = functools.partial(verify_attention, backend="tpu")
    count, group = q.shape[1], q.shape[2] // k.shape[1]
    block = max(KERNEL_ROWS // group, 1)
    if count <= block:
        return attend(q, k, v, lengths, draft_mask)
    if draft_mask is not None:
        raise UserError(
            f"a draft tree of {count} tokens, with {group} query heads to a kv head, does not fit "
            f"the TPU kernel; verify at most {block} tokens."
        )
    starts = range(0, count, block)
    mixed = [attend(q[:, start : start + block], k, v, lengths + start) for start in starts]
    return jnp.concatenate(mixed, axis=1)


class Reach(NamedTuple):
    """Which keys of packed rows the queries see: those of their segment up to a last one."""

    segments: jax.Array  # [B, T] int32, of the queries
    last: jax.Array  # [B, T] int32, index of the last key that a query sees
    key_segments: jax.Array  # [B, S] int32


def reach(segment_ids: jax.Array) -> Reach:
    """Causal attention inside the segments of whole rows, from segment ids [B, T]."""
    segments = separated(segment_ids)
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    return Reach(segments, jnp.broadcast_to(places, segments.shape), segments)


def separated(segment_ids: jax.Array) -> jax.Array:
    """Segment ids [B, T] with each token of padding in a segment of its own.

    Padding then sees itself, so that no softmax is empty: 0 0 1 -1 -1 becomes 0 0 1 -5 -6.
    """
    alone = INVALID - 1 - jnp.arange(segment_ids.shape[1], dtype=segment_ids.dtype)
    return jnp.where(segment_ids == INVALID, alone, segment_ids)


def packed_mask(seen: Reach) -> jax.Array:
    """Which query sees which key, [B, T, S] bool; `packed` makes it for a block of queries.

    For whole rows, `reach` of segment ids 0 0 1 1 -1, it is

        1 . . . .
        1 1 . . .
        . . 1 . .
        . . 1 1 .
        . . . . 1
    """
    same = seen.segments[:, :, None] == seen.key_segments[:, None, :]
    return same & (jnp.arange(seen.key_segments.shape[1]) <= seen.last[..., None])


def packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: Reach,
    *,
    own: Sequence[tuple[jax.Array, jax.Array]] = (),
) -> jax.Array:
    """Attention inside packed rows of S tokens, of all of them or of T chosen ones.

    With T = S no query may see a later key. Stretches of queries then read keys up to their own end
    only, which skips nearly half of the scores. Scores that do not fit a block of `blocks` are made
    and forgotten in blocks inside the stretches, of which there are few, however long the row.

    Args:
      q: queries [B, T, N, H].
      k: keys [B, S, K, H].
      v: values [B, S, K, H].
      seen: which keys the queries see.
      own: further (keys, values), [B, T, K, H] each, of which query t sees entry t alone.

    Returns:
      [B, T, N, H] in the dtype of `q`; the softmax is float32.
    """
    batch, count, heads, head_size = q.shape
    length, kv_heads = k.shape[1:3]
    grouped = q.reshape(batch, count, kv_heads, heads // kv_heads, head_size) * head_size**-0.5
    queries = (grouped, seen.segments, seen.last, tuple(own))
    size = blocks.size(count, batch * heads * length)
    # A stretch that is a single block would keep its scores.
    stretch = QUERY_BLOCK if size == count else max(2 * size, -(-count // STRETCHES))
    mixed = []
    for start in range(0, count, stretch):
        end = min(start + stretch, count)
        read = end if count == length else length
        attend = functools.partial(_attend, k[:, :read], v[:, :read], seen.key_segments[:, :read])
        here = jax.tree.map(lambda x, start=start, end=end: x[:, start:end], queries)
        mixed.append(blocks.over_tokens(attend, here, size))
    return jnp.concatenate(mixed, axis=1).reshape(q.shape)


def _attend(
    k: jax.Array,
    v: jax.Array,
    key_segments: jax.Array,
    q: jax.Array,
    segments: jax.Array,
    last: jax.Array,
    own: Sequence[tuple[jax.Array, jax.Array]],
) -> jax.Array:
    """Softmax attention of scaled grouped queries [B, T, K, G, H] over keys [B, S, K, H]."""
    mask = packed_mask(Reach(segments, last, key_segments))
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    for keys, _ in own:
        single = jnp.einsum("btkgh,btkh->bkgt", q, keys, preferred_element_type=jnp.float32)
        scores = jnp.concatenate([scores, single[..., None]], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    shared = weights[..., : k.shape[1]]
    out = jnp.einsum("bkgts,bskh->btkgh", shared, v, preferred_element_type=jnp.float32)
    for index, (_, values) in enumerate(own):
        weight = jnp.moveaxis(weights[..., k.shape[1] + index], 3, 1)  # [B, T, K, G]
        out = out + weight[..., None] * values[:, :, :, None]
    return out.astype(q.dtype)
