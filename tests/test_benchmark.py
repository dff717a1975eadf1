"""The benchmark on a toy run: every mode has plain decoding's tokens, and the rows add up."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import toy_run

from tlt_jax import benchmark, step_price
from tlt_jax.program_pool import ProgramPool

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
    """(configuration, what the benchmark returned, what it wrote)."""
    folder = tmp_path_factory.mktemp("benchmark")
    config = toy_run.changed(
        toy_run.CONFIG,
        policy={"num_layers": 1},
        task={"data_dir": str(folder / "data")},
        rollout={"strategies": ("chain-3",)},
        benchmark={
            "repeats": 2,
            "min_tokens": 300,
            "small_batch": 8,
            "strategies": ("chain-2",),
            "other_slices": (1,),
            "other_chunk_tokens": 9,
        },
    )
    results = benchmark.benchmark(config, folder)
    return config, results, json.loads((folder / "benchmark.json").read_text())


def test_what_is_returned_is_what_is_written(run):
    _, results, written = run
    assert written == json.loads(json.dumps(results))
    assert written["weights"] == "random initial weights"


def test_every_mode_has_the_tokens_of_plain_decoding(run):
    (workload,) = run[1]["workloads"]
    assert {row["mode"] for row in workload["modes"]} == MODES
    assert workload["tokens"] >= 300
    for row in workload["modes"]:
        assert row["mismatches"] == row["explained_mismatches"], row


def test_speed_ups_are_ratios_to_plain_decoding_of_the_same_repeat(run):
    (workload,) = run[1]["workloads"]
    rows = {row["mode"]: row for row in workload["modes"]}
    plain, other = rows["plain"], rows["chain-2"]
    assert plain["speedup"] == plain["speedup_min"] == plain["speedup_max"] == 1.0
    ratios = [a / b for a, b in zip(plain["seconds_all"], other["seconds_all"], strict=True)]
    assert (other["speedup_min"], other["speedup_max"]) == (min(ratios), max(ratios))
    assert rows["by bucket, chunks of 9"]["seconds"] is None
    assert plain["accept_length"] == 1.0 < rows["by bucket"]["accept_length"]


def test_a_round_of_both_strategies_is_profiled(run):
    found = {(entry["strategy"], entry["rows"]) for entry in run[1]["profile"]}
    assert found == {("plain", 4), ("chain-3", 4)}
    table = benchmark.profile_table(run[1]["profile"])
    assert len(table.splitlines()) == 4


def test_no_mode_knows_the_lengths_of_responses_beforehand(run):
    """The same prompts come back in every pass; a run meets them with other weights and keys."""
    config = run[0]
    _, prompts = benchmark.setup.load_task(config)
    plain, *_ = benchmark.modes(config, config.rollout.num_sequences)
    target = benchmark.setup.initial_policy(config)
    runner = benchmark.make_runner(plain, config, target, None, (2,), ProgramPool())
    result, _ = runner.run(*benchmark.draw_batch(plain.rollout, prompts, 0, 0))
    assert result.controller.history.lengths and not runner.controller.history.lengths


def test_the_bandit_has_plain_decoding_among_its_strategies(run):
    config = run[0]
    mode = next(m for m in benchmark.modes(config, 8) if m.name == "bandit")
    assert [str(arm) for arm in mode.rollout.arms(4)] == ["plain", "chain-2"]


def test_the_price_of_idle_training_is_a_ratio_of_the_same_repeats(run):
    config, results, _ = run
    price = results["step_price"]
    ratios = np.array(price["seconds_training"]) / np.array(price["seconds"])
    assert len(ratios) == config.benchmark.repeats
    assert price["ratio"] == pytest.approx(np.median(ratios))
    assert (price["ratio_min"], price["ratio_max"]) == (min(ratios), max(ratios))
    assert 0 < price["idle_used_share"] <= 1
    assert f"{price['ratio']:.3f}" in step_price.sentence(price)


def test_wrong_tokens_are_counted_and_not_explained(run):
    """A mode with another policy's weights, checked against plain decoding's tokens."""
    config = run[0]
    _, prompts = benchmark.setup.load_task(config)
    target = benchmark.setup.initial_policy(config)
    other = benchmark.setup.initial_policy(dataclasses.replace(config, seed=1))
    plain, *_ = benchmark.modes(config, config.rollout.num_sequences)
    drawn = [benchmark.draw_batch(plain.rollout, prompts, 0, index) for index in range(2)]
    right, wrong = (
        benchmark.make_runner(plain, config, params, None, (2,), ProgramPool())
        for params in (target, other)
    )
    expected = [right.run(*batch)[0].responses for batch in drawn]
    assert benchmark.check_mode(config, right, drawn, expected) == []
    parted = benchmark.check_mode(config, wrong, drawn, expected)
    assert len(parted) > 8 and not all(parting.explained for parting in parted)
    jax.block_until_ready(other)
