"""Which sequence sits in which row: first rows, refills, compaction, longer caches.

All of it happens between chunks, on the host's word: it follows from token counts alone.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tlt_jax import dealing, sharding, slots
from tlt_jax.dealing import NO_HISTORY, LengthHistory
from tlt_jax.programs import RolloutPrograms
from tlt_jax.slots import Asked
from tlt_jax.speculation import RolloutState
from tlt_jax.spot_training import DrafterState
from tlt_jax.types import INVALID


@dataclasses.dataclass(frozen=True)
class Seats:
    """Rows in flight, and what the host knows of them."""

    rows: RolloutState
    live: np.ndarray  # [slices, rows per slice] bool
    lengths: np.ndarray  # [slices, rows per slice] int32, prompts included

    @classmethod
    def of(cls, rows: RolloutState, live: np.ndarray, lengths: np.ndarray, slices: int) -> "Seats":
        """From `live` and `lengths` of all slices in a row."""
        return cls(rows, live.reshape(slices, -1), lengths.reshape(slices, -1))

    @property
    def bucket(self) -> int:
        """Rows per slice."""
        return self.live.shape[1]

    @property
    def length(self) -> int:
        """Cache length."""
        return self.rows.tokens.shape[1]

    @property
    def live_by_slice(self) -> np.ndarray:
        """Live rows of each slice."""
        return self.live.sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Queue:
    """Sequences asked for, and those of them that have no slot yet."""

    asked: Asked
    expected: list[float]  # response lengths by sequence
    waiting: collections.deque[int]  # first come first served


def queue(
    programs: RolloutPrograms, prompts: Sequence[np.ndarray], history: LengthHistory
) -> Queue:
    """All sequences waiting, the longest expected first.

    Raises:
      UserError: a prompt is empty or too long.
    """
    asked = slots.ask(prompts, programs.rollout)
    known = history if programs.rollout.deal_by_length else NO_HISTORY
    expected = dealing.expected(known, asked.ids)
    return Queue(asked, expected, dealing.queue(expected))


def begin(programs: RolloutPrograms, target: Any, queue: Queue) -> Seats:
    """New rows for those who wait, as many as there are slots."""
    slices, rows = programs.slices, programs.first_rows
    hands = dealing.deal(queue.waiting, queue.expected, slices=slices, rows=rows)
    batch = queue.asked.arrays(hands, rows=rows)
    state = programs.prefill(target, jax.device_put(batch, sharding.per_slice(programs.mesh)))
    return Seats.of(state, batch[3] != INVALID, batch[1], slices)


def seat(
    programs: RolloutPrograms,
    target: Any,
    drafter_state: DrafterState | None,
    queue: Queue,
    seats: Seats,
) -> Seats:
    """Gives slots to those who wait, or else compacts rows into the smallest bucket."""
    if not queue.waiting or (seats.live.any() and not programs.rollout.refill):
        return _compact(programs, seats)
    if not seats.live.any():
        return begin(programs, target, queue)
    while queue.waiting and not seats.live.all():
        seats = _refill(programs, target, drafter_state, queue, seats)
    return seats


def _refill(
    programs: RolloutPrograms,
    target: Any,
    drafter_state: DrafterState | None,
    queue: Queue,
    seats: Seats,
) -> Seats:
    """Puts waiting sequences into free slots, as many as one call can."""
    most, live, lengths = programs.refill_rows, seats.live.copy(), seats.lengths.copy()
    free = [np.flatnonzero(~of_slice) for of_slice in live]
    hands = dealing.draw(queue.waiting, [len(places) for places in free], most=most)
    batch = queue.asked.arrays(hands, rows=most)
    chosen = np.full((programs.slices, most), seats.bucket, np.int32)
    for slice_, hand in enumerate(hands):
        places = free[slice_][: len(hand)]
        chosen[slice_, : len(hand)] = places
        live[slice_, places] = True
        lengths[slice_, places] = batch[1].reshape(-1, most)[slice_, : len(hand)]
    split = sharding.per_slice(programs.mesh)
    arrays = jax.device_put((chosen.reshape(-1), *batch), split)
    return Seats(programs.refill(target, drafter_state, seats.rows, arrays), live, lengths)


def _compact(programs: RolloutPrograms, seats: Seats) -> Seats:
    """Compacts rows into the smallest bucket that holds them."""
    rows = programs.compact(seats.rows, int(seats.live_by_slice.max()))
    if rows.live.size == seats.live.size:
        return dataclasses.replace(seats, rows=rows)
    live, lengths = sharding.to_host((rows.live, rows.length))
    return Seats.of(rows, live, lengths, programs.slices)


def grow(programs: RolloutPrograms, seats: Seats) -> Seats:
    """The same rows in caches of the next length bucket."""
    return dataclasses.replace(seats, rows=programs.grow(seats.rows))
