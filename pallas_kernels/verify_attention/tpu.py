"""verify_attention as a Pallas TPU kernel: online softmax over blocks of the cache.

Grid (B, K, S / block_s), the last axis innermost and sequential. One step holds all G * T query
rows of a kv head (the draft tokens of its G query heads) and one block of that head's cache, so
each cached key and value is read from HBM once. `lengths` is prefetched to SMEM: blocks that start
at or after `lengths[b] + M`, the last draft node's end, are not computed, and their block index is
clamped to the last needed one, which makes the pipeline skip their copies too. So cost follows the
live length, and S adds only the small fixed cost of its empty steps.

The draft mask reaches the kernel as bits, 32 draft nodes a word. The test of one cache position is
then a shift and an AND on the vector unit, for chains and trees alike, and no gather along lanes.

VMEM budget in bytes, for R = G * T padded to a tile, item = 2 (bfloat16) or 4 (float32), and H
padded to 128 lanes. Terms marked x 2 are double-buffered by the pipeline.

    term                      bytes                         R = 64, H = 128, block_s = 512, bfloat16
    k and v blocks      x 2   2 * 2 * block_s * H * item    512 KiB
    q and out blocks    x 2   2 * 2 * R * H * item           64 KiB
    draft mask words    x 2   2 * R * 128 * 4                64 KiB
    accumulator               R * H * 4                      32 KiB
    running max and sum       2 * R * 128 * 4                64 KiB
    logits, weights, mask     about 4 * R * block_s * 4     512 KiB
    total                                                   1.2 MiB

A kernel gets 16 MiB unless told otherwise. R = 1024 at the default block comes to 12 MiB and
compiles for v4 and v5e; R = 1536 (18 MiB) does not for v4: a smaller `block_s` is right there.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.verify_attention.reference import (
    MASKED_LOGIT,
    group_queries,
    matmul_precision,
    ungroup_queries,
)

DEFAULT_BLOCK_S = 512
_LANES = 128
_WORD_BITS = 32


def verify_attention_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    draft_mask: jax.Array | None = None,
    *,
    block_s: int = DEFAULT_BLOCK_S,
    interpret: bool = False,
) -> jax.Array:
    """The kernel behind `api.verify_attention(..., backend="tpu")`; same arguments and result.

    XLA cannot partition a Mosaic kernel: on a mesh, call it inside a `shard_map` that is manual
    over every axis by which an argument is sharded (rows over B, heads over N and K together).
    The result varies over the manual axes that q varies over. With `interpret`, JAX wants
    `check_vma=False` on that `shard_map`.

    Args:
      q: queries [B, T, N, H], unscaled, float32 or bfloat16.
      k: cached keys [B, K, S, H].
      v: cached values [B, K, S, H].
      lengths: committed cache positions [B] int32, `lengths[b] + M <= S`.
      draft_mask: [T, M] or [B, T, M] bool, true at each query's own node; None for a chain, M = T.
      block_s: cache positions per step. 512 keeps a copy (256 KiB of bfloat16 at H = 128) longer
        than the fixed cost of a step. Where it does not divide S, the largest smaller multiple of
        128 that does is taken.
      interpret: run the kernel body as jnp on any platform, for tests.

    Returns:
      Attention output [B, T, N, H] of q's dtype.

    Raises:
      ValueError: no block fits S.

    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1, the division moved to the end.
    """
    b, t, n, h = q.shape
    num_kv, s = k.shape[1:3]
    tile_rows = 8 * 4 // q.dtype.itemsize  # a tile packs 32-bit sublanes: 8 float32, 16 bfloat16
    block = _block_size(s, block_s, tile_rows)
    rows = n // num_kv * t
    padded_rows = pl.cdiv(rows, tile_rows) * tile_rows
    padding = ((0, 0), (0, padded_rows - rows), (0, 0))

    grouped = jnp.pad(group_queries(q, num_kv), ((0, 0), *padding))  # [B, K, R, H]
    if draft_mask is None:
        draft_mask = jnp.tril(jnp.ones((t, t), jnp.bool_))
    nodes = draft_mask.shape[-1]
    words = _mask_words(draft_mask)  # [B or 1, T, W]
    words = jnp.pad(jnp.tile(words, (1, n // num_kv, 1)), padding)  # [B or 1, R, W]

    def row_block(row, head, step, lengths):
        return row, head, 0, 0

    def cache_block(row, head, step, lengths):
        # lax.div, for `//` asks the default device for its TPU generation: no AOT compiles then.
        last = jnp.clip(jax.lax.div(lengths[row] + nodes - 1, block), 0, s // block - 1)
        return row, head, jnp.minimum(step, last), 0

    def words_block(row, head, step, lengths):
        return (row if words.shape[0] > 1 else 0), 0, 0

    spec_rows = pl.BlockSpec((None, None, padded_rows, h), row_block)
    spec_cache = pl.BlockSpec((None, None, block, h), cache_block)
    spec_words = pl.BlockSpec((None, padded_rows, words.shape[2]), words_block)
    out = pl.pallas_call(
        functools.partial(_kernel, num_nodes=nodes, scale=h**-0.5),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, num_kv, s // block),
            in_specs=[spec_rows, spec_cache, spec_cache, spec_words],
            out_specs=spec_rows,
            scratch_shapes=[
                pltpu.VMEM((padded_rows, 1), jnp.float32),
                pltpu.VMEM((padded_rows, 1), jnp.float32),
                pltpu.VMEM((padded_rows, h), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(
            grouped.shape, q.dtype, manual_axis_type=jax.typeof(grouped).manual_axis_type
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost_of_full_cache(grouped, k),
        interpret=interpret,
        name="verify_attention",
    )(lengths, grouped, k, v, words)
    return ungroup_queries(out[:, :, :rows], t)


def _kernel(
    lengths_ref: jax.Ref,  # [B] SMEM
    q_ref: jax.Ref,  # [R, H]
    k_ref: jax.Ref,  # [block_s, H]
    v_ref: jax.Ref,  # [block_s, H]
    words_ref: jax.Ref,  # [R, W]
    out_ref: jax.Ref,  # [R, H]
    max_ref: jax.Ref,  # [R, 1] largest logit so far
    sum_ref: jax.Ref,  # [R, 1] sum of exp(logit - max) so far
    acc_ref: jax.Ref,  # [R, H] sum of exp(logit - max) * v so far
    *,
    num_nodes: int,
    scale: float,
) -> None:
    length = lengths_ref[pl.program_id(0)]
    step = pl.program_id(2)
    start = step * k_ref.shape[0]

    @pl.when(step == 0)
    def _():
        max_ref[...] = jnp.full_like(max_ref, MASKED_LOGIT)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        acc_ref[...] = jnp.zeros_like(acc_ref)

    @pl.when(start < length + num_nodes)
    def _():
        precision = matmul_precision(q_ref.dtype)
        logits = jax.lax.dot_general(
            q_ref[...],
            k_ref[...],
            (((1,), (1,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )  # [R, block_s]
        node = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) + (start - length)
        logits = jnp.where(_visible(node, words_ref[...]), scale * logits, MASKED_LOGIT)

        # A row may see nothing in its first blocks: its weights are then exp(0) = 1, and the
        # first block in which it sees something multiplies that garbage by exp(-1e30) = 0.
        new_max = jnp.maximum(max_ref[...], jnp.max(logits, axis=1, keepdims=True))
        correction = jnp.exp(max_ref[...] - new_max)
        weights = jnp.exp(logits - new_max)
        max_ref[...] = new_max
        sum_ref[...] = correction * sum_ref[...] + jnp.sum(weights, axis=1, keepdims=True)
        acc_ref[...] = correction * acc_ref[...] + jax.lax.dot_general(
            weights.astype(v_ref.dtype),
            v_ref[...],
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = (acc_ref[...] / sum_ref[...]).astype(out_ref.dtype)


def _visible(node: jax.Array, words: jax.Array) -> jax.Array:
    """Bit `node` of each row's words, true where node < 0 (committed): [R, block_s] bool."""
    seen = (node < 0).astype(jnp.int32)
    for index in range(words.shape[1]):
        bit = node - index * _WORD_BITS
        in_word = (bit >= 0) & (bit < _WORD_BITS)
        shifted = jax.lax.shift_right_logical(
            jnp.broadcast_to(words[:, index : index + 1], node.shape),
            jnp.clip(bit, 0, _WORD_BITS - 1),
        )
        seen |= jnp.where(in_word, shifted & 1, 0)
    return seen == 1


def _mask_words(draft_mask: jax.Array) -> jax.Array:
    """Packs a draft mask [.., T, M] by 32 nodes a word, zero beyond M: [B or 1, T, W] int32."""
    if draft_mask.ndim == 2:
        draft_mask = draft_mask[None]
    num_nodes = draft_mask.shape[2]
    num_words = pl.cdiv(num_nodes, _WORD_BITS)
    bits = jnp.pad(draft_mask, ((0, 0), (0, 0), (0, num_words * _WORD_BITS - num_nodes)))
    bits = bits.reshape(*draft_mask.shape[:2], num_words, _WORD_BITS).astype(jnp.uint32)
    words = jnp.sum(bits << jnp.arange(_WORD_BITS, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32)


def _block_size(cache_size: int, block_s: int, tile_rows: int) -> int:
    """The largest usable block of at most `block_s` positions that divides S."""
    if cache_size <= block_s:
        return cache_size
    if block_s > 0 and cache_size % block_s == 0 and block_s % tile_rows == 0:
        return block_s
    for block in range(block_s // _LANES * _LANES, 0, -_LANES):
        if cache_size % block == 0:
            return block
    raise ValueError(
        f"verify_attention cannot cut a cache of S={cache_size} into blocks of block_s={block_s}: "
        f"make S a multiple of {_LANES} and block_s at least {_LANES}, or let block_s be a "
        f"multiple of {tile_rows} that divides S."
    )


def _cost_of_full_cache(grouped: jax.Array, k: jax.Array) -> pl.CostEstimate:
    """An upper bound for XLA's scheduler, as lengths are not known when it compiles."""
    b, num_kv, rows, h = grouped.shape
    pairs = b * num_kv * rows * k.shape[2]
    return pl.CostEstimate(
        flops=4 * pairs * h,
        transcendentals=pairs,
        bytes_accessed=2 * (grouped.size + k.size) * k.dtype.itemsize,
    )
