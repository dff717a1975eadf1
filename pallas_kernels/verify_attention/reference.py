"""verify_attention in plain jnp: what the kernels are tested against, and the CPU path."""

import jax
import jax.numpy as jnp

# Finite, so that a row that sees nothing (a broken caller) gives a number and not NaN.
MASKED_LOGIT = -1e30


def verify_attention_reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lengths: jax.Array,
    draft_mask: jax.Array | None = None,
) -> jax.Array:
    """Two batched matmuls and a masked softmax; arguments as in `api.verify_attention`.

    The G = N // K query heads of a kv head are stacked on the token axis, so each kv head is
    read by one matmul of G * T rows. The exponentials stay unnormalised until after the second
    matmul: dividing [.., H] costs less than dividing [.., S].
    """
    b, t, n, h = q.shape
    num_kv = k.shape[1]
    group = n // num_kv
    precision = matmul_precision(q.dtype)

    grouped = group_queries(q, num_kv)  # [B, K, G*T, H]
    logits = jnp.einsum(
        "bkth,bksh->bkts", grouped, k, precision=precision, preferred_element_type=jnp.float32
    )
    s = k.shape[2]
    visible = visible_positions(lengths, draft_mask, num_tokens=t, cache_size=s)  # [B, T, S]
    logits = jnp.where(
        visible[:, None, None],
        (h**-0.5) * logits.reshape(b, num_kv, group, t, s),
        MASKED_LOGIT,
    ).reshape(b, num_kv, group * t, s)

    weights = jnp.exp(logits - _max(logits))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkts,bksh->bkth",
        weights.astype(v.dtype),
        v,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return ungroup_queries(out / total, t).astype(q.dtype)


def _max(logits: jax.Array) -> jax.Array:
    """Greatest entry of the last axis, [..., 1].

    `jnp.max` carries a NaN through, which XLA:CPU pays for in every comparison. Here a NaN may get
    lost, but its own exponential is one again.
    """

    def greater(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.select(a > b, a, b)

    found = jax.lax.reduce(logits, -jnp.inf, greater, (logits.ndim - 1,))
    return found[..., None]


def visible_positions(
    lengths: jax.Array, draft_mask: jax.Array | None, *, num_tokens: int, cache_size: int
) -> jax.Array:
    """Which cache positions each draft token sees, [B, T, S] bool.

    Args:
      lengths: committed positions [B] int32.
      draft_mask: [T, M] or [B, T, M] bool for M draft nodes, or None for a chain.
      num_tokens: T.
      cache_size: S.
    """
    node = jnp.arange(cache_size, dtype=jnp.int32) - lengths[:, None]  # [B, S]; < 0: committed
    if draft_mask is None:
        return node[:, None, :] <= jnp.arange(num_tokens, dtype=jnp.int32)[:, None]
    num_nodes = draft_mask.shape[-1]
    draft_mask = jnp.broadcast_to(draft_mask, (lengths.shape[0], num_tokens, num_nodes))
    index = jnp.clip(node, 0, num_nodes - 1)[:, None, :]  # [B, 1, S]
    drafted = jnp.take_along_axis(draft_mask, index, axis=2, mode="clip")  # [B, T, S]
    return (node < 0)[:, None] | (drafted & (node < num_nodes)[:, None])


def group_queries(q: jax.Array, num_kv: int) -> jax.Array:
    """Stacks the query heads of one kv head: [B, T, N, H] -> [B, K, G*T, H], row `g * T + t`."""
    b, t, n, h = q.shape
    q = q.reshape(b, t, num_kv, n // num_kv, h)
    return q.transpose(0, 2, 3, 1, 4).reshape(b, num_kv, (n // num_kv) * t, h)


def ungroup_queries(out: jax.Array, num_tokens: int) -> jax.Array:
    """Undoes `group_queries`: [B, K, G*T, H] -> [B, T, N, H]."""
    b, num_kv, rows, h = out.shape
    group = rows // num_tokens
    out = out.reshape(b, num_kv, group, num_tokens, h)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, num_tokens, num_kv * group, h)


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 inputs get float32 products everywhere (no TF32, no bfloat16 passes)."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
