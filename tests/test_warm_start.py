"""The supervised warm start: both phases learn, either may be left out, files load again."""

import json

import jax
import numpy as np
import pytest
import toy_run

from tlt_jax import drafter, offline_training, policy, sharding, warm_start, weights

CONFIG = toy_run.changed(
    toy_run.CONFIG,
    warm_start={
        "policy_steps": 12,
        "drafter_steps": 12,
        "batch_rows": 2,
        "row_length": 448,
        "learning_rate": 1e-2,
    },
)


def _changed(data_dir, **groups):
    return toy_run.changed(CONFIG, task={"data_dir": str(data_dir)}, **groups)


def _load(folder):
    specs = policy.param_specs(CONFIG.policy), drafter.param_specs(CONFIG.policy, CONFIG.drafter)
    names = "policy", "drafter"
    return [
        weights.load(folder / f"{name}.safetensors", spec, dtype="float32")
        for name, spec in zip(names, specs, strict=True)
    ]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def made(data_dir, tmp_path_factory):
    """The folder of a warm start from random parameters, and what it printed."""
    folder = tmp_path_factory.mktemp("made")
    warm_start.warm_start(_changed(data_dir), folder)
    return folder


def test_both_models_have_learned(made):
    """A uniform guess over the vocabulary costs ln 128 = 4.85 nats."""
    report = json.loads((made / "warm_start.json").read_text())
    assert report["policy_loss"] < 4.0
    assert report["began_from"] == "random parameters"
    assert (report["policy_steps"], report["drafter_steps"]) == (12, 12)


@pytest.mark.parametrize(("resting", "training"), [("policy", "drafter"), ("drafter", "policy")])
def test_a_phase_without_steps_leaves_its_weights_alone(
    made, data_dir, tmp_path, resting, training
):
    steps = {f"{resting}_steps": 0, f"{training}_steps": 2}
    config = _changed(data_dir, warm_start_dir=str(made), warm_start=steps)
    warm_start.warm_start(config, tmp_path)
    place = {"policy": 0, "drafter": 1}
    before, after = _load(made), _load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, after[place[resting]], before[place[resting]])
    trained = after[place[training]], before[place[training]]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *trained)
    assert min(jax.tree.leaves(moved)) > 0
    report = json.loads((tmp_path / "warm_start.json").read_text())
    assert report[f"{resting}_loss"] is None and report[f"{training}_loss"] > 0


def test_the_rate_rises_for_a_twentieth_of_the_steps_and_falls_to_zero():
    rate = offline_training.schedule(0.4, 40)
    assert [float(rate(step)) for step in (0, 1, 2)] == pytest.approx([0.0, 0.2, 0.4])
    assert float(rate(21)) == pytest.approx(0.2) and float(rate(40)) == pytest.approx(0.0)


def test_the_drafters_rate_has_that_schedule():
    tx = offline_training.drafter_optimizer(
        toy_run.changed(CONFIG, warm_start={"drafter_steps": 40})
    )
    params, slope = {"w": np.ones(2, np.float32)}, {"w": np.full(2, 0.1, np.float32)}
    first, state = tx.update(slope, tx.init(params), params)
    second, _ = tx.update(slope, state, params)
    assert np.all(np.asarray(first["w"]) == 0) and np.all(np.asarray(second["w"]) < 0)


def test_the_drafters_learning_rate_is_that_of_the_warm_start(made, data_dir, tmp_path):
    quiet = {"policy_steps": 0, "drafter_steps": 2, "drafter_learning_rate": 0.0}
    config = _changed(data_dir, warm_start_dir=str(made), warm_start=quiet)
    warm_start.warm_start(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, _load(tmp_path)[1], _load(made)[1])


def test_batches_lie_over_the_slices(data_dir):
    mesh = sharding.make_mesh(CONFIG.mesh)
    rows = {"tokens": np.arange(24).reshape(6, 4)}
    batch = offline_training.Batches(rows, CONFIG, mesh).next()["tokens"]
    assert batch.shape == (2, 4)
    assert [shard.data.shape for shard in batch.addressable_shards] == [(1, 4), (1, 4)]
