"""The drafter: one EAGLE layer (arXiv 2401.15077) on the target's features.

The target's feature h[t] is its final hidden state after token x[t]; it predicts x[t + 1]. The
drafter reads pair t = (h[t], embedding of x[t + 1]) and gives an estimate of h[t + 1], which the
target's own head turns into a guess at x[t + 2]:

    pair        0          1          2
    feature     h0         h1         h2
    token       x1         x2         x3
    output      ~h1        ~h2        ~h3
    guesses     x2         x3         x4

`training_pairs` is the one place where pairs are made for training; at inference the same rule is
applied to the feature buffer (`speculation`). Embedding and head belong to the target and come in
as read-only arguments: the drafter's own tree holds neither.

Where the features hold several hidden states (`PolicyConfig.feature_layers`), the drafter first
reads them into one (EAGLE-3, arXiv 2503.01840, section 3.1); its own estimates need no reading.
Axes as in `policy`; F is the feature width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tlt_jax import attention, blocks, kv_cache, policy
from tlt_jax.config import DrafterConfig, PolicyConfig
from tlt_jax.kv_cache import LayerCache
from tlt_jax.sharding import ParamSpec, tree_init
from tlt_jax.types import INVALID

Params = Any


@struct.dataclass
class Pairs:
    """Drafter inputs and targets of packed rows, T = row length."""

    features: jax.Array  # [B, T, F], h[t]
    next_tokens: jax.Array  # [B, T] int32, x[t + 1]
    target_features: jax.Array  # [B, T, F], h[t + 1]
    weights: jax.Array  # [B, T] float32, 1 where pair t and its target lie in one segment


def param_specs(config: PolicyConfig, drafter: DrafterConfig) -> Params:
    """Declares the drafter's own parameters."""
    width = config.width
    parts = 1 + len(config.feature_layers)
    read = {
        "read_norm": ParamSpec((parts, width), (None, "width"), None),
        "read": ParamSpec((parts, width, width), (None, None, "width"), (parts * width) ** -0.5),
    }
    return (read if parts > 1 else {}) | {
        "feature_norm": ParamSpec((width,), ("width",), None),
        "token_norm": ParamSpec((width,), ("width",), None),
        "fuse": ParamSpec((2, width, width), (None, None, "width"), (2 * width) ** -0.5),
        "layer": policy.layer_specs(config, drafter.ffn_width, 1),
        "norm": ParamSpec((width,), ("width",), None),
    }


def init(config: PolicyConfig, drafter: DrafterConfig, key: jax.Array) -> Params:
    """Random drafter parameters in the policy's dtype."""
    return tree_init(param_specs(config, drafter), key, jnp.dtype(config.dtype))


def empty_cache(config: PolicyConfig, rows: int, length: int) -> LayerCache:
    """The drafter's cache: slot t holds pair t."""
    dtype = jnp.dtype(config.dtype)
    return kv_cache.empty(rows, config.num_kv_heads, length, config.head_size, dtype)


def read(params: Params, config: PolicyConfig, features: jax.Array) -> jax.Array:
    """What the drafter takes of the target's features [B, T, F]: [B, T, D]."""
    if not config.feature_layers:
        return features
    parts = features.reshape(*features.shape[:-1], -1, config.width)
    normed = policy.rms_norm(parts, params["read_norm"], config.norm_eps)
    return normed.reshape(features.shape) @ params["read"].reshape(-1, config.width)


def widened(params: Params, config: PolicyConfig) -> Params:
    """A drafter of the last hidden state as one that reads `config.feature_layers`, too.

    It gives the same estimates until training makes use of them: the last part alone is read, and
    the norm that follows takes away what norming that part once more has changed in scale.
    """
    parts, width = 1 + len(config.feature_layers), config.width
    dtype = params["norm"].dtype
    read = jnp.zeros((parts, width, width), dtype).at[-1].set(jnp.eye(width, dtype=dtype))
    return {"read_norm": jnp.ones((parts, width), dtype), "read": read} | params


def _fuse(
    params: Params, config: PolicyConfig, features: jax.Array, embedded: jax.Array
) -> jax.Array:
    """Drafter input [B, T, D] from features and next-token embeddings, both [B, T, D]."""

    def fuse(features: jax.Array, embedded: jax.Array) -> jax.Array:
        feature_part = policy.rms_norm(features, params["feature_norm"], config.norm_eps)
        token_part = policy.rms_norm(embedded, params["token_norm"], config.norm_eps)
        return feature_part @ params["fuse"][0] + token_part @ params["fuse"][1]

    size = blocks.size(features.shape[1], 2 * config.width)
    return blocks.over_tokens(fuse, (features, embedded), size)


def decode(
    params: Params,
    config: PolicyConfig,
    features: jax.Array,
    embedded: jax.Array,
    cache: LayerCache,
    lengths: jax.Array,
    *,
    draft_mask: jax.Array | None = None,
    first_node: int = 0,
    depth: int = 0,
) -> tuple[jax.Array, LayerCache]:
    """Feeds T pairs per row against the drafter's cache: a chain, or one level of a draft tree.

    Args:
      params: drafter parameters.
      config: the policy's shape.
      features: what was read of h[t] of each pair, or the drafter's estimate of it, [B, T, D].
      embedded: target embedding of x[t + 1], [B, T, D].
      cache: the drafter's cache.
      lengths: index of the first pair, [B] int32; pairs go to slots `lengths + first_node` and on.
      draft_mask: which new pair sees which of a tree's nodes, [B, T, first_node + T] bool; None
        says that the pairs follow one another.
      first_node: draft nodes that are in the cache already.
      depth: draft depth of the first new pair, of all of them in a tree; the position of a pair is
        `lengths` plus its depth.

    Returns:
      Estimated features ~h[t + 1], [B, T, D], and the written cache.
    """
    count = features.shape[1]
    positions = lengths[:, None] + jnp.full(count, depth, jnp.int32)
    if draft_mask is None:
        positions = positions + jnp.arange(count, dtype=jnp.int32)
    written = []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        mixed, new = attention.cached(
            q,
            k,
            v,
            cache,
            lengths,
            draft_mask=draft_mask,
            first_node=first_node,
            backend=config.attention_backend,
        )
        written.append(new)
        return mixed

    x = _fuse(params, config, features, embedded)
    x = policy.layer(params["layer"], config, x, policy.rotation_of(config, positions), attend)
    return policy.rms_norm(x, params["norm"], config.norm_eps), written[0]


def training_pairs(tokens: jax.Array, features: jax.Array, segment_ids: jax.Array) -> Pairs:
    """Pairs of packed rows: tokens [B, T], features [B, T, F], segment ids [B, T].

    Pair t is used where t + 1 lies in the same segment, and its target feature exists there. The
    last token of a finished sequence was never fed to the target, so its feature is missing; the
    buffer leaves that token out of the segment.
    """

    def after(x: jax.Array, fill: float) -> jax.Array:
        return jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], fill)], axis=1)

    following = after(segment_ids, INVALID)
    return Pairs(
        features=features,
        next_tokens=after(tokens, 0),
        target_features=after(features, 0),
        weights=((following == segment_ids) & (segment_ids != INVALID)).astype(jnp.float32),
    )


def packed_steps(
    params: Params,
    config: PolicyConfig,
    features: jax.Array,
    embedded: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    starts: jax.Array,
    *,
    count: int,
    steps: int,
) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """What the drafter gives at draft depth 1 .. `steps`, at `count` places of packed rows at once.

    At depth 1 pair t has the target's feature h[t]. At depth j + 1 it has the drafter's own
    estimate of h[t], made at depth j, and sees the pairs that inference would show it: true ones up
    to t - j, then its own, one of each depth (HASS, arXiv 2408.15766; training-time test of
    EAGLE-3, arXiv 2503.01840):

        depth 1    t0 t1 t2 [t3]              t = from the target's features
        depth 2    t0 t1 t2 [a3]              a = from estimates of depth 1
        depth 3    t0 t1 a2 [b3]              b = from estimates of depth 2

    All true pairs of a row give keys and values; whatever is wider is computed for the places
    `starts .. starts + count - 1` alone, so a part of a row is trained with all that it sees.

    Args:
      params: drafter parameters.
      config: the policy's shape.
      features: h[t], [B, T, F].
      embedded: target embeddings of x[t + 1], [B, T, D].
      positions: [B, T] int32.
      segment_ids: [B, T] int32.
      starts: first place in each row, [B] int32.
      count: places per row; `starts + count` must not pass T.
      steps: how many depths.

    Returns:
      Per depth the estimates ~h[t + 1], [B, count, D], and where they exist, [B, count] bool: the
      pairs of a draft lie in one segment, and among the places.
    """

    def cut(x: jax.Array) -> jax.Array:
        return kv_cache.take_rows(x, starts, count)

    inputs = _fuse(params, config, read(params, config, features), embedded)
    rotation = policy.rotation_of(config, positions)
    keys, values = policy.keys_and_values(params["layer"], config, inputs, rotation)
    separated = attention.separated(segment_ids)
    place = starts[:, None] + jnp.arange(count)
    rotation = policy.rotation_of(config, cut(positions))
    x, embedded, segments = cut(inputs), cut(embedded), cut(segment_ids)
    own: list[tuple[jax.Array, jax.Array]] = []  # keys and values of each depth beyond the first
    results: list[tuple[jax.Array, jax.Array]] = []
    for back in range(steps):
        exists = (_shift(segments, back) == segments) & (jnp.arange(count) >= back)
        seen = attention.Reach(cut(separated), place - back, separated)

        def attend(q, k, v, back=back, seen=seen):
            if back > 0:
                own.append((k, v))
            moved = [
                (_shift(k, back - depth), _shift(v, back - depth))
                for depth, (k, v) in enumerate(own, start=1)
            ]
            return attention.packed(q, keys, values, seen, own=moved)

        x = policy.layer(params["layer"], config, x, rotation, attend)
        estimates = policy.rms_norm(x, params["norm"], config.norm_eps)
        results.append((estimates, exists))
        x = _fuse(params, config, _shift(estimates, 1), embedded)
    return tuple(results)


def _shift(x: jax.Array, count: int) -> jax.Array:
    """Entry t becomes what was entry t - count of [B, T, ...]; zeros come in."""
    widths = [(0, 0), (count, 0)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths)[:, : x.shape[1]]
