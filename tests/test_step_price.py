"""What idle training costs a step: both sides do the same work, training apart."""

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
    return [step_price.make_side(config, *weights, train=train) for train in (False, True)]


def test_sides_differ_in_training_alone(sides, weights):
    resting, training = step_price.take_turns(sides, first=1)
    assert resting.steps_done == training.steps_done == step_price.STEPS
    jax.tree.map(np.testing.assert_array_equal, resting.learner.params, training.learner.params)
    jax.tree.map(np.testing.assert_array_equal, training.carry.drafter.params, weights[1])
    taken = [sum(sum(chunk.microbatches) for chunk in side.chunks) for side in sides]
    assert taken[0] == 0 < taken[1]
    again = step_price.take_turns(sides, first=0)  # the first states were not used up
    jax.tree.map(np.testing.assert_array_equal, again[0].learner.params, resting.learner.params)
    assert [len(side.seconds) for side in sides] == [2, 2]
