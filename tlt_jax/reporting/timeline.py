"""Who did what when: decision rows of a step become spans of rollout, training and idling.

Times are seconds since the step began. The run clock in the rows restarts when a run resumes, so
only differences within a step are used. A row tells how long its chunk took as a whole; two parts
are estimated from it. Rounds of a chunk take the same time on every slice, hence a slice that ran
3 of the 4 rounds its busiest neighbour ran was idle for the last quarter. And a step's measured
`idle_training_seconds` are spread over its microbatches in equal parts.
"""

import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tlt_jax.reporting.writers import Record
from tlt_jax.types import UserError


class Activity(enum.Enum):
    """What a slice was busy with."""

    ROLLOUT = "rollout"
    TRAINING = "drafter training"
    IDLE = "idle"


class Span(NamedTuple):
    """A stretch of time in the lane of one slice."""

    slice_index: int
    start: float  # seconds
    seconds: float
    activity: Activity

    @property
    def end(self) -> float:
        return self.start + self.seconds


class Phase(NamedTuple):
    """A stretch of time in which all slices did the same, outside chunks."""

    name: str
    start: float  # seconds
    seconds: float


class StepTimeline(NamedTuple):
    """One step, laid out from time 0."""

    step: int
    spans: list[Span]  # per chunk and slice, in time order
    phases: list[Phase]
    rollout_end: float  # end of the last chunk
    seconds: float  # of the whole step


_PHASES_AFTER_ROLLOUT = ("reward_wait", "learn", "reshard")


def step_timeline(chunks: Sequence[Record], row: Record) -> StepTimeline:
    """Lays out one step.

    Rollout seconds that no chunk covers come first, as phase "prefill": the slots are prefilled
    before the first chunk starts. The other phases follow the last chunk in the order in which
    a step runs them. Waiting for programs, in the first step of a process, is left out.

    Args:
      chunks: decision rows of the step, in chunk order, at least one.
      row: metrics row of the step.
    """
    clock = chunks[0]["start"]
    chunk_seconds = chunks[-1]["start"] + chunks[-1]["seconds"] - clock
    prefill = max(0.0, row["seconds"]["rollout"] - chunk_seconds)
    microbatches = sum(sum(chunk["microbatches"]) for chunk in chunks)
    per_microbatch = row["idle_training_seconds"] / microbatches if microbatches else 0.0
    spans = [
        span
        for chunk in chunks
        for span in chunk_spans(
            chunk, start=chunk["start"] - clock + prefill, microbatch_seconds=per_microbatch
        )
    ]
    phases = [Phase("prefill", 0.0, prefill)]
    rollout_end = now = prefill + chunk_seconds
    for name in _PHASES_AFTER_ROLLOUT:
        phases.append(Phase(name, now, row["seconds"][name]))
        now += row["seconds"][name]
    return StepTimeline(
        step=row["step"],
        spans=spans,
        phases=[phase for phase in phases if phase.seconds > 0],
        rollout_end=rollout_end,
        seconds=max(now, row["seconds"]["total"] - row["seconds"]["compile"]),
    )


def chunk_spans(chunk: Record, *, start: float, microbatch_seconds: float) -> list[Span]:
    """Spans of one chunk: per slice its rounds, then its microbatches, then the idle remainder.

    Args:
      chunk: a decision row.
      start: when the chunk starts, seconds since the step began.
      microbatch_seconds: estimated time of one drafter microbatch.

    Raises:
      UserError: a role is none of ROLLOUT, TRAIN and IDLE.
    """
    seconds = chunk["seconds"]
    most_rounds = max(chunk["rounds_run"])
    spans = []
    for index, role in enumerate(chunk["roles"]):
        if role not in ("ROLLOUT", "TRAIN", "IDLE"):
            raise UserError(
                f"decisions.jsonl, step {chunk['step']}, chunk {chunk['chunk']}: role {role!r} "
                "is not ROLLOUT, TRAIN or IDLE."
            )
        share = chunk["rounds_run"][index] / most_rounds if most_rounds else 1.0
        rolling = seconds * share if role == "ROLLOUT" else 0.0
        training = min(seconds - rolling, chunk["microbatches"][index] * microbatch_seconds)
        parts = (
            (Activity.ROLLOUT, rolling),
            (Activity.TRAINING, training),
            (Activity.IDLE, seconds - rolling - training),
        )
        begun = start
        for activity, spent in parts:
            if spent > 0:
                spans.append(Span(index, begun, spent, activity))
            begun += spent
    return spans


def merge_spans(spans: Iterable[Span], *, gap: float) -> list[Span]:
    """Joins neighbours of one slice and activity that are at most `gap` seconds apart.

    Drawn one by one, hundreds of chunks would show their seams and not their pattern.
    """
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (span.slice_index, span.start)):
        last = merged[-1] if merged else None
        if (
            last is not None
            and (last.slice_index, last.activity) == (span.slice_index, span.activity)
            and span.start - last.end <= gap
        ):
            merged[-1] = last._replace(seconds=span.end - last.start)
        else:
            merged.append(span)
    return merged


def live_over_time(chunks: Sequence[Record]) -> tuple[list[float], list[int]]:
    """Live sequences of all slices against seconds since the first chunk, as a stairway.

    Returns:
      Times and counts of equal size. Each count holds until the next time; the last one is 0, at
      the end of the last chunk.
    """
    clock = chunks[0]["start"]
    times = [chunk["start"] - clock for chunk in chunks]
    counts = [sum(chunk["live"]) for chunk in chunks]
    return [*times, times[-1] + chunks[-1]["seconds"]], [*counts, 0]
