"""The controller: estimates that meet the measured acceptance, and a state that survives a file."""

import json
import math

import numpy as np
import pytest

from tlt_jax import bandit, budget, dealing
from tlt_jax.controller import FRESH, LOG_RANGE, Controller, calibrate
from tlt_jax.types import Strategy, UserError


def test_a_fresh_controller_leaves_estimates_alone():
    assert FRESH.sharpness(3) == [1.0, 1.0, 1.0] and FRESH.sharpness(0) == []
    assert Controller(log_sharpness=(math.log(2.0),)).sharpness(2) == [2.0, 1.0]


def test_overconfident_depths_get_softer_and_underconfident_ones_sharper():
    """Depth 1 is right, depth 2 too sure, depth 3 not sure enough, depth 4 was never reached."""
    moved = calibrate(FRESH, 100, [50, 20, 10, 0], [50.0, 40.0, 5.0, 0.0]).log_sharpness
    assert moved[0] == 0 and moved[1] < 0 < moved[2]
    assert calibrate(FRESH, 100, [50, 0, 0], [50.0, 25.0, 0.0]).log_sharpness[2] == 0
    assert calibrate(FRESH, 0, [0, 0], [0.0, 0.0]).log_sharpness == (0.0, 0.0)


def test_more_evidence_moves_further_and_depths_beyond_the_tree_stay():
    before = Controller(idle_credit=0.5, log_sharpness=(0.0, 0.0, 0.7))
    few = calibrate(before, 10, [2], [5.0])
    many = calibrate(before, 1000, [200], [500.0])
    assert many.log_sharpness[0] < few.log_sharpness[0] < 0
    assert many.log_sharpness[1:] == (0.0, 0.7) and many.idle_credit == 0.5
    for hits in (0, 100):
        state = before
        for _ in range(99):
            state = calibrate(state, 100, [hits], [50.0])
        assert abs(state.log_sharpness[0]) == LOG_RANGE


@pytest.mark.parametrize("error", [0.5, 1.0, 3.0])
def test_estimates_come_to_what_is_measured(error):
    """Target and drafter differ by noise of a known size; the drafter's estimate is calibrated."""
    rng = np.random.default_rng(0)
    state = FRESH
    for _ in range(60):
        noisy = 2 * rng.gumbel(size=(200, 16))
        sharpness = state.sharpness(1)[0]
        weights = np.exp(sharpness * (noisy - noisy.max(axis=1, keepdims=True)))
        estimate = (weights.max(axis=1) / weights.sum(axis=1)).sum()
        hits = (noisy + error * rng.gumbel(size=noisy.shape)).argmax(1) == noisy.argmax(1)
        state = calibrate(state, 200, [int(hits.sum())], [float(estimate)])
    assert abs(hits.mean() - estimate / 200) < 0.08
    assert state.sharpness(1)[0] == pytest.approx(1 / error, rel=0.25)  # a softmax of Gumbel noise


def test_a_record_is_json_and_comes_back():
    tried = bandit.update(bandit.UNTRIED, 4, Strategy(2), 9.5, accept_length=2.5)
    history = dealing.remember(dealing.NO_HISTORY, [(7, 30), (8, 12)])
    timed = budget.time_rounds(
        budget.UNTIMED, 4, Strategy(2), 0.5, rounds_run=[9, 3], microbatches=[0, 0]
    )
    timed = budget.time_microbatch(timed, 0.03)
    state = Controller(0.25, (0.1, -0.3), tried, ("trained",), history, timed)
    assert Controller.from_record(json.loads(json.dumps(state.to_record()))) == state


def test_a_record_of_an_older_version_is_told():
    record = FRESH.to_record()
    del record["budget"]
    with pytest.raises(UserError, match="of an older version, without 'budget'; begin anew"):
        Controller.from_record(record)
