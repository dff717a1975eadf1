"""Programs that make, refill, shrink and lengthen the rows in flight between chunks.

Each is one SPMD program over the whole mesh: a `shard_map`, manual over `slice` and automatic over
`tensor`; inside, arrays are those of one slice.

Axes: B rows of all slices, F rows of all slices that begin anew, S cache length, P padded prompt
length.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tlt_jax import drafter, policy, sharding
from tlt_jax.config import PolicyConfig
from tlt_jax.drafting import Models
from tlt_jax.kv_cache import LayerCache
from tlt_jax.sharding import SLICE
from tlt_jax.speculation import RolloutState, make_draft_cache
from tlt_jax.types import INVALID


def state_shardings(mesh: Mesh, *, keep_features: bool) -> RolloutState:
    """Shardings of the rows in flight: rows over slices, kv heads over the tensor axis.

    A prefix tree: `cache` has one entry for all layers.
    """
    rows = sharding.per_slice(mesh)
    axes = ("rows", "kv_heads", None, None)
    heads = NamedSharding(mesh, sharding.spec(axes, sharding.ROLLOUT_RULES))
    held: dict[str, Any] = dict.fromkeys((f.name for f in dataclasses.fields(RolloutState)), rows)
    held["cache"] = heads
    held["features"] = rows if keep_features else None
    held["draft_cache"] = heads if keep_features else None
    return RolloutState(**held)


def slice_program(function: Callable[..., Any], mesh: Mesh, specs: Any, out: Any) -> Any:
    """`function` of one slice's arrays as a function of all slices'."""
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=out, axis_names={SLICE}, check_vma=False
    )


def empty_rows(
    config: PolicyConfig, rows: int, length: int, *, keep_features: bool
) -> RolloutState:
    """Rows of padding in caches of `length`."""
    number, nobody = jnp.zeros((rows,), jnp.int32), jnp.full((rows,), INVALID, jnp.int32)
    features = jnp.zeros((rows, length, config.feature_width), config.dtype)
    return RolloutState(
        tokens=jnp.zeros((rows, length), jnp.int32),
        log_probs=jnp.zeros((rows, length), jnp.float32),
        cache=policy.empty_cache(config, rows, length),
        features=features if keep_features else None,
        draft_cache=drafter.empty_cache(config, rows, length) if keep_features else None,
        length=number,
        draft_length=number,
        limit=number,
        live=jnp.zeros((rows,), bool),
        stored=jnp.ones((rows,), bool),
        sequence_ids=nobody,
        prompt_ids=nobody,
    )


def prefill_program(mesh: Mesh, config: PolicyConfig, *, length: int, keep_features: bool) -> Any:
    """Program `(target, tokens [B, P], lengths, limits, sequence ids, prompt ids) -> RolloutState`.

    The last four are [B] int32. Prompts are padded on the right; what the padding writes is
    overwritten by the first rounds. `length` is the cache length; without `keep_features` no
    trained drafter can take part.
    """

    begin = functools.partial(_begin, config, length=length, keep_features=keep_features)
    return jax.jit(
        slice_program(begin, mesh, (P(), *[P(SLICE)] * 5), P(SLICE)),
        out_shardings=state_shardings(mesh, keep_features=keep_features),
    )


def _begin(
    config: PolicyConfig,
    target: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    limits: jax.Array,
    sequence_ids: jax.Array,
    prompt_ids: jax.Array,
    *,
    length: int,
    keep_features: bool,
) -> RolloutState:
    """Rows of new prompts on one slice, in caches of `length`; see `prefill_program`."""
    rows, prompt = tokens.shape
    empty = empty_rows(config, rows, length, keep_features=keep_features)
    _, features, cache = policy.decode(target, config, tokens, empty.cache, empty.length)

    def widen(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, length - prompt)] + [(0, 0)] * (x.ndim - 2))

    return dataclasses.replace(
        empty,
        tokens=widen(tokens),
        cache=cache,
        features=widen(features) if keep_features else None,
        length=lengths,
        draft_length=jnp.full_like(lengths, -length),
        limit=limits,
        live=sequence_ids >= 0,
        stored=sequence_ids < 0,
        sequence_ids=sequence_ids,
        prompt_ids=prompt_ids,
    )


def refill_program(mesh: Mesh, config: PolicyConfig, *, keep_features: bool) -> Any:
    """Program `(target, drafter parameters, RolloutState, slots [F], tokens [F, P], lengths,
    limits, sequence ids, prompt ids) -> RolloutState` that puts new prompts into slots.

    The last four are [F] int32. `slots` [F] int32 are rows of the slice; where there is nothing to
    put, one beyond the last. The rows are donated. Without `keep_features` the drafter's parameters
    are None.
    """

    def refill(target, draft, state, slots, tokens, *numbers):
        length = tokens.shape[1]
        new = _begin(config, target, tokens, *numbers, length=length, keep_features=keep_features)
        if keep_features:  # or the next chunk would make the drafter's cache of all rows anew
            models = Models(target, sharding.cast(draft, config.dtype))
            new = make_draft_cache(models, config, new)

        def put(whole: jax.Array, own: jax.Array) -> jax.Array:
            return whole.at[slots, *map(slice, own.shape[1:])].set(own, mode="drop")

        return jax.tree.map(put, state, new)

    specs = (P(), P(), *[P(SLICE)] * 7)
    return jax.jit(
        slice_program(refill, mesh, specs, P(SLICE)),
        donate_argnums=2,
        out_shardings=state_shardings(mesh, keep_features=keep_features),
    )


def shrink_program(mesh: Mesh, *, rows: int, keep_features: bool) -> Any:
    """Program `RolloutState -> RolloutState` that keeps `rows` rows per slice, live ones first."""

    def shrink(state: RolloutState) -> RolloutState:
        order = jnp.argsort(~state.live, stable=True)[:rows]
        return jax.tree.map(lambda x: x[order], state)

    return jax.jit(
        slice_program(shrink, mesh, (P(SLICE),), P(SLICE)),
        out_shardings=state_shardings(mesh, keep_features=keep_features),
    )


def grow_program(mesh: Mesh, *, length: int, keep_features: bool) -> Any:
    """Program `RolloutState -> RolloutState` that lengthens every cache to `length`."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, length - x.shape[axis])
        return jnp.pad(x, widths)

    def pad_cache(cache: LayerCache) -> LayerCache:
        return LayerCache(k=pad(cache.k, 2), v=pad(cache.v, 2))

    def grow(state: RolloutState) -> RolloutState:
        return dataclasses.replace(
            state,
            tokens=pad(state.tokens, 1),
            log_probs=pad(state.log_probs, 1),
            cache=tuple(pad_cache(layer) for layer in state.cache),
            features=None if state.features is None else pad(state.features, 1),
            draft_cache=None if state.draft_cache is None else pad_cache(state.draft_cache),
        )

    return jax.jit(
        slice_program(grow, mesh, (P(SLICE),), P(SLICE)),
        out_shardings=state_shardings(mesh, keep_features=keep_features),
    )
