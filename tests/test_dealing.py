"""Prompts dealt to slices by how long their last responses were."""

import json

import numpy as np
import pytest

from tlt_jax import dealing
from tlt_jax.dealing import NO_HISTORY, LengthHistory


def _loads(hands, lengths):
    return [sum(lengths[sequence] for sequence in hand) for hand in hands]


@pytest.mark.parametrize("slices", [1, 2, 3])
def test_without_a_history_prompts_are_dealt_in_turn(slices):
    lengths = dealing.expected(NO_HISTORY, range(6))
    hands = dealing.deal(lengths, slices=slices, rows=6)
    assert hands == [list(range(slice_, 6, slices)) for slice_ in range(slices)]


def test_the_long_ones_are_spread():
    """In turn, slice 0 would get all long ones: 30 + 28 + 26 against 3 + 2 + 1."""
    lengths = [30, 1, 28, 2, 26, 3]
    hands = dealing.deal(lengths, slices=2, rows=3)
    assert sorted(_loads(hands, lengths)) == [35, 55]  # three rows each
    assert sorted(_loads(dealing.deal(lengths, slices=2, rows=6), lengths)) == [36, 54]


def test_every_sequence_is_dealt_once_into_a_slot():
    rng = np.random.default_rng(0)
    for _ in range(50):
        slices, rows = int(rng.integers(1, 5)), int(rng.integers(1, 9))
        count = int(rng.integers(0, slices * rows + 1))
        lengths = rng.exponential(100, count).tolist()
        hands = dealing.deal(lengths, slices=slices, rows=rows)
        assert sorted(sequence for hand in hands for sequence in hand) == list(range(count))
        assert max(map(len, hands)) <= rows
        loads = _loads(hands, lengths)
        if count and rows >= count:  # Graham's bound, with the mean and the longest as lower ones
            assert max(loads) <= 4 / 3 * max(sum(lengths) / slices, max(lengths)) + max(lengths) / 3


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
