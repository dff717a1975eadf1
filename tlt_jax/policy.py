"""The policy: one decoder for Qwen2/2.5, Qwen3 and Llama 3, as pure functions on a pytree.

Axes: B rows, T tokens, S cache length, N heads, K kv heads, G = N / K query heads per kv head,
H head size, D width, F feed-forward width, V vocabulary.

Parameters are `{"embed": [V, D], "layers": (layer, ...), "norm": [D], "head": [D, V]}`; `head` is
missing when embeddings are tied. Queries, keys and values of a kv head lie together in `qkv`
[D, K, G + 2, H], so that one matmul makes them and one axis shards them.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlt_jax import attention, blocks, kv_cache, rope
from tlt_jax.config import PolicyConfig
from tlt_jax.kv_cache import LayerCache
from tlt_jax.sharding import ParamSpec, tree_init

Params = Any
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


def layer_specs(config: PolicyConfig, ffn_width: int, num_layers: int) -> dict[str, ParamSpec]:
    """Declares one decoder layer; `num_layers` scales down what is added to the residual."""
    width, group, size = config.width, config.group, config.head_size
    kv_heads = config.num_kv_heads
    inner = 1 / (2 * num_layers)  # a deep stack begins near the identity, and learns sooner
    specs = {
        "attention_norm": ParamSpec((width,), ("width",), None),
        "qkv": ParamSpec(
            (width, kv_heads, group + 2, size), ("width", "kv_heads", None, None), width**-0.5
        ),
        "out": ParamSpec(
            (kv_heads, group, size, width),
            ("kv_heads", None, None, "width"),
            inner * (config.num_heads * size) ** -0.5,
        ),
        "ffn_norm": ParamSpec((width,), ("width",), None),
        "gate_up": ParamSpec((width, 2, ffn_width), ("width", None, "ffn"), width**-0.5),
        "down": ParamSpec((ffn_width, width), ("ffn", "width"), inner * ffn_width**-0.5),
    }
    if config.qkv_bias:
        specs["qkv_bias"] = ParamSpec((kv_heads, group + 2, size), ("kv_heads", None, None), 0)
    if config.qk_norm:
        specs["q_norm"] = ParamSpec((size,), (None,), None)
        specs["k_norm"] = ParamSpec((size,), (None,), None)
    return specs


def param_specs(config: PolicyConfig) -> Params:
    """Declares every parameter: shape, logical axes, initial scale."""
    layer = layer_specs(config, config.ffn_width, config.num_layers)
    specs = {
        "embed": ParamSpec(
            (config.vocab_size, config.width), ("vocab", "width"), config.width**-0.5
        ),
        "layers": tuple(dict(layer) for _ in range(config.num_layers)),
        "norm": ParamSpec((config.width,), ("width",), None),
    }
    if not config.tie_embeddings:
        specs["head"] = ParamSpec(
            (config.width, config.vocab_size), ("width", "vocab"), config.width**-0.5
        )
    return specs


def init(config: PolicyConfig, key: jax.Array) -> Params:
    """Random parameters in `config.dtype`."""
    return tree_init(param_specs(config), key, jnp.dtype(config.dtype))


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis, computed in float32, returned in x's dtype.

    `gain` has x's trailing axes: [D], or one row of gains per head.
    """
    wide = x.astype(jnp.float32)
    scaled = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    gain = gain.reshape((1,) * (x.ndim - gain.ndim) + gain.shape).astype(jnp.float32)
    return (scaled * gain).astype(x.dtype)


def layer(
    params: dict[str, jax.Array],
    config: PolicyConfig,
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """One decoder layer on the residual stream [B, T, D].

    `attend(q [B, T, N, H], k [B, T, K, H], v [B, T, K, H])` returns [B, T, N, H]; it is where
    cached and packed attention differ.
    """
    batch, count, _ = x.shape
    with jax.named_scope("attention"):
        q, k, v = _project(params, config, x, rotation, config.group)
        q = q.reshape(batch, count, config.num_heads, config.head_size)
        mixed = attend(q, k, v).reshape(batch, count, -1)
    # Rows do not count here: a verifying pass of many should read the weights once.
    size = blocks.size(count, 2 * params["down"].shape[0])
    return blocks.over_tokens(functools.partial(_after_attention, params, config), (x, mixed), size)


def _after_attention(
    params: dict[str, jax.Array], config: PolicyConfig, x: jax.Array, mixed: jax.Array
) -> jax.Array:
    """The rest of a layer on the residual stream [B, T, D]; `mixed` is [B, T, N * H]."""
    with jax.named_scope("attention"):
        # Two-dimensional matmuls on purpose: from an einsum XLA:CPU permutes weights every token.
        x = x + mixed @ params["out"].reshape(-1, config.width)
    with jax.named_scope("ffn"):
        normed = rms_norm(x, params["ffn_norm"], config.norm_eps)
        gate_up = (normed @ params["gate_up"].reshape(config.width, -1)).reshape(
            *x.shape[:2], *params["gate_up"].shape[1:]
        )
        hidden = jax.nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]
        return x + hidden @ params["down"]


def _project(
    params: dict[str, jax.Array],
    config: PolicyConfig,
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    group: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [B, T, K, group, H], keys and values [B, T, K, H] of the residual stream [B, T, D].

    Of each kv head's query heads the last `group` are made.
    """
    first = config.group - group
    weights = params["qkv"][:, :, first:]

    def project(x: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, ...]:
        normed = rms_norm(x, params["attention_norm"], config.norm_eps)
        qkv = normed @ weights.reshape(config.width, -1)
        qkv = qkv.reshape(*x.shape[:2], *weights.shape[1:])  # [B, T, K, group + 2, H]
        if config.qkv_bias:
            qkv = qkv + params["qkv_bias"][None, None, :, first:]
        # Queries and the key of a kv head are normed and rotated as one array: fewer, larger ops.
        queries_and_key, v = qkv[:, :, :, :-1], qkv[:, :, :, -1]
        if config.qk_norm:
            gains = [params["q_norm"]] * group + [params["k_norm"]]
            queries_and_key = rms_norm(queries_and_key, jnp.stack(gains), config.norm_eps)
        rotated = rope.rotate(queries_and_key, cos, sin)
        return rotated[:, :, :, :-1], rotated[:, :, :, -1], v

    size = blocks.size(x.shape[1], math.prod(weights.shape[1:]))
    return blocks.over_tokens(project, (x, *rotation), size)


def keys_and_values(
    params: dict[str, jax.Array],
    config: PolicyConfig,
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """The keys and values [B, T, K, H] of one layer alone; `layer` gives the same to `attend`."""
    with jax.named_scope("attention"):
        _, k, v = _project(params, config, x, rotation, 0)
        return k, v


def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Embeddings [B, T, D] of tokens [B, T]."""
    return params["embed"][tokens]


def rotation_of(config: PolicyConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """RoPE cosines and sines of positions [B, T]."""
    freqs = rope.frequencies(config.head_size, config.rope_theta, config.rope_scaling)
    return rope.angles(positions, freqs)


def trunk(
    params: Params,
    config: PolicyConfig,
    tokens: jax.Array,
    positions: jax.Array,
    attend: Attend,
) -> tuple[jax.Array, jax.Array]:
    """Runs all layers.

    Args:
      params: policy parameters.
      config: their shape.
      tokens: [B, T] int32.
      positions: [B, T] int32.
      attend: `(layer index, q, k, v) -> [B, T, N, H]`.

    Returns:
      The final hidden states [B, T, D], normed, and the features [B, T, `config.feature_width`]:
      the residual stream after each of `config.feature_layers`, then the final hidden states.
    """
    x = embed(params, tokens)
    rotation = rotation_of(config, positions)
    chosen = {}
    for index, layer_params in enumerate(params["layers"]):

        def attend_here(q, k, v, index=index):
            return attend(index, q, k, v)

        x = layer(layer_params, config, x, rotation, attend_here)
        chosen[index] = x
    hidden = rms_norm(x, params["norm"], config.norm_eps)
    features = [*(chosen[index] for index in config.feature_layers), hidden]
    return hidden, jnp.concatenate(features, axis=-1)


def empty_cache(config: PolicyConfig, rows: int, length: int) -> tuple[LayerCache, ...]:
    """One empty `LayerCache` per layer."""
    dtype = jnp.dtype(config.dtype)
    return tuple(
        kv_cache.empty(rows, config.num_kv_heads, length, config.head_size, dtype)
        for _ in range(config.num_layers)
    )


def decode(
    params: Params,
    config: PolicyConfig,
    tokens: jax.Array,
    cache: tuple[LayerCache, ...],
    lengths: jax.Array,
    *,
    draft_mask: jax.Array | None = None,
    depths: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, tuple[LayerCache, ...]]:
    """Feeds T tokens per row against the cache: prefill, plain decoding and verification alike.

    Args:
      params: policy parameters.
      config: their shape.
      tokens: [B, T] int32.
      cache: one `LayerCache` per layer.
      lengths: tokens of each row in the cache already, [B] int32.
      draft_mask: which of the T tokens sees which ([T, T] or [B, T, T] bool); None is a chain.
      depths: tree depth of each token, [T] or [B, T] int32; None is a chain, 0 .. T - 1.

    Returns:
      Final hidden states and features as of `trunk`, and the written cache.
    """
    depths = jnp.arange(tokens.shape[1], dtype=jnp.int32) if depths is None else depths
    positions = lengths[:, None] + depths
    written = list(cache)

    def attend(index: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mixed, written[index] = attention.cached(
            q,
            k,
            v,
            written[index],
            lengths,
            draft_mask=draft_mask,
            backend=config.attention_backend,
        )
        return mixed

    hidden, features = trunk(params, config, tokens, positions, attend)
    return hidden, features, tuple(written)


def packed_forward(
    params: Params,
    config: PolicyConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Runs packed training rows, all arguments [B, T]; attention stays inside segments.

    Returns:
      Final hidden states and features as of `trunk`.
    """
    seen = attention.reach(segment_ids)

    def attend(_: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.packed(q, k, v, seen)

    return trunk(params, config, tokens, positions, attend)


def logits(params: Params, hidden: jax.Array) -> jax.Array:
    """Next-token logits [..., V] float32 from final hidden states [..., D]."""
    head = params["head"] if "head" in params else params["embed"].T
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)
