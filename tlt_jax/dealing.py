"""Which slice takes which prompts: slices should idle because of the tail, not of a bad deal.

How long the last responses to a prompt were says how long the next will be. Longest first, each
sequence goes to the slice that has least to do so far and a slot left (Graham's longest-processing-
time rule; with slots enough its makespan is at most 4/3 of the best). Sequences for which there is
no slot wait, and are drawn, longest first again, as slots fall free. None of this changes a token,
as their noise depends on no slice and no order.
"""

import collections
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence

KEPT = 65_536
"""Prompts remembered; the ones not met for longest are forgotten first."""


@dataclasses.dataclass(frozen=True)
class LengthHistory:
    """Mean response length in tokens of each prompt when it was last answered."""

    lengths: Mapping[int, float] = dataclasses.field(default_factory=dict)  # by prompt id

    def to_record(self) -> list[list[float]]:
        """The state as JSON: pairs of prompt id and length, the latest met last."""
        return [[prompt, length] for prompt, length in self.lengths.items()]

    @classmethod
    def from_record(cls, record: list[list[float]]) -> "LengthHistory":
        """Undoes `to_record`."""
        return cls({int(prompt): length for prompt, length in record})


NO_HISTORY = LengthHistory()
"""No prompt was met yet."""


def remember(history: LengthHistory, responses: Iterable[tuple[int, int]]) -> LengthHistory:
    """Adds (prompt id, response length) of the sequences of a step."""
    by_prompt: dict[int, list[int]] = {}
    for prompt, length in responses:
        by_prompt.setdefault(prompt, []).append(length)
    kept = {prompt: length for prompt, length in history.lengths.items() if prompt not in by_prompt}
    kept |= {prompt: statistics.fmean(lengths) for prompt, lengths in by_prompt.items()}
    return LengthHistory(dict(list(kept.items())[-KEPT:]))


def expected(history: LengthHistory, prompt_ids: Sequence[int]) -> list[float]:
    """Expected response length of each prompt; of one never met the mean of those that were."""
    known = [history.lengths.get(prompt) for prompt in prompt_ids]
    usual = statistics.fmean([length for length in known if length is not None] or [1.0])
    return [usual if length is None else length for length in known]


def queue(lengths: Sequence[float]) -> collections.deque[int]:
    """Sequences in the order in which they get slots: the longest first, equal ones as they are."""
    return collections.deque(sorted(range(len(lengths)), key=lambda index: -lengths[index]))


def deal(
    waiting: collections.deque[int], lengths: Sequence[float], *, slices: int, rows: int
) -> list[list[int]]:
    """Takes from `waiting` for slices of `rows` free slots each; equal lengths go in turn."""
    hands: list[list[int]] = [[] for _ in range(slices)]
    loads = [0.0] * slices
    for _ in range(min(slices * rows, len(waiting))):
        sequence = waiting.popleft()
        room = [index for index in range(slices) if len(hands[index]) < rows]
        chosen = min(room, key=lambda index: (loads[index], len(hands[index])))
        hands[chosen].append(sequence)
        loads[chosen] += lengths[sequence]
    return hands


def draw(waiting: collections.deque[int], free: Sequence[int], *, most: int) -> list[list[int]]:
    """Takes from `waiting` for each slice as many as it has `free` slots, at most `most`.

    Where there are too few for all, the slice with most free slots has the first turn.
    """
    hands: list[list[int]] = [[] for _ in free]
    left = [min(slots, most) for slots in free]
    while waiting and any(left):
        chosen = max(range(len(free)), key=lambda i: (left[i] > 0, free[i] - len(hands[i])))
        hands[chosen].append(waiting.popleft())
        left[chosen] -= 1
    return hands
