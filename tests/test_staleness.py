"""The experiment on a toy run: drafters begin alike, learn as they are named, and are drawn."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run

from tlt_jax import ablate, buffer, setup, sharding, staleness
from tlt_jax.buffer import Microbatch
from tlt_jax.config import StalenessConfig
from tlt_jax.types import INVALID, UserError

CONFIG = toy_run.changed(
    toy_run.CONFIG,
    num_steps=2,
    policy={"feature_layers": (0,)},
    drafter={
        "objective": "hass",
        "train_depth": 2,
        "microbatch_tokens": 72,
        "buffer_megabytes": 0.15,
        "learning_rate": 1e-2,
    },
    warm_start={"row_length": 72, "batch_rows": 4},
    staleness=StalenessConfig(
        learning_rates=(1e-3,),
        seeds=(0, 5),
        drafters=("frozen", "eagle-72", "hass-144", "eagle3-72"),
        depth=3,
    ),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    task = {"data_dir": str(tmp_path_factory.mktemp("data"))}
    return toy_run.changed(CONFIG, task=task)


@pytest.fixture(scope="module")
def done(config, tmp_path_factory):
    """The workdir of the experiment, and the lines of its first run."""
    workdir = tmp_path_factory.mktemp("staleness")
    staleness.run(config, workdir)
    path = workdir / "runs" / "rate_0.001_seed_0.jsonl"
    return workdir, [json.loads(line) for line in path.read_text().splitlines()]


def test_every_drafter_is_judged_before_it_learns_from_a_step(done):
    _, lines = done
    first, second = (line["drafters"] for line in lines)
    assert list(first) == [*CONFIG.staleness.drafters, "n-gram"]
    alike = [first[name]["accept_length"] for name in CONFIG.staleness.drafters if "3" not in name]
    assert len(set(alike)) == 1  # "eagle3" has random parameters of its own here
    assert 1 <= alike[0] <= 4 and len(first["frozen"]["accept_by_position"]) == 3
    assert first["n-gram"]["accept_by_position"] is None
    assert len({second[name]["accept_length"] for name in second}) > 2
    assert [held["loss"] is None for held in second.values()] == [True, *[False] * 3, True]


def test_a_run_that_is_complete_is_left_alone(done, config):
    workdir, _ = done
    kept = workdir / "runs" / "rate_0.001_seed_0.jsonl"
    torn = workdir / "runs" / "rate_0.001_seed_5.jsonl"
    wanted = [json.loads(line) for line in torn.read_text().splitlines()]
    before = kept.stat().st_mtime_ns
    torn.write_text(torn.read_text().splitlines(keepends=True)[0])
    staleness.run(config, workdir)
    assert kept.stat().st_mtime_ns == before
    again = [json.loads(line) for line in torn.read_text().splitlines()]
    for line in (*again, *wanted):
        del line["prices"]
    assert again == wanted  # all but seconds follows from the seed


def test_what_came_of_it_is_drawn_and_told(done):
    workdir, _ = done
    for name in ("drafter_staleness", "drafter_staleness_course"):
        assert (workdir / "plots" / f"{name}.png").stat().st_size > 5000
    with (workdir / "drafter_staleness.csv").open() as file:
        rows = {row["drafter"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*CONFIG.staleness.drafters, "n-gram"]
    assert float(rows["frozen"]["gain"]) == 1 and float(rows["eagle-72"]["cost"]) == 1
    assert float(rows["frozen"]["cost"]) < 0.5 and rows["n-gram"]["cost"] == ""


def test_the_number_of_updates_is_that_of_the_name(config):
    """Each lesson of 144 tokens is two updates of a row of 72; a frozen drafter has none."""
    names, device = ("frozen", "eagle-72", "hass-144"), jax.devices()[0]
    students = [staleness.enrol(config, name, device) for name in names]
    rows = staleness.empty_rows(config)
    random = np.random.default_rng(0)
    rows = dataclasses.replace(
        rows,
        tokens=random.integers(0, 9, rows.tokens.shape).astype(np.int32),
        features=random.standard_normal(rows.features.shape).astype(np.float32),
        segment_ids=np.zeros_like(rows.segment_ids),
        positions=np.broadcast_to(np.arange(72, dtype=np.int32), rows.positions.shape),
        filled=np.int32(2),
    )
    target = staleness.heads(setup.initial_policy(config))
    lesson = staleness.Lesson(target, rows, jax.random.key(0))
    before = [sharding.to_host(student.state.params) for student in students]
    told = staleness.study(students, lesson)
    assert [int(student.state.version) for student in students] == [0, 1, 2]
    assert told["frozen"]["loss"] is None and np.isfinite(told["hass-144"]["loss"])
    moved = [
        any(np.any(a != b) for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True))
        for old, new in zip(before, (s.state.params for s in students), strict=True)
    ]
    assert moved == [False, True, True]


def test_the_newest_rows_come_first_and_the_oldest_drop_out(config):
    rows = staleness.empty_rows(toy_run.changed(config, drafter={"buffer_megabytes": 0.07}))
    count = len(rows.tokens)
    assert count == 3 and buffer.DrafterBuffer is type(rows)

    def batch(*numbers):
        tokens = np.repeat(np.array(numbers, np.int32)[:, None], 72, axis=1)
        features = np.repeat(tokens[..., None].astype(np.float32), 64, axis=2)
        segments = np.where(tokens > 0, 0, INVALID)
        held = tokens, features, segments, tokens, tokens[:, 0]
        return Microbatch(*map(jnp.asarray, held))

    rows = staleness.with_newest(rows, [batch(1, 2)])
    assert rows.tokens[:, 0].tolist() == [1, 2, 0] and rows.filled == 2
    rows = staleness.with_newest(rows, [batch(3, 0)])
    assert rows.tokens[:, 0].tolist() == [3, 1, 2] and rows.filled == 3
    rows = staleness.with_newest(rows, [batch(4, 0)])
    assert rows.tokens[:, 0].tolist() == [4, 3, 1] and rows.features[:, 0, 0].tolist() == [4, 3, 1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"drafters": ("hess-72",)}, r"drafters has 'hess-72'; write 'frozen', or an objective"),
        ({"drafters": ("hass-100",)}, r"a multiple of the 72 tokens of an update, 'hass-72'"),
        ({"drafters": ("hass-0",)}, r"drafters has 'hass-0'; write 'frozen'"),
        ({"drafters": ("frozen", "frozen")}, r"drafters is .*; name each once"),
        ({"drafters": ()}, r"must name learning_rates, seeds and drafters"),
        ({"depth": 0}, r"staleness\.depth is 0; it must be 1 or more"),
        ({"depth": 40}, r"one round of the deepest strategy can add 41 tokens|length_buckets"),
    ],
)
def test_what_cannot_be_is_told_before_anything_runs(config, tmp_path, changes, sentence):
    changed = dataclasses.replace(config.staleness, **changes)
    with pytest.raises(UserError, match=sentence):
        staleness.run(dataclasses.replace(config, staleness=changed), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("groups", "sentence"),
    [
        ({"warm_start": {"row_length": 144}}, r"row_length is 144 and config\.drafter\.row_length"),
        ({"policy": {"feature_layers": ()}}, r"'eagle3', which reads several hidden states"),
        ({"rollout": {"verification": "rejection"}}, "in coupled verification alone"),
        ({"rollout": {"shared_noise": False}}, "in coupled verification alone"),
        ({"rollout": {"speculate": False}}, "in coupled verification alone"),
        ({"drafter": {"store_features": False}}, "learn from stored features"),
        ({"drafter": {"train_depth": 1}}, r"train_depth is 1, but the objective 'hass'"),
        ({"learner": {"kl_coef": 0.0}}, "drift is not measured"),
        ({"num_steps": 0}, "num_steps be 1 or more"),
        ({"warm_start_dir": "/nowhere"}, r"no weights at /nowhere/policy\.safetensors"),
    ],
)
def test_what_would_not_be_what_it_is_called_is_refused(config, tmp_path, groups, sentence):
    with pytest.raises(UserError, match=sentence):
        staleness.run(toy_run.changed(config, **groups), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_workdir_belongs_to_one_experiment(done, config):
    """Further seeds may be asked for, other drafters or steps may not; nothing is lost by it."""
    workdir, _ = done
    fewer = dataclasses.replace(config.staleness, drafters=("frozen",))
    with pytest.raises(UserError, match=r"another config\.staleness\.drafters"):
        staleness.run(dataclasses.replace(config, staleness=fewer), workdir)
    with pytest.raises(UserError, match=r"another config\.num_steps \(2, now 3\)"):
        staleness.run(dataclasses.replace(config, num_steps=3), workdir)
    assert len(list((workdir / "runs").iterdir())) == 2


def test_an_experiment_is_called_by_its_name(monkeypatch, tmp_path):
    config = "--config=configs/experiments/drafter_staleness.py"
    found = ablate.with_config(["ablate", "drafter_staleness", "--workdir=w"])
    assert found == ["ablate", config, "--workdir=w"]
    assert ablate.with_config(["ablate", "--workdir=w", "drafter_staleness"]) == found
    own = ["ablate", "drafter_staleness", "--config=mine.py", "--config.seed=3"]
    assert ablate.with_config(own) == ["ablate", *own[2:]]
    override = [*own[:2], "--config.seed=3"]
    assert ablate.with_config(override) == ["ablate", config, "--config.seed=3"]
    assert ablate.with_config(["ablate", "--help"]) == ["ablate", "--help"]
    with pytest.raises(UserError, match=r"no experiment 'stale': did you mean 'drafter_stalen"):
        ablate.with_config(["ablate", "stale"])
    with pytest.raises(UserError, match="name an experiment: drafter_staleness"):
        ablate.with_config(["ablate", "--workdir=w"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no configs/experiments/drafter_staleness\.py here; call"):
        ablate.with_config(["ablate", "drafter_staleness"])
