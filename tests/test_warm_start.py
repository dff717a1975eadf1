"""The supervised warm start: both phases learn, either may be left out, files load again."""

import json

import jax
import numpy as np
import pytest
import toy_run

from tlt_jax import drafter, policy, sharding, warm_start, weights

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


def test_a_phase_without_steps_leaves_its_weights_alone(made, data_dir, tmp_path):
    config = _changed(data_dir, warm_start_dir=str(made), warm_start={"policy_steps": 0})
    warm_start.warm_start(config, tmp_path)
    before, after = _load(made), _load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, after[0], before[0])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), after[1], before[1])
    assert min(jax.tree.leaves(moved)) > 0
    report = json.loads((tmp_path / "warm_start.json").read_text())
    assert report["policy_loss"] is None and report["drafter_loss"] > 0


def test_the_drafters_learning_rate_is_that_of_the_warm_start(made, data_dir, tmp_path):
    quiet = {"policy_steps": 0, "drafter_steps": 2, "drafter_learning_rate": 0.0}
    config = _changed(data_dir, warm_start_dir=str(made), warm_start=quiet)
    warm_start.warm_start(config, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, _load(tmp_path)[1], _load(made)[1])


def test_batches_lie_over_the_slices(data_dir):
    mesh = sharding.make_mesh(CONFIG.mesh)
    rows = {"tokens": np.arange(24).reshape(6, 4)}
    batch = warm_start.Batches(rows, CONFIG, mesh).next()["tokens"]
    assert batch.shape == (2, 4)
    assert [shard.data.shape for shard in batch.addressable_shards] == [(1, 4), (1, 4)]
