"""Prompts dealt to slices by how long their last responses were."""

import collections
import json

import numpy as np
import pytest

from tlt_jax import dealing
from tlt_jax.dealing import NO_HISTORY, LengthHistory


def _deal(lengths, *, slices, rows):
    """Hands, and who waits."""
    waiting = dealing.queue(lengths)
    return dealing.deal(waiting, lengths, slices=slices, rows=rows), list(waiting)


def _loads(hands, lengths):
    return [sum(lengths[sequence] for sequence in hand) for hand in hands]


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_without_a_history_prompts_are_dealt_in_turn(slices):
    lengths = dealing.expected(NO_HISTORY, range(6))
    hands, waiting = _deal(lengths, slices=slices, rows=6)
    assert hands == [list(range(slice_, 6, slices)) for slice_ in range(slices)] and not waiting
    assert _deal(lengths, slices=1, rows=4) == ([[0, 1, 2, 3]], [4, 5])


def test_the_long_ones_are_spread():
    """In turn, slice 0 would get all long ones: 30 + 28 + 26 against 3 + 2 + 1."""
    lengths = [30, 1, 28, 2, 26, 3]
    assert sorted(_loads(_deal(lengths, slices=2, rows=3)[0], lengths)) == [35, 55]
    assert sorted(_loads(_deal(lengths, slices=2, rows=6)[0], lengths)) == [36, 54]


def test_the_long_ones_begin_and_the_short_ones_wait():
    hands, waiting = _deal([30, 1, 28, 2, 26, 3], slices=2, rows=1)
    assert hands == [[0], [2]] and waiting == [4, 5, 3, 1]


def test_every_sequence_is_dealt_once_into_a_slot_or_waits():
    rng = np.random.default_rng(0)
    for _ in range(50):
        slices, rows = int(rng.integers(1, 5)), int(rng.integers(1, 9))
        count = int(rng.integers(0, 2 * slices * rows))
        lengths = rng.exponential(100, count).tolist()
        hands, waiting = _deal(lengths, slices=slices, rows=rows)
        dealt = [sequence for hand in hands for sequence in hand]
        assert sorted([*dealt, *waiting]) == list(range(count))
        assert len(dealt) == min(count, slices * rows) and max(map(len, hands)) <= rows
        if dealt and waiting:
            assert min(lengths[i] for i in dealt) >= max(lengths[i] for i in waiting)
        loads = _loads(hands, lengths)
        if count and rows >= count:  # Graham's bound, with the mean and the longest as lower ones
            assert max(loads) <= 4 / 3 * max(sum(lengths) / slices, max(lengths)) + max(lengths) / 3


@pytest.mark.parametrize(
    ("free", "most", "hands", "left"),
    [
        ((1, 2), 4, [[8], [7, 9]], [6, 5]),
        ((0, 3), 2, [[], [7, 8]], [9, 6, 5]),
        ((4, 4), 4, [[7, 9, 5], [8, 6]], []),
        ((0, 0), 4, [[], []], [7, 8, 9, 6, 5]),
    ],
)
def test_free_slots_draw_from_those_who_wait(free, most, hands, left):
    """First come first served; the slice with most free slots has the first turn."""
    waiting = collections.deque([7, 8, 9, 6, 5])
    assert dealing.draw(waiting, free, most=most) == hands
    assert list(waiting) == left


def test_a_prompt_is_expected_to_be_answered_as_the_last_time():
    history = dealing.remember(NO_HISTORY, [(5, 10), (5, 30), (6, 100)])
    assert dealing.expected(history, [6, 5, 7]) == [100, 20, 60]  # the third was never met
    history = dealing.remember(history, [(5, 4)])
    assert dealing.expected(history, [5, 6]) == [4, 100]


def test_what_was_not_met_for_longest_is_forgotten(monkeypatch):
    monkeypatch.setattr(dealing, "KEPT", 2)
    history = dealing.remember(NO_HISTORY, [(1, 10), (2, 20)])
    history = dealing.remember(history, [(1, 11)])
    history = dealing.remember(history, [(3, 30)])
    assert history.lengths == {1: 11, 3: 30}


def test_a_record_is_json_and_comes_back():
    history = dealing.remember(NO_HISTORY, [(2**31 - 1, 10), (0, 3)])
    assert LengthHistory.from_record(json.loads(json.dumps(history.to_record()))) == history
