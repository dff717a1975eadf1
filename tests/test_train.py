"""A small run from start to end: resumed exactly (promise 7), and bad input told in a sentence."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import toy_run

from tlt_jax import kept_config, train, weights
from tlt_jax.checkpoint import Checkpoints
from tlt_jax.config import CheckpointConfig, MeshConfig
from tlt_jax.controller import Controller
from tlt_jax.reporting.writers import read_jsonl
from tlt_jax.types import UserError

REPO = pathlib.Path(__file__).resolve().parent.parent
STEPS = 8
CLOCKED = {
    "seconds",
    "start",
    "tokens_per_second",
    "idle_seconds",
    "idle_training_seconds",
    "idle_used_share",
}

CONFIG_FILE = """
import dataclasses, json, pathlib
from ml_collections import config_dict

def get_config():
    values = json.loads((pathlib.Path(__file__).parent / "values.json").read_text())
    for group in values.values():
        if isinstance(group, dict):
            for key, value in group.items():
                group[key] = tuple(value) if isinstance(value, list) else value
    return config_dict.ConfigDict(values)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Random weights, four programs, a checkpoint every two steps."""
    return toy_run.changed(
        toy_run.CONFIG,
        num_steps=STEPS,
        task={"data_dir": str(tmp_path_factory.mktemp("data"))},
        checkpoint={"every": 2, "keep": 2},
    )


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """Programs compiled once for all runs of this module; gives their folder."""
    folder = tmp_path_factory.mktemp("xla_cache")
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(folder), 0.0), strict=True):
        jax.config.update(name, value)
    yield folder
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def unbroken(config, compile_cache, tmp_path_factory):
    """(workdir, final state) of a run that nobody stopped."""
    workdir = tmp_path_factory.mktemp("unbroken")
    return workdir, train.train(config, workdir)


def _without_clocks(path):
    return [{k: v for k, v in row.items() if k not in CLOCKED} for row in read_jsonl(path)]


def _assert_same_run(workdir, state, unbroken):
    """Same arrays, bit for bit, and same numbers in the logs except times."""
    wanted_dir, wanted = unbroken
    jax.tree.map(np.testing.assert_array_equal, state.arrays(), wanted.arrays())
    assert (state.steps_done, state.carry.controller) == (
        wanted.steps_done,
        wanted.carry.controller,
    )
    assert any(state.carry.controller.log_sharpness), "a run that teaches nothing cannot lose it"
    for name in ("metrics.jsonl", "decisions.jsonl"):
        assert _without_clocks(workdir / name) == _without_clocks(wanted_dir / name), name
    for name in ("policy.safetensors", "drafter/drafter.safetensors"):
        assert (workdir / name).read_bytes() == (wanted_dir / name).read_bytes(), name


def test_a_run_leaves_its_files(unbroken, config):
    workdir, state = unbroken
    assert state.steps_done == STEPS
    rows = read_jsonl(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert sum(row["compiles"] for row in rows) == 0
    assert max(row["logprob_gap_max"] for row in rows) < 1e-4
    assert rows[-1]["drafter_version"] > 0
    kept = json.loads((workdir / "config.json").read_text())
    assert kept == json.loads(json.dumps(dataclasses.asdict(config)))
    for name in ("summary.md", "plots", "tensorboard", "drafter/drafter.safetensors"):
        assert (workdir / name).exists(), name
    specs = train.setup.policy.param_specs(config.policy)
    saved = weights.load(workdir / "policy.safetensors", specs, dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, saved, state.rollout_params)


def test_decisions_carry_versions(unbroken):
    """Promise 9: target step, drafter version and strategy of every chunk."""
    records = read_jsonl(unbroken[0] / "decisions.jsonl")
    assert {record["step"] for record in records} == set(range(STEPS))
    assert all(record["target_step"] == record["step"] for record in records)
    versions = [record["drafter_version"] for record in records]
    assert versions == sorted(versions) and versions[-1] > 0
    assert {record["strategy"] for record in records} == {"tree-2-2-5"}


def test_a_run_stopped_after_any_checkpoint_ends_alike(
    unbroken, config, compile_cache, tmp_path, capsys
):
    """As if killed two steps after a checkpoint: the logs are ahead of it and have a torn line."""
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    (workdir / "policy.safetensors").unlink()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "rew')
    _assert_same_run(workdir, train.train(config, workdir), unbroken)
    assert f"resuming after step {STEPS - 2}" in capsys.readouterr().out


def test_a_finished_run_is_left_as_it_is(unbroken, config, compile_cache, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    _assert_same_run(workdir, train.train(config, workdir), unbroken)


@pytest.fixture
def command(config, tmp_path):
    """Function (*arguments) -> started `python -m tlt_jax.train` with the module's config."""
    (tmp_path / "config.py").write_text(CONFIG_FILE)
    (tmp_path / "values.json").write_text(json.dumps(dataclasses.asdict(config)))

    def start(*arguments):
        environment = os.environ | {"PYTHONPATH": str(REPO)}
        return subprocess.Popen(
            [sys.executable, "-m", "tlt_jax.train", f"--config={tmp_path}/config.py", *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def test_a_killed_process_is_resumed_by_the_same_command(
    unbroken, config, compile_cache, command, tmp_path
):
    """kill -9 at a random moment after the first checkpoint, then the same command again."""
    workdir = tmp_path / "run"
    shutil.copytree(compile_cache, workdir / "xla_cache")
    arguments = (f"--workdir={workdir}",)
    process = command(*arguments)
    give_up = time.monotonic() + 240
    while not (workdir / "checkpoints" / "2").exists() and process.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.01)
    delay = random.uniform(0.0, 0.4)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    kept = [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert kept, errors  # later ones take the place of "2"

    process = command(*arguments)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "resuming after step" in output, f"killed after {delay:.3f} s: {output}"
    wanted = unbroken[1]
    checkpoints = Checkpoints(workdir, config.checkpoint)
    arrays, record = checkpoints.restore(STEPS, wanted.arrays())
    checkpoints.close()
    controller = Controller.from_record(record["controller"])
    carry = dataclasses.replace(wanted.carry, controller=controller)
    state = dataclasses.replace(wanted, steps_done=record["steps_done"], carry=carry)
    _assert_same_run(workdir, state.with_arrays(**arrays), unbroken)


def test_measured_prices_are_kept_and_can_be_replayed(config, compile_cache, tmp_path):
    """The checkpoint holds the times; replayed from its log a run ends alike, to the bit."""
    short = toy_run.changed(config, num_steps=4, drafter={"rounds_per_microbatch": ()})
    train.train(dataclasses.replace(short, num_steps=2), tmp_path / "first")
    ended = train.train(short, tmp_path / "first")
    budget = ended.carry.controller.budget
    assert len(budget.microbatches) == 2 and budget.rounds  # timed at both starts
    log = tmp_path / "first" / "decisions.jsonl"
    blocks = [record["block"] for record in read_jsonl(log)]
    assert {"rounds": 4, "microbatches": 1} in blocks  # a whole chunk, before prices are known
    again = train.train(dataclasses.replace(short, replay=str(log)), tmp_path / "again")
    assert [r["block"] for r in read_jsonl(tmp_path / "again" / "decisions.jsonl")] == blocks
    jax.tree.map(np.testing.assert_array_equal, again.arrays(), ended.arrays())


def test_a_damaged_checkpoint_is_told_and_can_be_removed(unbroken, config, compile_cache, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    damaged = workdir / "checkpoints" / str(STEPS)
    for path in damaged.rglob("*"):
        if path.is_file() and path.stat().st_size > 4096:
            path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError) as error:
        train.train(config, workdir)
    assert str(damaged) in str(error.value) and "\n" not in str(error.value)
    shutil.rmtree(damaged)
    _assert_same_run(workdir, train.train(config, workdir), unbroken)


def test_a_misspelt_key_ends_the_command_with_one_line(command, tmp_path):
    process = command(f"--workdir={tmp_path}/run", "--config.rollout.temprature=1.0")
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (2, ""), errors
    lines = errors.strip().splitlines()
    assert len(lines) == 1 and "temperature" in lines[0], errors
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_run_is_refused(unbroken, config, tmp_path):
    """The first difference is named; how often checkpoints are written may change."""
    workdir = tmp_path
    shutil.copy(unbroken[0] / "config.json", workdir)
    other = dataclasses.replace(config, checkpoint=CheckpointConfig(every=1, keep=5), num_steps=9)
    kept_config.check(other, workdir, may_change=train.MAY_CHANGE)
    for changes, words in (
        ({"seed": 1}, r"config\.seed \(0, now 1\)"),
        ({"mesh": MeshConfig(slices=1)}, r"config\.mesh\.slices \(2, now 1\)"),
    ):
        with pytest.raises(UserError, match=words):
            train.train(dataclasses.replace(config, **changes), workdir)


def test_a_damaged_config_is_told(config, tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json is damaged.*remove it"):
        train.train(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh": MeshConfig(slices=4, tensor=2)}, r"config\.mesh asks for .* = 8 devices"),
        ({"rollout": {"max_prompt_length": 8}}, r"prompts of task 'pairs' .*max_prompt_length"),
        ({"policy": {"vocab_size": 32}}, r"vocabulary of 128 .* config\.policy\.vocab_size is 32"),
        ({"task": {"name": "pair"}}, r"no task 'pair'; did you mean 'pairs'"),
        ({"task": {"mix": "mixd"}}, r"mixd.*did you mean 'mixed'"),
        ({"warm_start_dir": "/nowhere"}, r"no weights at /nowhere/policy\.safetensors"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_compiled(config, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train.train(toy_run.changed(config, **changes), tmp_path)
    kept_config.check(config, tmp_path, may_change=())  # nothing is kept of what did not fit
