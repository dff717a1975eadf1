"""The one entry point of the op: checks the arguments, then runs the backend the caller named."""

import jax
import jax.numpy as jnp

from pallas_kernels.verify_attention.reference import verify_attention_reference
from pallas_kernels.verify_attention.tpu import verify_attention_tpu

BACKENDS = ("reference", "tpu")


def verify_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    draft_mask: jax.Array | None = None,
    *,
    backend: str,
) -> jax.Array:
    """Lets T tokens of a draft tree attend to their row's KV cache.

    Query `t` of row `b` sees cache position `s` iff `s < lengths[b]` (committed), or
    `s == lengths[b] + u` for a draft node `u` with `draft_mask[..., t, u]`. Softmax is taken in
    float32 with scale `H ** -0.5`. Two committed positions and the tree 0 -> 1, 0 -> 2 give

        draft_mask   1 0 0      sees (S = 6)   1 1 1 0 0 0
                     1 1 0                     1 1 1 1 0 0
                     1 0 1                     1 1 1 0 1 0

    A tree of M nodes may be fed level by level: the queries are then some of its nodes, T < M, and
    the mask has the rows of these alone.

    Args:
      q: queries [B, T, N, H], unscaled, float32 or bfloat16.
      k: cached keys [B, K, S, H] of q's dtype, N a multiple of K; query head `n` reads kv head
        `n // (N // K)`. The draft nodes' keys are already at positions
        `lengths[b] .. lengths[b] + M - 1`. Everything beyond may hold any finite value.
      v: cached values [B, K, S, H] of q's dtype, laid out as `k`.
      lengths: committed cache positions before the draft nodes [B], int32, in tokens. The caller
        keeps `0 <= lengths[b]` and `lengths[b] + M <= S`: this is not checked (the values are
        known on the device only), and a row that breaks it gets a meaningless result.
      draft_mask: [T, M] or [B, T, M] bool with M >= T, true where a query meets its own node;
        `None` means a chain (M = T, lower triangular), which costs less.
      backend: "reference" (jnp, any platform) or "tpu" (Pallas kernel). Never chosen silently.

    Returns:
      Attention output [B, T, N, H] of q's dtype.

    Raises:
      ValueError: an unknown backend, or shapes or dtypes that do not fit together.

    Source: tree attention, SpecInfer (arXiv 2305.09781), section 4.
    """
    _check_arguments(q, k, v, lengths, draft_mask)
    match backend:
        case "reference":
            return verify_attention_reference(q, k, v, lengths, draft_mask)
        case "tpu":
            return verify_attention_tpu(q, k, v, lengths, draft_mask)
        case _:
            names = ", ".join(repr(name) for name in BACKENDS)
            raise ValueError(f"verify_attention has no backend {backend!r}: choose one of {names}.")


def _check_arguments(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    draft_mask: jax.Array | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            f"verify_attention needs q [B, T, N, H] and k [B, K, S, H], got {q.shape}, {k.shape}."
        )
    b, t, n, h = q.shape
    if k.shape != v.shape or k.shape[0] != b or k.shape[3] != h or n % k.shape[1]:
        raise ValueError(
            f"verify_attention needs k and v of one shape [B={b}, K, S, H={h}] with K dividing "
            f"N={n}, got k {k.shape} and v {v.shape}."
        )
    if q.dtype not in (jnp.float32, jnp.bfloat16) or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            "verify_attention needs q, k and v all float32 or all bfloat16, "
            f"got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    if lengths.shape != (b,) or lengths.dtype != jnp.int32:
        raise ValueError(
            f"verify_attention needs lengths [B={b}] int32, got {lengths.shape} {lengths.dtype}."
        )
    if draft_mask is not None and (
        draft_mask.shape[:-1] not in ((t,), (b, t))
        or not t <= draft_mask.shape[-1] <= k.shape[2]
        or draft_mask.dtype != jnp.bool_
    ):
        raise ValueError(
            f"verify_attention needs draft_mask [T={t}, M] or [B={b}, T={t}, M] bool with "
            f"{t} <= M <= S={k.shape[2]}, got {draft_mask.shape} {draft_mask.dtype}."
        )
