"""How many microbatches an idle slice takes while others decode, by what both have taken so far.

Rounds come in blocks, after each of which the slices wait for one another. So what an idle slice
does in a block must not take longer than the block's rounds. A microbatch is priced in rounds: its
seconds by those of a round of the strategy in the row bucket. A price is no whole number, so a
block may hold several microbatches: at a price of 1.3, three of them fill 97 % of a block of four
rounds, while a single one would fill 65 % of a block of two.

The state is frozen and on the host. Times come from a clock: where several processes run, one of
them decides (`choice`).
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from tlt_jax.types import Strategy

WINDOW = 8
"""Times kept of a microbatch, and of a round of each strategy in each bucket."""
FULL = 0.85
"""A block is long enough if its microbatches take so much of it."""
MARGIN = 1.05
"""A microbatch is taken to cost so many times its price: times vary."""
LONGEST = 2
"""No block is longer than so many of the shortest ones: in its last block a tail waits for it."""
CLEAR = 0.75
"""Rounds of a chunk are timed only if idle slices trained for no more than this share of it.

With more, it may have been the microbatches that the chunk's blocks waited for. Taken for rounds,
they would seem to have room for more microbatches, and those for still more.
"""
LEAST_ROUNDS = 4
"""Rounds of a shorter chunk are not timed: much of its time is that of the chunk itself."""
STALE = 16
"""After so many chunks that were not clear, one is made so."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Rounds in which an idle slice takes so many microbatches."""

    rounds: int
    microbatches: int


NO_BLOCK = Block(0, 0)
"""Idle slices rest."""


@dataclasses.dataclass(frozen=True)
class RoundTimes:
    """What rounds of a strategy took in a row bucket."""

    rows: int  # the bucket, rows per slice
    strategy: str
    seconds: tuple[float, ...] = ()  # of a round, the newest last
    unclear: int = 0  # chunks since then that were not timed


@dataclasses.dataclass(frozen=True)
class Budget:
    """All times so far."""

    rounds: tuple[RoundTimes, ...] = ()
    microbatches: tuple[float, ...] = ()  # seconds of one, the newest last

    def known(self, rows: int, strategy: str) -> RoundTimes:
        """What is known of a strategy's rounds, without times if none was timed."""
        for times in self.rounds:
            if (times.rows, times.strategy) == (rows, strategy):
                return times
        return RoundTimes(rows, strategy)

    def to_record(self) -> dict[str, Any]:
        """The state as JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Budget":
        """Undoes `to_record`."""
        rounds = [
            RoundTimes(**(times | {"seconds": tuple(times["seconds"])}))
            for times in record["rounds"]
        ]
        return cls(tuple(rounds), tuple(record["microbatches"]))


UNTIMED = Budget()
"""Nothing was timed yet."""


def price(budget: Budget, rows: int, strategy: Strategy | str) -> float | None:
    """Rounds in a bucket that a microbatch takes as long as; None before both were timed."""
    times = budget.known(rows, str(strategy)).seconds
    if not (times and budget.microbatches):
        return None
    return statistics.median(budget.microbatches) / statistics.median(times)


def block(budget: Budget, rows: int, strategy: Strategy, most_rounds: int) -> Block:
    """The block for the next chunk of a strategy in the bucket of `rows` rows per slice.

    While the price is not known an idle slice takes one microbatch in a whole chunk, of
    `most_rounds` rounds; so it does now and then later, because such a chunk's rounds can be timed.
    If a microbatch takes longer than a whole chunk, idle slices rest.
    """
    known = price(budget, rows, strategy)
    if known is None or budget.known(rows, str(strategy)).unclear >= STALE:
        return Block(most_rounds, 1)
    return fitted(MARGIN * known, most_rounds)


def fitted(rounds_each: float, most_rounds: int) -> Block:
    """The shortest block that microbatches of `rounds_each` rounds fill to `FULL`.

    Among blocks of up to `LONGEST` times the shortest and up to `most_rounds`; if none is filled so
    far, the one that is filled best.
    """
    shortest = math.ceil(rounds_each)
    best, best_filled = NO_BLOCK, 0.0
    for rounds in range(shortest, min(LONGEST * shortest, most_rounds) + 1):
        microbatches = math.floor(rounds / rounds_each)
        filled = microbatches * rounds_each / rounds
        if filled > best_filled:
            best, best_filled = Block(rounds, microbatches), filled
        if filled >= FULL:
            break
    return best


def time_microbatch(budget: Budget, seconds: float) -> Budget:
    """Adds a time of a microbatch; 0, below what the clock can tell, says nothing."""
    if seconds <= 0:
        return budget
    return dataclasses.replace(budget, microbatches=(*budget.microbatches, seconds)[-WINDOW:])


def time_rounds(
    budget: Budget,
    rows: int,
    strategy: Strategy,
    seconds: float,
    *,
    rounds_run: Sequence[int],
    microbatches: Sequence[int],
) -> Budget:
    """Adds what a chunk has shown.

    Args:
      budget: the state before.
      rows: the bucket.
      strategy: what ran.
      seconds: of the chunk.
      rounds_run: rounds of each slice, not all 0.
      microbatches: taken by each slice.
    """
    known, most = budget.known(rows, str(strategy)), max(rounds_run)
    each = statistics.median(budget.microbatches) if budget.microbatches else math.inf
    clear = most >= LEAST_ROUNDS and all(
        taken == 0 or taken * each <= CLEAR * seconds * (1 - rounds / most)
        for rounds, taken in zip(rounds_run, microbatches, strict=True)
    )
    if clear:
        newest = (*known.seconds, seconds / most)[-WINDOW:]
        newer = dataclasses.replace(known, seconds=newest, unclear=0)
    else:
        newer = dataclasses.replace(known, unclear=known.unclear + 1)
    others = tuple(times for times in budget.rounds if times != known)
    return dataclasses.replace(budget, rounds=(*others, newer))
