"""The rollout engine: the host side of generating one batch of responses.

Chunk after chunk it looks at a few numbers, picks rows and length buckets, strategy, rounds and
what idle slices train, and launches one compiled program. What it decides follows from token
counts, so all processes decide alike and a run can be repeated; only where a bucket has several
strategies, or microbatches no constant price, a clock has a say (`choice`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tlt_jax import bandit as bandit_lib
from tlt_jax import budget as budget_lib
from tlt_jax import dealing, seating, sharding
from tlt_jax.budget import Block
from tlt_jax.buffer import DrafterBuffer
from tlt_jax.canary import GoodDrafter
from tlt_jax.choice import Choice, choose, choose_between_steps
from tlt_jax.chunk import ChunkReport
from tlt_jax.controller import FRESH, Controller, calibrate, note_broken
from tlt_jax.ngram import Library
from tlt_jax.programs import RolloutPrograms
from tlt_jax.seating import Queue, Seats
from tlt_jax.speculation import PROVING_GUESSES, PROVING_ROUNDS, Sampler
from tlt_jax.spot_training import DrafterState
from tlt_jax.types import Strategy

# With so few live rows a slice may fall idle within a chunk; with more, the program without a
# training branch runs, and no gradients are reduced for nothing.
NEARLY_IDLE_ROWS = 2

BROKEN_BELOW = 1 / 3
"""A drafter is broken if so few of its first guesses are right in a chunk that gave up."""


@dataclasses.dataclass(frozen=True)
class Response:
    """A finished sequence."""

    sequence: int  # index in the step's batch
    tokens: np.ndarray  # [length] int32, prompt included
    log_probs: np.ndarray  # [length] float32, behaviour log-probabilities; 0 on the prompt
    prompt_length: int

    @property
    def response(self) -> np.ndarray:
        """The response's tokens, stop token included."""
        return self.tokens[self.prompt_length :]


@dataclasses.dataclass(frozen=True)
class ChunkRecord:
    """What was decided for a chunk and what came of it; lists have one entry per slice."""

    chunk: int
    start: float  # seconds since the rollout began, without waiting for programs
    seconds: float
    strategy: str
    chosen: str  # why, see `choice.Choice`
    give_up_below: float  # accept length at which the chunk was to end early
    block: Block  # what an idle slice was to train
    rows: int  # per slice
    length: int
    rounds: int  # asked for
    rounds_run: list[int]
    live: list[int]  # at the start
    roles: list[str]
    microbatches: list[int]
    committed: list[int]  # tokens
    row_rounds: list[int]  # live rows summed over rounds
    accepted: list[int]  # by draft position, all slices
    expected: list[float]  # the same as estimated by the scores of trees, 0 for chains
    draft_loss: float | None
    drafter_version: int


@dataclasses.dataclass(frozen=True)
class Carry:
    """What one rollout hands on to the next; None is what a configuration has no use for."""

    drafter: DrafterState | None  # None without drafting
    buffer: DrafterBuffer | None  # its data buffer, leaves [slices, ...]; None without training
    library: Library | None  # None where no strategy uses the n-gram drafter
    controller: Controller = FRESH  # what all chunks so far have taught
    good: GoodDrafter | None = None  # to fall back to between rollouts; None without training

    @property
    def arrays(self) -> tuple[DrafterState | None, DrafterBuffer | None, Library | None]:
        """What lies on the devices."""
        return self.drafter, self.buffer, self.library


@dataclasses.dataclass(frozen=True)
class RolloutResult:
    """A rollout that ended."""

    responses: list[Response]  # by sequence
    chunks: list[ChunkRecord]
    carry: Carry  # to go on with


@dataclasses.dataclass
class _Flight:
    """A rollout under way, on the host's side."""

    target: Any
    sampler: Sampler
    queue: Queue
    seats: Seats
    carry: Carry
    replay: Sequence[Choice] | None
    began: float  # by the pool's clock
    chunks: list[ChunkRecord]

    @property
    def controller(self) -> Controller:
        return self.carry.controller

    @controller.setter
    def controller(self, controller: Controller) -> None:
        self.carry = dataclasses.replace(self.carry, controller=controller)


def run(
    programs: RolloutPrograms,
    target: Any,
    carry: Carry,
    prompts: Sequence[np.ndarray],
    key: jax.Array,
    *,
    stop_tokens: tuple[int, ...],
    replay: Sequence[Choice] | None = None,
    on_finished: Callable[[Response], None] = lambda response: None,
) -> RolloutResult:
    """Generates one response per prompt.

    Args:
      programs: compiled programs and settings.
      target: policy parameters in rollout layout.
      carry: what the rollout before handed on; its arrays are donated.
      prompts: token ids of each sequence, [length] int32 each.
      key: the step's key; with the same key, weights and prompts come the same tokens.
      stop_tokens: any of these ends a response.
      replay: what to choose for each chunk instead of choosing anew.
      on_finished: called on this thread for each response as soon as it ended.

    Raises:
      UserError: a prompt is empty or longer than `max_prompt_length`, or the rollout to replay was
        another one.
    """
    began = programs.pool.clock()
    queue = seating.queue(programs, prompts, carry.controller.history)
    flight = _Flight(
        target=target,
        sampler=programs.sampler(key, stop_tokens),
        queue=queue,
        seats=seating.begin(programs, target, queue),
        carry=carry,
        replay=replay,
        began=began,
        chunks=[],
    )
    responses: dict[int, Response] = {}
    while queue.waiting or flight.seats.live.any():
        for response in _next_chunk(programs, flight):
            responses[response.sequence] = response
            on_finished(response)
    if programs.training and programs.slices == 1:
        _train_between_steps(programs, flight)
    ordered = [responses[sequence] for sequence in range(len(prompts))]
    given = ((prompt, len(r.response)) for prompt, r in zip(queue.asked.ids, ordered, strict=True))
    history = dealing.remember(carry.controller.history, given)
    flight.controller = dataclasses.replace(flight.controller, history=history)
    return RolloutResult(responses=ordered, chunks=flight.chunks, carry=flight.carry)


def _next_chunk(programs: RolloutPrograms, flight: _Flight) -> list[Response]:
    """Decides on and runs one chunk; returns the responses that ended in it.

    Where a slice is nearly idle, the program with training runs already, so that it trains in the
    very chunk in which it falls idle.
    """
    flight.seats = seating.seat(
        programs, flight.target, flight.carry.drafter, flight.queue, flight.seats
    )
    rows, live = flight.seats.bucket, flight.seats.live_by_slice
    nearly_idle = programs.slices > 1 and live.min() <= NEARLY_IDLE_ROWS
    flight.controller, choice = choose(
        programs,
        flight.controller,
        rows=rows,
        live=int(live.max()),
        trains=bool(programs.training and nearly_idle),
        replay=flight.replay,
        chunk=len(flight.chunks),
    )
    while (rounds := _room(programs, flight.seats, choice.strategy)) == 0:
        flight.seats = seating.grow(programs, flight.seats)
    was_live = flight.seats.live
    flight.chunks.append(_launch(programs, flight, choice, rounds))
    return _harvest(flight, was_live & ~flight.seats.live)


def _room(programs: RolloutPrograms, seats: Seats, strategy: Strategy) -> int:
    """Rounds to ask for; 0 when the caches should be lengthened first.

    A round writes up to `slack` positions beyond a row's length, for rows that ended as well.
    """
    wanted = programs.rollout.rounds(strategy)
    if seats.length == programs.rollout.length_buckets[-1]:
        return wanted
    room = seats.length - programs.rollout.slack - int(seats.lengths.max())
    room //= strategy.most_committed
    return 0 if room < math.ceil(wanted / 2) else min(room, wanted)


def _launch(programs: RolloutPrograms, flight: _Flight, choice: Choice, rounds: int) -> ChunkRecord:
    """Runs a chunk program, updates the flight, and records what happened."""
    before, carry = flight.seats.live_by_slice, flight.carry
    index, kind = len(flight.chunks), choice.kind
    orders = programs.orders(
        kind.strategy,
        rounds=rounds,
        index=index,
        controller=flight.controller,
        give_up_below=choice.give_up_below,
        block=choice.block,
    )
    arguments = (flight.target, *carry.arrays, flight.sampler, orders, flight.seats.rows)
    program = programs.chunk_program(kind, arguments)
    jax.block_until_ready(arguments)  # neither this nor compiling is part of the chunk's time
    shared = programs.pool.busy
    start = programs.pool.clock()
    drafter, buffer, library, rows, report = program(*arguments)
    flight.carry = dataclasses.replace(carry, drafter=drafter, buffer=buffer, library=library)
    told, still_live, lengths = sharding.to_host((report, rows.live, rows.length))
    flight.seats = Seats.of(rows, still_live, lengths, programs.slices)
    record = ChunkRecord(
        chunk=index,
        start=start - flight.began,
        seconds=programs.pool.clock() - start,
        strategy=str(kind.strategy),
        chosen=choice.why,
        give_up_below=choice.give_up_below,
        block=choice.block,
        rows=flight.seats.bucket,
        length=flight.seats.length,
        rounds=rounds,
        **_by_slice(told, before, training=kind.training),
    )
    flight.controller = taught(
        programs,
        flight.controller,
        kind.strategy,
        record,
        gave_up=bool(np.any((told.stats.rounds < rounds) & (flight.seats.live_by_slice > 0))),
        timed=not shared,
    )
    return record


def taught(
    programs: RolloutPrograms,
    controller: Controller,
    strategy: Strategy,
    record: ChunkRecord,
    *,
    gave_up: bool,
    timed: bool,
) -> Controller:
    """What a chunk teaches: how good the estimates of trees are, how fast its strategy is.

    How long its rounds are counts where microbatches are priced by it.

    `gave_up` says that it ended early because hardly a draft was accepted. Its time counts if it
    was `timed`: not while programs are compiled on the same cores.
    """
    rounds = sum(record.row_rounds)
    if not strategy.is_chain and not strategy.ngram:
        controller = calibrate(controller, rounds, record.accepted, record.expected)
    if timed and rounds and programs.training and programs.price(record.rows) is None:
        budget = budget_lib.time_rounds(
            controller.budget,
            record.rows,
            strategy,
            record.seconds,
            rounds_run=record.rounds_run,
            microbatches=record.microbatches,
        )
        controller = dataclasses.replace(controller, budget=budget)
    if rounds == 0 or len(programs.arms(record.rows)) == 1:
        return controller
    if timed:
        accept_length = sum(record.committed) / rounds
        bandit = bandit_lib.update(
            controller.bandit,
            record.rows,
            strategy,
            accept_length * record.rows * max(record.rounds_run) / record.seconds,
            accept_length=accept_length,
            gave_up=gave_up,
        )
        controller = dataclasses.replace(controller, bandit=bandit)
    proved = max(record.rounds_run) > PROVING_ROUNDS and max(record.row_rounds) > PROVING_GUESSES
    if strategy.is_plain or not (gave_up or proved):
        return controller  # it ended before it had to prove anything
    if gave_up and record.accepted[0] > BROKEN_BELOW * rounds:
        return controller  # too deep for its drafts, which are of use
    controller, sentence = note_broken(controller, strategy.drafter, broken=gave_up)
    if sentence:
        print(sentence, flush=True)
    return controller


def _by_slice(told: ChunkReport, live: np.ndarray, *, training: bool) -> dict[str, Any]:
    """The device's report as plain lists; a slice with nothing live trains if the chunk does."""
    resting = "TRAIN" if training else "IDLE"
    loss = float(told.draft_loss[0])
    return {
        "rounds_run": told.stats.rounds.tolist(),
        "live": live.tolist(),
        "roles": ["ROLLOUT" if count else resting for count in live],
        "microbatches": told.microbatches.tolist(),
        "committed": told.stats.committed.tolist(),
        "row_rounds": told.stats.row_rounds.tolist(),
        "accepted": told.stats.accepted.sum(axis=0).tolist(),
        "expected": told.stats.expected.sum(axis=0).tolist(),
        "draft_loss": None if math.isnan(loss) else loss,
        "drafter_version": int(told.draft_version[0]),
    }


def _harvest(flight: _Flight, ended: np.ndarray) -> list[Response]:
    """Responses of the rows marked in `ended`, copied to the host."""
    if not ended.any():
        return []
    rows = flight.seats.rows
    tokens, log_probs, lengths, ids = sharding.to_host(
        (rows.tokens, rows.log_probs, rows.length, rows.sequence_ids)
    )
    return [
        Response(
            sequence=int(ids[row]),
            tokens=tokens[row, : lengths[row]].copy(),
            log_probs=log_probs[row, : lengths[row]].copy(),
            prompt_length=len(flight.queue.asked.prompts[ids[row]]),
        )
        for row in np.flatnonzero(ended)
    ]


def _train_between_steps(programs: RolloutPrograms, flight: _Flight) -> None:
    """One slice is never idle: it trains after the rollout, for a share of its rounds.

    The chunk program serves here too: all rows have ended, so its one block is microbatches alone.
    """
    flight.controller, choice = choose_between_steps(
        programs,
        flight.controller,
        [(record.rows, record.strategy, record.rounds_run[0]) for record in flight.chunks],
        replay=flight.replay,
    )
    if choice.block.microbatches > 0:
        flight.chunks.append(_launch(programs, flight, choice, rounds=choice.block.rounds))
