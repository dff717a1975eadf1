"""Which programs a rollout uses, launched from one pool and compiled before the first step.

A program is keyed by what changes its shapes or its code: strategy, whether idle slices train,
rows per slice and cache length.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tlt_jax import chunk, ngram, row_programs, sampling, sharding
from tlt_jax.bandit import CostModel
from tlt_jax.budget import NO_BLOCK, Block
from tlt_jax.buffer import DrafterBuffer
from tlt_jax.chunk import ChunkKind, ChunkOrders
from tlt_jax.config import DrafterConfig, PolicyConfig, RolloutConfig
from tlt_jax.controller import FRESH, Controller
from tlt_jax.ngram import Library
from tlt_jax.program_pool import ProgramPool, Recipe, abstract
from tlt_jax.speculation import RolloutState, Sampler
from tlt_jax.spot_training import DrafterState
from tlt_jax.types import Strategy


@dataclasses.dataclass(frozen=True)
class RolloutPrograms:
    """The programs of one configuration.

    `drafting` keeps a drafter and the target's features; without it decoding is plain and caches
    hold nothing more than plain decoding needs. `training` lets idle slices train the drafter.
    """

    mesh: Mesh
    policy: PolicyConfig
    rollout: RolloutConfig
    drafter: DrafterConfig
    drafting: bool
    training: bool
    pool: ProgramPool = dataclasses.field(default_factory=ProgramPool)

    @property
    def slices(self) -> int:
        return self.mesh.shape[sharding.SLICE]

    @property
    def first_rows(self) -> int:
        """Row bucket that a rollout starts in: its slots per slice."""
        return self.rollout.slots(self.slices)

    @property
    def refill_rows(self) -> int:
        """Slots per slice that one call of `refill` can fill."""
        return -(-self.first_rows // 4)

    @property
    def _refills(self) -> bool:
        """Whether slots are given to those who wait while others go on."""
        most = self.slices * self.first_rows
        return self.rollout.refill and self.rollout.num_sequences > most

    @property
    def buckets(self) -> tuple[int, ...]:
        """Row buckets that a rollout can come to, falling."""
        return tuple(rows for rows in self.rollout.row_buckets if rows <= self.first_rows)

    def least_length(self, rows: int) -> int:
        """Shortest caches of a row bucket: lengths grow as rows shrink, so few pairs compile."""
        lengths = self.rollout.length_buckets
        return lengths[min(self.buckets.index(rows), len(lengths) - 1)]

    def arms(self, rows: int) -> tuple[Strategy, ...]:
        """Strategies of the bucket of `rows` rows per slice."""
        return self.rollout.arms(rows) if self.drafting else (Strategy(),)

    @property
    def cost_model(self) -> CostModel:
        """What rounds are believed to cost before any was timed."""
        return CostModel(self.policy.num_layers, self.rollout.free_tokens)

    def price(self, rows: int) -> int | None:
        """Rounds in this bucket that a drafter microbatch costs; None where it is measured."""
        prices = self.drafter.rounds_per_microbatch
        return prices[self.rollout.row_buckets.index(rows)] if prices else None

    def sampler(self, key: jax.Array, stop_tokens: tuple[int, ...]) -> Sampler:
        """A step's sampler: key, temperature, filters and stop tokens as device data."""
        config = self.rollout
        made = Sampler(
            key=key,
            params=sampling.params_of(config),
            stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
            draft_noise=jnp.float32(config.shared_noise),
        )
        return jax.device_put(made, sharding.replicated(self.mesh))

    def orders(
        self,
        strategy: Strategy,
        *,
        rounds: int,
        index: int,
        controller: Controller = FRESH,
        give_up_below: float = 0.0,
        block: Block = NO_BLOCK,
    ) -> ChunkOrders:
        """Orders for one chunk of a strategy as device data."""
        known = FRESH if strategy.ngram else controller  # shares of votes are left as they are
        sharpness = np.asarray(known.sharpness(strategy.depth), np.float32)
        numbers = {
            "rounds": np.int32(rounds),
            "index": np.int32(index),
            "sharpness": sharpness,
            "give_up_below": np.float32(give_up_below),
            "block": np.int32(block.rounds),
            "microbatches": np.int32(block.microbatches),
        }
        return ChunkOrders(**jax.device_put(numbers, sharding.replicated(self.mesh)))

    def empty_library(self) -> Library | None:
        """A library for the n-gram drafter; None if no strategy uses one."""
        if not (self.drafting and self.rollout.uses_ngram):
            return None
        empty = ngram.empty_library(self.rollout.library_texts, self.rollout.length_buckets[-1])
        return jax.device_put(empty, sharding.replicated(self.mesh))

    def prefill(self, target: Any, batch: tuple[Any, ...]) -> RolloutState:
        """Rows of a new batch; see `row_programs.prefill_program` for the arguments."""
        return self.pool.get(self._prefill(target, batch))(target, *batch)

    def refill(
        self,
        target: Any,
        drafter_state: DrafterState | None,
        rows: RolloutState,
        begun: tuple[Any, ...],
    ) -> RolloutState:
        """Puts new prompts into slots; see `row_programs.refill_program` for the arguments."""
        draft = None if drafter_state is None else drafter_state.params
        arguments = (target, draft, rows, *begun)
        return self.pool.get(self._refill(arguments))(*arguments)

    def chunk_program(self, kind: ChunkKind, arguments: tuple[Any, ...]) -> Any:
        """The compiled program of a chunk; see `chunk.chunk_program` for the arguments."""
        return self.pool.get(self._chunk(kind, arguments))

    def compact(self, rows: RolloutState, most: int) -> RolloutState:
        """Live rows in the smallest bucket for `most` of them per slice, in caches as long as its.

        It goes from bucket to bucket, for which there are programs.
        """
        for bucket in self.buckets:
            if most <= bucket < rows.tokens.shape[0] // self.slices:
                rows = self.shrink(rows, bucket)
        while rows.tokens.shape[1] < self.least_length(rows.tokens.shape[0] // self.slices):
            rows = self.grow(rows)
        return rows

    def shrink(self, rows: RolloutState, bucket: int) -> RolloutState:
        """Keeps `bucket` rows per slice, the live ones first."""
        return self.pool.get(self._shrink(rows, bucket))(rows)

    def grow(self, rows: RolloutState) -> RolloutState:
        """Lengthens caches to the next length bucket."""
        return self.pool.get(self._grow(rows))(rows)

    def recipes(
        self,
        target: Any,
        drafter_state: DrafterState | None,
        buffer: DrafterBuffer | None,
        library: Library | None = None,
    ) -> list[Recipe]:
        """Of every program that a rollout can need, in about the order of the need."""
        held = abstract((target, drafter_state, buffer, library))
        found = [self._prefill(target, self._batch_shapes(self.first_rows))]
        for rows in self.buckets:
            for length in self.rollout.length_buckets:
                found += self._recipes(rows, length, held)
        return found

    def warm_up(self, *held: Any) -> None:
        """Compiles all `recipes`, whose arguments it takes."""
        self.pool.order(self.recipes(*held))
        self.pool.wait()

    # What programs are made of. What a key leaves out is the same throughout a run.

    def _recipes(self, rows: int, length: int, held: tuple[Any, ...]) -> list[Recipe]:
        """All that can run, or begin, with `rows` rows per slice in caches of `length`."""
        found, shapes = [], self._state_shapes(rows, length)
        if length >= self.least_length(rows):
            for kind in self._kinds(rows):
                found.append(self._chunk(kind, self.chunk_shapes(kind, rows, length, held)))
        if rows == self.first_rows and self._refills:
            target, drafter_state = held[:2]
            draft = None if drafter_state is None else drafter_state.params
            found.append(self._refill((target, draft, shapes, *self._refill_shapes())))
        if length != self.rollout.length_buckets[-1]:
            found.append(self._grow(shapes))
        if rows != self.buckets[-1]:
            found.append(self._shrink(shapes, self.buckets[self.buckets.index(rows) + 1]))
        return found

    def _kinds(self, rows: int) -> list[ChunkKind]:
        trainings = (False, True) if self.training else (False,)
        return [
            ChunkKind(arm, training=training) for arm in self.arms(rows) for training in trainings
        ]

    def _prefill(self, target: Any, batch: tuple[Any, ...]) -> Recipe:
        length = self.rollout.length_buckets[0]
        return Recipe(
            ("prefill", batch[0].shape, length),
            lambda: row_programs.prefill_program(
                self.mesh, self.policy, length=length, keep_features=self.drafting
            ),
            (target, *batch),
        )

    def _refill(self, arguments: tuple[Any, ...]) -> Recipe:
        return Recipe(
            ("refill", arguments[2].tokens.shape),
            lambda: row_programs.refill_program(
                self.mesh, self.policy, keep_features=self.drafting
            ),
            arguments,
        )

    def _chunk(self, kind: ChunkKind, arguments: tuple[Any, ...]) -> Recipe:
        _, _, buffer, library, sampler, _, rows = arguments
        held = buffer is not None, library and library.tokens.shape
        static = sampler.params.filtered, sampler.params.rejection
        return Recipe(
            ("chunk", kind, rows.tokens.shape, *held, *static),
            lambda: self._chunk_jit(kind),
            arguments,
        )

    def lowered_chunk(self, kind: ChunkKind, arguments: tuple[Any, ...]) -> jax.stages.Lowered:
        """The program of a chunk traced and not compiled, outside the pool."""
        return self._chunk_jit(kind).lower(*abstract(arguments))

    def _chunk_jit(self, kind: ChunkKind) -> Any:
        return chunk.chunk_program(
            self.mesh, self.policy, self.drafter, kind, keep_features=self.drafting
        )

    def _shrink(self, rows: Any, bucket: int) -> Recipe:
        return Recipe(
            ("shrink", rows.tokens.shape, bucket),
            lambda: row_programs.shrink_program(
                self.mesh, rows=bucket, keep_features=self.drafting
            ),
            (rows,),
        )

    def _grow(self, rows: Any) -> Recipe:
        longer = next(b for b in self.rollout.length_buckets if b > rows.tokens.shape[1])
        return Recipe(
            ("grow", rows.tokens.shape, longer),
            lambda: row_programs.grow_program(
                self.mesh, length=longer, keep_features=self.drafting
            ),
            (rows,),
        )

    # Abstract arguments, to compile for shapes that no array has yet.

    def chunk_shapes(
        self, kind: ChunkKind, rows: int, length: int, held: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Arguments of a chunk for `rows` rows per slice in caches of `length`.

        `held` are the target, drafter state, buffer and library, arrays or their shapes.
        """
        sampler = self.sampler(jax.random.key(0), (0,))
        orders = self.orders(kind.strategy, rounds=0, index=0)
        return *held, sampler, orders, self._state_shapes(rows, length)

    def _batch_shapes(self, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        count, split = self.slices * rows, sharding.per_slice(self.mesh)
        prompt = jax.ShapeDtypeStruct(
            (count, self.rollout.max_prompt_length), np.int32, sharding=split
        )
        number = jax.ShapeDtypeStruct((count,), np.int32, sharding=split)
        return (prompt, number, number, number, number)

    def _refill_shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        batch = self._batch_shapes(self.refill_rows)
        return (batch[1], *batch)  # slots are numbers, like lengths

    def _state_shapes(self, rows: int, length: int) -> Any:
        count, keeps = self.slices * rows, self.drafting
        shapes = jax.eval_shape(
            lambda: row_programs.empty_rows(self.policy, count, length, keep_features=keeps)
        )
        shardings = row_programs.state_shardings(self.mesh, keep_features=keeps)
        return jax.tree.map(
            lambda held, inner: jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=held), inner
            ),
            shardings,
            shapes,
        )
