"""What a step takes by drafter: all sides do the same work."""

import jax
import numpy as np
import pytest
import toy_run

from tlt_jax import setup, step_price


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return toy_run.changed(
        toy_run.CONFIG,
        policy={"num_layers": 1},
        task={"data_dir": str(folder)},
        benchmark={"repeats": 2},
    )


@pytest.fixture(scope="module")
def weights(config):
    return setup.initial_policy(config), setup.initial_drafter(config)


@pytest.fixture(scope="module")
def sides(config, weights):
    return [step_price.make_side(config, *weights, name) for name in step_price.SIDES]


def test_sides_differ_in_drafts_and_training_alone(sides, weights):
    states = step_price.take_turns(sides, first=1)
    plain, _, resting, training = states
    for state in states:
        assert state.steps_done == step_price.STEPS
        jax.tree.map(np.testing.assert_array_equal, state.learner.params, plain.learner.params)
    assert plain.carry.drafter is None
    for state in (resting, training):
        jax.tree.map(np.testing.assert_array_equal, state.carry.drafter.params, weights[1])
    taken = [sum(sum(chunk.microbatches) for chunk in side.chunks) for side in sides]
    assert taken[:3] == [0, 0, 0] and taken[3] > 0
    drafted = [{chunk.strategy for chunk in side.chunks} for side in sides]
    assert drafted == [{"plain"}, {"ngram-2"}, {"tree-2-2-5"}, {"tree-2-2-5"}]
    again = step_price.take_turns(sides, first=0)  # the first states were not used up
    jax.tree.map(np.testing.assert_array_equal, again[0].learner.params, resting.learner.params)
    assert [len(side.seconds) for side in sides] == [2] * 4
