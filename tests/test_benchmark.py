"""The benchmark on a toy run: every mode has plain decoding's tokens, and the rows add up."""

import csv
import dataclasses
import json
import pathlib

import numpy as np
import pytest
import toy_run

from tlt_jax import benchmark, benchmark_parts, pool_price, profiling, race, step_price
from tlt_jax.program_pool import ProgramPool
from tlt_jax.types import Strategy, UserError

MODES = {
    "plain",
    "chain-2",
    "by bucket",
    "bandit",
    "by bucket + idle training",
    "plain, 1 slices",
    "by bucket, 1 slices",
    "chain-2, frozen drafter",
    "by bucket, chunks of 9",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(configuration, workdir, what the benchmark returned)."""
    folder = tmp_path_factory.mktemp("benchmark")
    config = toy_run.changed(
        toy_run.CONFIG,
        policy={"num_layers": 1},
        task={"data_dir": str(folder / "data")},
        rollout={"strategies": ("chain-3",)},
        benchmark={
            "parts": tuple(benchmark.PARTS),
            "repeats": 2,
            "min_tokens": 300,
            "small_batch": 8,
            "strategies": ("chain-2",),
            "other_slices": (1,),
            "other_chunk_tokens": 9,
            "grid_rows": (2,),
            "grid_strategies": ("chain-2",),
            "draft_strategies": ("chain-2",),
            "temperatures": (0.7,),
        },
    )
    return config, folder, benchmark.benchmark(config, folder)


def _rows(run, part):
    """Rows of the first race of a part by mode."""
    return {row["mode"]: row for row in run[2][part]["findings"][0]["modes"]}


def test_what_is_returned_is_what_is_written(run):
    _, folder, results = run
    assert json.loads((folder / "benchmark.json").read_text()) == json.loads(json.dumps(results))
    assert list(results) == list(benchmark.PARTS)
    assert results["batch"]["weights"] == "random initial weights"
    with (folder / "benchmark_batch.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["mode"] for line in lines if line["mode"]} == MODES
    speedups = {line["mode"]: line["speedup"] for line in lines}
    assert float(speedups["chain-2"]) == _rows(run, "batch")["chain-2"]["speedup"]
    assert speedups["by bucket, chunks of 9"] == ""
    choice = results["batch"]["findings"][0]["choice"]
    assert choice["best_single"] in {"plain", "chain-2"} and choice["perfect_choice"] > 1 - 1e-9


def test_parts_measured_before_stay(run):
    config, folder, results = run
    only = dataclasses.replace(config.benchmark, parts=("memory",))
    again = benchmark.benchmark(dataclasses.replace(config, benchmark=only), folder)
    assert again | {"memory": None} == json.loads(json.dumps(results)) | {"memory": None}


def test_an_unknown_part_is_refused_before_anything_is_measured(run, tmp_path):
    changed = dataclasses.replace(run[0].benchmark, parts=("memory", "gird"))
    with pytest.raises(UserError, match="'gird', which is no part: did you mean 'grid'"):
        benchmark.benchmark(dataclasses.replace(run[0], benchmark=changed), tmp_path)
    assert not list(tmp_path.iterdir())


def test_pictures_are_drawn(run):
    pictured = "grid", "drafts", "memory", "trainer"
    names = {path.name for path in (run[1] / "plots").iterdir()}
    assert names == {f"benchmark_{part}.png" for part in pictured}


@pytest.mark.parametrize("part", ["batch", "tail", "queue", "grid", "broken"])
def test_every_mode_has_the_tokens_of_plain_decoding(run, part):
    config, _, results = run
    rows = _rows(run, part)
    if part in ("batch", "tail"):
        assert set(rows) == MODES
    assert results[part]["findings"][0]["tokens"] >= config.benchmark.min_tokens // 4
    for row in rows.values():
        assert row["mismatches"] == row["explained_mismatches"], row


def test_speed_ups_are_ratios_to_plain_decoding_of_the_same_repeat(run):
    rows = _rows(run, "batch")
    plain, other = rows["plain"], rows["chain-2"]
    assert plain["speedup"] == plain["speedup_min"] == plain["speedup_max"] == 1.0
    ratios = [a / b for a, b in zip(plain["seconds_all"], other["seconds_all"], strict=True)]
    assert other["speedup_min"] == pytest.approx(min(ratios))
    assert other["speedup_max"] == pytest.approx(max(ratios))
    assert rows["by bucket, chunks of 9"]["seconds"] is None
    assert plain["accept_length"] == 1.0 < rows["by bucket"]["accept_length"]


def test_broken_drafters_are_no_drafters(run):
    """Of NaN logits the first token counts as best: hardly ever the sample."""
    rows = _rows(run, "broken")
    assert set(rows) == {"plain", "bandit", "bandit, random drafter", "bandit, NaN drafter"}
    assert rows["bandit, NaN drafter"]["accept_length"] < 1.2


def test_rejection_sampling_has_other_tokens_and_is_judged_by_its_own(run):
    rows = _rows(run, "drafts")
    plain, other = rows["plain"], rows["chain-2, rejection"]
    assert other["mismatches"] is None and rows["chain-2, most likely"]["mismatches"] == 0
    speeds = [row["tokens"] / np.array(row["seconds_all"]) for row in (other, plain)]
    assert other["speedup"] == pytest.approx(np.median(speeds[0] / speeds[1]))


def test_a_drafter_that_sees_the_noise_guesses_better(run):
    rows = _rows(run, "drafts")
    assert rows["chain-2"]["accept_length"] > rows["chain-2, most likely"]["accept_length"]


def test_a_queue_has_four_sequences_for_each_slot(run):
    config = run[0]
    modes = benchmark_parts.queue_modes(config)
    assert {mode.rollout.num_sequences for mode in modes} == {4 * config.rollout.num_sequences}
    runner = race.make_runner(modes[0], _subject(config), ProgramPool())
    assert 4 * runner.programs.slices * runner.programs.first_rows == 4 * 8


def test_a_round_of_both_strategies_is_profiled(run):
    profile = run[2]["batch"]["findings"][1]["profile"]
    assert {(entry["strategy"], entry["rows"]) for entry in profile} == {
        ("plain", 4),
        ("chain-3", 4),
    }
    assert len(profiling.table(profile).splitlines()) == 4


def _subject(config):
    _, prompts = benchmark.setup.load_task(config)
    draft = benchmark.setup.initial_drafter(config)
    target = benchmark.setup.initial_policy(config)
    return race.Subject(config, prompts, (2,), target, {"trained": draft}, "", pathlib.Path())


def _plain(config, **changes):
    mode, *_ = benchmark_parts.modes(config, config.rollout.num_sequences)
    return dataclasses.replace(mode, **changes)


def test_only_an_informed_mode_knows_how_long_responses_will_be(run, monkeypatch):
    """And it knows those of another key; the same prompts come back in every pass."""
    began, subject = [], _subject(run[0])
    inner = race.rollout.run

    def noting(programs, target, carry, prompts, key, **options):
        began.append((key, carry.controller.history.lengths))
        return inner(programs, target, carry, prompts, key, **options)

    monkeypatch.setattr(race.rollout, "run", noting)
    for informed in (False, True):
        runner = race.make_runner(_plain(run[0], informed=informed), subject, ProgramPool())
        drawn = race.draw_batch(subject, runner.mode.rollout, 0)
        race.compare(subject, runner, [drawn], [runner.run(*drawn)[0].responses])
        runner.run(*drawn)
        assert bool(began[-1][1]) == informed
    keys = [key for key, known in began if not known]
    assert len({tuple(np.asarray(race.jax.random.key_data(key))) for key in keys}) == 2


def test_the_bandit_has_plain_decoding_among_its_strategies(run):
    mode = next(m for m in benchmark_parts.modes(run[0], 8) if m.name == "bandit")
    assert [str(arm) for arm in mode.rollout.arms(4)] == ["plain", "chain-2"]


def test_the_price_of_idle_training_is_a_ratio_of_the_same_repeats(run):
    config, _, results = run
    price = results["training"]["findings"][0]
    assert [row["side"] for row in price["sides"]] == list(step_price.SIDES)
    plain, _, resting, training = (np.array(row["seconds_all"]) for row in price["sides"])
    over_resting = {key.removeprefix("over_resting_"): x for key, x in price["training"].items()}
    for told, ratios in (
        (over_resting, training / resting),
        (price["sides"][3], training / plain),
    ):
        assert len(ratios) == config.benchmark.repeats
        assert told["times"] == pytest.approx(np.median(ratios))
        assert (told["times_min"], told["times_max"]) == (min(ratios), max(ratios))
    assert benchmark.lines(price)[-1].items() >= price["training"].items()
    assert [row["accept_length"] > 1 for row in price["sides"]] == [False, True, True, True]
    assert 0 < price["training"]["idle_used_share"] <= 1
    assert f"takes {over_resting['times']:.3f}" in step_price.table(price)


def test_wrong_tokens_are_counted_and_not_explained(run):
    """A mode with another policy's weights, checked against plain decoding's tokens."""
    config = run[0]
    subject = _subject(config)
    other = benchmark.setup.initial_policy(dataclasses.replace(config, seed=1))
    mode = _plain(config)
    drawn = [race.draw_batch(subject, mode.rollout, index) for index in range(2)]
    right, wrong = (
        race.make_runner(mode, held, ProgramPool())
        for held in (subject, dataclasses.replace(subject, target=other))
    )
    expected = [right.run(*batch)[0].responses for batch in drawn]
    assert race.compare(subject, right, drawn, expected)["mismatches"] == 0
    row = race.compare(subject, wrong, drawn, expected)
    assert row["mismatches"] > 8 and row["explained_mismatches"] < row["mismatches"]


def test_pools_hold_what_they_say(run):
    """One row bucket and one length: three strategies at most, of which two are kept."""
    pools = {held["pool"]: held for held in run[2]["memory"]["findings"][0]["pools"]}
    assert {name: held["programs"] for name, held in pools.items()} == {
        "one strategy": 1,
        "every strategy": 3,
        "bucketed": 2,
    }
    every = pools["every strategy"]
    assert every["share"] == 1 > pools["bucketed"]["share"] > 0
    for held in pools.values():
        assert held["bytes"] == held["code_bytes"] + held["scratch_bytes"] > 0
        assert held["cold_seconds"] > 0 and held["cached_seconds"] > 0
    assert len(pool_price.table(list(pools.values())).splitlines()) == 5


def test_lengths_grow_as_rows_shrink_in_a_bucketed_pool(run):
    config = run[0]
    rollout = dataclasses.replace(
        config.rollout,
        row_buckets=(4, 2, 1),
        strategies=("plain chain-2 chain-3",) * 3,
        length_buckets=(32, 48, config.rollout.length_buckets[-1]),
    )
    runner = race.make_runner(race.Mode("", rollout, 2), _subject(config), ProgramPool())
    pools = pool_price.places(runner.programs, dict.fromkeys((4, 2, 1), Strategy(2)))
    assert len(pools["every strategy"]) == 3 * 3 * 3
    assert len(pools["one strategy"]) == 3 + 2 + 1 and len(pools["bucketed"]) == 2 * (3 + 2 + 1)
