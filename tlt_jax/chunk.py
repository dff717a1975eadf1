"""The chunk program: up to R rounds of every slice as one SPMD program over the whole mesh.

It is a `shard_map`, manual over `slice` and automatic over `tensor`: inside, arrays are those of
one slice. In a chunk with training, rounds come in blocks: while slices with live rows run a block,
one with none takes drafter microbatches that last no longer (`budget`). After each block the slices
see whether anything is decoded anywhere, so training ends with the tail, in the middle of a chunk
too.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tlt_jax import buffer as buffer_lib
from tlt_jax import ngram, row_programs, sharding, spot_training
from tlt_jax.buffer import DrafterBuffer
from tlt_jax.config import DrafterConfig, PolicyConfig
from tlt_jax.drafting import Models
from tlt_jax.ngram import Library, Texts
from tlt_jax.sharding import SLICE
from tlt_jax.speculation import (
    RolloutState,
    RoundStats,
    Sampler,
    refresh_draft_cache,
    run_round,
    run_rounds,
    zero_stats,
)
from tlt_jax.spot_training import DrafterState, GradientSum
from tlt_jax.types import Strategy


@dataclasses.dataclass(frozen=True)
class ChunkKind:
    """What a chunk program is compiled for, its array shapes aside."""

    strategy: Strategy
    training: bool = False  # whether idle slices train and an update follows


@struct.dataclass
class ChunkOrders:
    """What the host decides for one chunk; data, so no value compiles anything."""

    rounds: jax.Array  # [] int32, most rounds
    index: jax.Array  # [] int32, of the chunk in its rollout; varies the microbatch draws
    sharpness: jax.Array  # [d] float32, one for each draft depth, see `trees`
    give_up_below: jax.Array  # [] float32, accept length; see `speculation.run_rounds`
    block: jax.Array  # [] int32, rounds of a block; 1 or more where idle slices train
    microbatches: jax.Array  # [] int32, that an idle slice takes in a block


@struct.dataclass
class ChunkReport:
    """What the host reads after a chunk, one entry per slice."""

    stats: RoundStats  # leaves [slices, ...]
    microbatches: jax.Array  # [slices] int32, taken by the slice
    draft_loss: jax.Array  # [slices] float32, mean over all slices' pairs, NaN without training
    draft_version: jax.Array  # [slices] int32, drafter that drafted in this chunk


REFERENCES = 4
"""Other responses to a row's prompt in which the n-gram drafter looks things up."""

# Folded into the step's key for microbatch draws; sequence ids, folded in for tokens, stay below.
TRAINING_STREAM = 2**31 - 1


def chunk_program(
    mesh: Mesh,
    config: PolicyConfig,
    drafter_config: DrafterConfig,
    kind: ChunkKind,
    *,
    keep_features: bool,
) -> Any:
    """Program `(target, drafter state, buffer, library, sampler, orders, rows) -> (drafter state,
    buffer, library, rows, ChunkReport)`.

    Buffer leaves have a leading axis of slices; the library, like the drafter, is the same on all
    of them. The drafter that a chunk drafts with does not change inside it; the updated one comes
    out for the next chunk, and so does the library with the responses that ended. Drafter state,
    buffer, library and rows are donated. Without a drafter, drafter state and buffer are None;
    without an n-gram drafter the library is.
    """
    chunk = functools.partial(_chunk, config, drafter_config, kind)
    split = P(SLICE)
    specs = (P(), P(), split, P(), P(), P(), split)
    by_slice = sharding.per_slice(mesh)
    return jax.jit(
        row_programs.slice_program(chunk, mesh, specs, (P(), split, P(), split, split)),
        donate_argnums=(1, 2, 3, 6),
        out_shardings=(
            sharding.replicated(mesh),
            by_slice,
            sharding.replicated(mesh),
            row_programs.state_shardings(mesh, keep_features=keep_features),
            by_slice,
        ),
    )


def _chunk(
    config: PolicyConfig,
    drafter_config: DrafterConfig,
    kind: ChunkKind,
    target: Any,
    state: DrafterState | None,
    buffer: DrafterBuffer | None,
    library: Library | None,
    sampler: Sampler,
    orders: ChunkOrders,
    rows: RolloutState,
) -> tuple[Any, ...]:
    """A chunk of one slice; see `chunk_program`."""
    models = Models(
        target=target,
        draft=None if state is None else sharding.cast(state.params, config.dtype),
        texts=_texts(kind.strategy, library, rows),
    )
    began = rows.live
    version = jnp.int32(0) if state is None else state.version
    with jax.named_scope("rollout"):
        rows = refresh_draft_cache(models, config, kind.strategy, rows)
    work = SliceWork(
        rows=rows,
        stats=zero_stats(kind.strategy),
        buffer=None if buffer is None else jax.tree.map(lambda x: x[0], buffer),
        total=None,
        microbatches=jnp.int32(0),
    )
    roll = functools.partial(_roll, models, config, kind.strategy, sampler, orders)
    loss = jnp.float32(jnp.nan)
    if kind.training:
        assert state is not None, "there is no drafter to train"
        work = dataclasses.replace(work, total=spot_training.zero_sum(state.params))
        key = jax.random.fold_in(sampler.key, TRAINING_STREAM)
        key = jax.random.fold_in(key, orders.index)
        train = functools.partial(_train, state.params, target, config, drafter_config, key)
        work = run_blocks(roll, train, orders, work)
        assert work.total is not None
        state, loss = _update(drafter_config, state, work.total)
    else:
        work = roll(work, orders.rounds)
    report = ChunkReport(
        stats=work.stats,
        microbatches=work.microbatches,
        draft_loss=loss,
        draft_version=version,
    )
    buffer = None if buffer is None else jax.tree.map(lambda x: x[None], work.buffer)
    if library is not None:
        library = _add_ended(library, work.rows, began & ~work.rows.live)
    return state, buffer, library, work.rows, jax.tree.map(lambda x: x[None], report)


def _texts(strategy: Strategy, library: Library | None, rows: RolloutState) -> Texts | None:
    """What the n-gram drafter looks things up in besides a row's own text; None for others."""
    if not strategy.ngram:
        return None
    assert library is not None, "no library for the n-gram drafter"
    own = rows.tokens, rows.length, rows.prompt_ids, rows.live
    return ngram.references(library, *own, count=REFERENCES)


def _add_ended(library: Library, rows: RolloutState, ended: jax.Array) -> Library:
    """Adds the rows that ended on any slice, in the same order on all of them."""
    own = rows.tokens, rows.length, rows.prompt_ids, ended
    return ngram.add(library, *(jax.lax.all_gather(x, SLICE, tiled=True) for x in own))


@struct.dataclass
class SliceWork:
    """What a chunk changes on one slice."""

    rows: RolloutState
    stats: RoundStats
    buffer: DrafterBuffer | None  # None without training in the run
    total: GradientSum | None  # None without training in this chunk
    microbatches: jax.Array  # [] int32, taken


def run_blocks(
    roll: Callable[[SliceWork, jax.Array], SliceWork],
    train: Callable[[SliceWork, jax.Array, jax.Array], SliceWork],
    orders: ChunkOrders,
    work: SliceWork,
) -> SliceWork:
    """Blocks of rounds; a slice with nothing live trains as long as the others decode.

    If its last row ends within a block, it takes the share of the block's microbatches that the
    rounds left are of the block: none of a single one. What is left of a chunk over a whole number
    of blocks is without training.

    Ends when all rounds are over or no slice has live rows that it still decodes: it may have
    given up on them for this chunk. Only a chunk in which nothing was live to begin with, for
    training between steps, takes all its blocks.

    Args:
      roll: `(work, rounds)`, runs until that many rounds have been run, nothing is live, or
        drafting is of no use.
      train: `(work, first, count)`, both [] int32, takes microbatches `first`, `first` + 1, ...
      orders: rounds of the chunk and of a block, and a block's microbatches.
      work: the slice's state.
    """

    def decodes_somewhere(work: SliceWork, due: jax.Array) -> jax.Array:
        decodes = jnp.any(work.rows.live) & (work.stats.rounds >= due)
        return jax.lax.psum(decodes.astype(jnp.int32), SLICE) > 0

    training_only = ~decodes_somewhere(work, jnp.int32(0))

    def more(carry: tuple[jax.Array, jax.Array, SliceWork]) -> jax.Array:
        index, wanted, _ = carry
        return wanted & (index * orders.block < orders.rounds)

    def body(
        carry: tuple[jax.Array, jax.Array, SliceWork],
    ) -> tuple[jax.Array, jax.Array, SliceWork]:
        index, _, work = carry
        start, end = index * orders.block, (index + 1) * orders.block
        due = jnp.minimum(end, orders.rounds)
        work = roll(work, due)
        left = end - jnp.maximum(work.stats.rounds, start)
        trains = ~jnp.any(work.rows.live) & (end <= orders.rounds)
        count = jnp.where(trains, left * orders.microbatches // orders.block, 0)
        work = train(work, index * orders.microbatches, count)
        return index + 1, training_only | decodes_somewhere(work, due), work

    return jax.lax.while_loop(more, body, (jnp.int32(0), jnp.bool_(True), work))[2]


def _roll(
    models: Models,
    config: PolicyConfig,
    strategy: Strategy,
    sampler: Sampler,
    orders: ChunkOrders,
    work: SliceWork,
    rounds: jax.Array,
) -> SliceWork:
    """Rounds until `rounds` have been run or nothing is live; then stores what ended."""
    step = functools.partial(run_round, models, config, strategy, sampler, orders.sharpness)
    with jax.named_scope("rollout"):
        rows, stats = run_rounds(step, work.rows, work.stats, rounds, orders.give_up_below)
    buffer = work.buffer
    if buffer is not None:
        buffer, rows = store_finished(buffer, rows)
    return dataclasses.replace(work, rows=rows, stats=stats, buffer=buffer)


def _train(
    params: Any,
    target: Any,
    config: PolicyConfig,
    drafter_config: DrafterConfig,
    key: jax.Array,
    work: SliceWork,
    first: jax.Array,
    count: jax.Array,
) -> SliceWork:
    """Microbatches from the slice's own buffer, if there is anything in it."""
    assert work.total is not None and work.buffer is not None, "this chunk does not train"
    key = jax.random.fold_in(key, jax.lax.axis_index(SLICE))
    with jax.named_scope("spot_training"):
        total, taken = spot_training.add_samples(
            work.total,
            params,
            target,
            config,
            drafter_config,
            work.buffer,
            key,
            first=first,
            count=count,
        )
    return dataclasses.replace(work, total=total, microbatches=work.microbatches + taken)


def _update(
    drafter_config: DrafterConfig, state: DrafterState, own: GradientSum
) -> tuple[DrafterState, jax.Array]:
    """The same update on every slice, by the mean gradient of all; gives the mean loss too."""
    with jax.named_scope("spot_training"):
        total = jax.lax.psum(own, SLICE)
        state = spot_training.apply(spot_training.optimizer(drafter_config), state, total)
        return state, total.loss / total.weight


def store_finished(buffer: DrafterBuffer, rows: RolloutState) -> tuple[DrafterBuffer, RolloutState]:
    """Moves rows that ended into the slice's buffer, features included if it stores them.

    The last token's feature was never computed, so length - 1 tokens are stored.
    """
    assert rows.features is not None, "rows without features cannot train a drafter"
    ended = ~rows.live & ~rows.stored
    features = None if buffer.features is None else rows.features
    buffer = buffer_lib.insert_each(buffer, rows.tokens, features, rows.length - 1, ended)
    return buffer, dataclasses.replace(rows, stored=rows.stored | ended)


def empty_buffers(mesh: Mesh, config: PolicyConfig, drafter_config: DrafterConfig) -> DrafterBuffer:
    """One empty data buffer per slice, leaves [slices, ...]."""

    def make() -> DrafterBuffer:
        own = buffer_lib.empty(drafter_config, config)
        return jax.tree.map(lambda x: jnp.stack([x] * mesh.shape[SLICE]), own)

    return jax.jit(make, out_shardings=sharding.per_slice(mesh))()
