"""The programs of a rollout, each one SPMD program over the whole mesh.

All are `shard_map`s, manual over `slice` and automatic over `tensor`: inside, arrays are those of
one slice. A slice with live rows runs rounds; rounds that it does not need, because nothing is
live, it spends on drafter microbatches. So roles are decided on the device, and a slice that falls
idle in the middle of a chunk trains for the rest of it.

Axes: B rows of all slices, S cache length, W buffer row length.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tlt_jax import buffer as buffer_lib
from tlt_jax import drafter, policy, sharding, spot_training
from tlt_jax.buffer import DrafterBuffer
from tlt_jax.config import DrafterConfig, PolicyConfig
from tlt_jax.kv_cache import LayerCache
from tlt_jax.sharding import SLICE
from tlt_jax.speculation import Models, RolloutState, RoundStats, run_rounds
from tlt_jax.spot_training import DrafterState
from tlt_jax.types import Strategy


@dataclasses.dataclass(frozen=True)
class ChunkKind:
    """What a chunk program is compiled for, its array shapes aside."""

    strategy: Strategy
    training: bool  # whether idle slices train and an update follows


@struct.dataclass
class ChunkOrders:
    """What the host decides for one chunk; data, so no value compiles anything."""

    rounds: jax.Array  # [] int32, most rounds
    index: jax.Array  # [] int32, of the chunk in its rollout; varies the microbatch draws


@struct.dataclass
class ChunkReport:
    """What the host reads after a chunk, one entry per slice."""

    stats: RoundStats  # leaves [slices, ...]
    microbatches: jax.Array  # [slices] int32, taken by the slice
    draft_loss: jax.Array  # [slices] float32, mean over all slices' pairs, NaN without training
    draft_version: jax.Array  # [slices] int32, drafter that drafted in this chunk


# Folded into the step's key for microbatch draws; sequence ids, folded in for tokens, stay below.
TRAINING_STREAM = 2**31 - 1


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


def _slice_program(function: Callable[..., Any], mesh: Mesh, specs: Any, out: Any) -> Any:
    return jax.shard_map(
        function, mesh=mesh, in_specs=specs, out_specs=out, axis_names={SLICE}, check_vma=False
    )


def prefill_program(mesh: Mesh, config: PolicyConfig, *, length: int, keep_features: bool) -> Any:
    """Program `(target, tokens [B, P], lengths [B], limits [B], sequence_ids [B]) -> RolloutState`.

    Prompts are padded on the right; what the padding writes is overwritten by the first rounds.
    `length` is the cache length; without `keep_features` no drafter can take part.
    """

    def prefill(target, tokens, lengths, limits, sequence_ids):
        rows, prompt = tokens.shape
        cache = policy.empty_cache(config, rows, length)
        start = jnp.zeros((rows,), jnp.int32)
        hidden, _, cache = policy.decode(target, config, tokens, cache, start)

        def widen(x: jax.Array) -> jax.Array:
            return jnp.pad(x, [(0, 0), (0, length - prompt)] + [(0, 0)] * (x.ndim - 2))

        return RolloutState(
            tokens=widen(tokens),
            log_probs=jnp.zeros((rows, length), jnp.float32),
            cache=cache,
            features=widen(hidden) if keep_features else None,
            draft_cache=drafter.empty_cache(config, rows, length) if keep_features else None,
            length=lengths,
            draft_length=jnp.full_like(lengths, -length),
            limit=limits,
            live=sequence_ids >= 0,
            stored=sequence_ids < 0,
            sequence_ids=sequence_ids,
        )

    return jax.jit(
        _slice_program(prefill, mesh, (P(), P(SLICE), P(SLICE), P(SLICE), P(SLICE)), P(SLICE)),
        out_shardings=state_shardings(mesh, keep_features=keep_features),
    )


def chunk_program(
    mesh: Mesh,
    config: PolicyConfig,
    drafter_config: DrafterConfig,
    kind: ChunkKind,
    *,
    keep_features: bool,
) -> Any:
    """Program `(target, drafter state, buffer, sampler, orders, rows) -> (drafter state, buffer,
    rows, ChunkReport)`.

    Buffer leaves have a leading axis of slices. The drafter that a chunk drafts with does not
    change inside it; the updated one comes out for the next chunk. Drafter state, buffer and rows
    are donated. Without a drafter, drafter state and buffer are None.
    """

    def chunk(target, state, buffer, sampler, orders, rows):
        with jax.named_scope("rollout"):
            draft = None if state is None else sharding.cast(state.params, config.dtype)
            models = Models(target=target, draft=draft)
            rows, stats = run_rounds(models, config, kind.strategy, sampler, rows, orders.rounds)
        version = jnp.int32(0) if state is None else state.version
        if buffer is not None:
            own = jax.tree.map(lambda x: x[0], buffer)
            own, rows = store_finished(own, rows)
            buffer = jax.tree.map(lambda x: x[None], own)
        microbatches, loss = jnp.int32(0), jnp.float32(jnp.nan)
        if kind.training:
            with jax.named_scope("spot_training"):
                spare = orders.rounds - stats.rounds
                key = jax.random.fold_in(sampler.key, TRAINING_STREAM)
                key = jax.random.fold_in(key, orders.index)
                state, microbatches, loss = train_in_spare_time(
                    config, drafter_config, target, state, own, key, spare
                )
        report = ChunkReport(
            stats=stats, microbatches=microbatches, draft_loss=loss, draft_version=version
        )
        return state, buffer, rows, jax.tree.map(lambda x: x[None], report)

    split = P(SLICE)
    specs = (P(), P(), split, P(), P(), split)
    by_slice = sharding.per_slice(mesh)
    return jax.jit(
        _slice_program(chunk, mesh, specs, (P(), split, split, split)),
        donate_argnums=(1, 2, 5),
        out_shardings=(
            sharding.replicated(mesh),
            by_slice,
            state_shardings(mesh, keep_features=keep_features),
            by_slice,
        ),
    )


def train_in_spare_time(
    config: PolicyConfig,
    drafter_config: DrafterConfig,
    target: Any,
    state: DrafterState,
    buffer: DrafterBuffer,
    key: jax.Array,
    spare_rounds: jax.Array,
) -> tuple[DrafterState, jax.Array, jax.Array]:
    """Turns rounds a slice does not run into microbatches, then updates alike on every slice.

    Returns:
      The updated state, microbatches taken by this slice, and the mean loss over all slices.
    """
    microbatches = spare_rounds // drafter_config.rounds_per_microbatch
    own = spot_training.accumulate(
        state.params,
        target,
        config,
        drafter_config,
        buffer,
        jax.random.fold_in(key, jax.lax.axis_index(SLICE)),
        microbatches,
    )
    taken = jnp.where(buffer.filled > 0, microbatches, 0)
    total = jax.lax.psum(own, SLICE)
    state = spot_training.apply(spot_training.optimizer(drafter_config), state, total)
    return state, taken, total.loss / total.weight


def store_finished(buffer: DrafterBuffer, rows: RolloutState) -> tuple[DrafterBuffer, RolloutState]:
    """Moves rows that ended into the slice's buffer, features included.

    The last token's feature was never computed, so length - 1 tokens are stored.
    """
    features = _present(rows.features)
    ended = ~rows.live & ~rows.stored
    buffer = jax.lax.cond(
        jnp.any(ended),
        lambda b: buffer_lib.insert_many(
            b, rows.tokens, features, jnp.where(ended, rows.length - 1, 0)
        ),
        lambda b: b,
        buffer,
    )
    return buffer, dataclasses.replace(rows, stored=rows.stored | ended)


def _present(features: jax.Array | None) -> jax.Array:
    assert features is not None, "rows without features cannot train a drafter"
    return features


def shrink_program(mesh: Mesh, *, rows: int, keep_features: bool) -> Any:
    """Program `RolloutState -> RolloutState` that keeps `rows` rows per slice, live ones first."""

    def shrink(state: RolloutState) -> RolloutState:
        order = jnp.argsort(~state.live, stable=True)[:rows]
        return jax.tree.map(lambda x: x[order], state)

    return jax.jit(
        _slice_program(shrink, mesh, (P(SLICE),), P(SLICE)),
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
        _slice_program(grow, mesh, (P(SLICE),), P(SLICE)),
        out_shardings=state_shardings(mesh, keep_features=keep_features),
    )


def empty_buffers(mesh: Mesh, config: PolicyConfig, drafter_config: DrafterConfig) -> DrafterBuffer:
    """One empty data buffer per slice, leaves [slices, ...]."""

    def make() -> DrafterBuffer:
        own = buffer_lib.empty(
            drafter_config.buffer_rows,
            drafter_config.row_length,
            config.width,
            jnp.dtype(config.dtype),
        )
        return jax.tree.map(lambda x: jnp.stack([x] * mesh.shape[SLICE]), own)

    return jax.jit(make, out_shardings=sharding.per_slice(mesh))()
