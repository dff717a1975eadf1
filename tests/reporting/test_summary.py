"""The summary page, against arithmetic by hand."""

import json

import pytest

from tlt_jax.reporting.plots import FIGURES
from tlt_jax.reporting.run_files import read_run
from tlt_jax.reporting.summary import (
    idle_used_share,
    mean,
    seconds_by_phase,
    summary_text,
    write_summary,
)
from tlt_jax.types import UserError


def test_figures_by_hand(make_metrics):
    rows = [
        make_metrics(0, drafter_loss=None, idle_seconds=0.0, idle_training_seconds=0.0),
        make_metrics(1, drafter_loss=2.0, idle_seconds=1.0, idle_training_seconds=0.25),
        make_metrics(2, drafter_loss=1.0, idle_seconds=3.0, idle_training_seconds=2.75),
    ]
    assert mean(rows, "drafter_loss") == 1.5
    assert mean(rows[:1], "drafter_loss") is None
    assert idle_used_share(rows) == 0.75
    assert idle_used_share(rows[:1]) is None


def test_phase_medians_and_shares_by_hand(make_metrics):
    learn, total = [1.0, 2.0, 6.0], [4.0, 6.0, 10.0]
    rows = [
        make_metrics(i, seconds={"learn": pair[0], "total": pair[1]})
        for i, pair in enumerate(zip(learn, total, strict=True))
    ]
    phases = seconds_by_phase(rows)
    assert phases["learn"] == (2.0, 9 / 20)
    assert phases["total"] == (6.0, 1.0)
    assert phases["rollout"] == (2.5, 7.5 / 20)


def test_page_compares_start_and_end(make_workdir, make_metrics):
    metrics = [
        make_metrics(
            step,
            reward_mean=step / 10,
            accept_length=1.0 + step,
            responses={"length": [step + 1, 100]},
            logprob_gap_max=1e-5 * (3 if step == 4 else 1),
            compiles=int(step == 2),
        )
        for step in range(12)
    ]
    text = summary_text(read_run(make_workdir(metrics)), workdir="DIR", drawn=["overview"])
    for line in (
        "12 steps (0 to 11) on 2 slices, 1,200 response tokens, 48.0 seconds.",
        "| | start (first 5 steps) | end (last 5 steps) |",
        "| reward, mean | 0.200 | 0.900 |",  # means of 0, .1 .. .4 and of .7, .8 .. 1.1
        "| accept length, tokens per round and sequence | 3.00 | 10.00 |",
        "| response length, tokens: mean | 52 | 55 |",  # 515 / 10 and 550 / 10
        "| response length, tokens: p50 | 5 | 12 |",  # the fifth of ten
        "| response length, tokens: longest | 100 | 100 |",
        "| truncated responses | 25.0% | 25.0% |",
        "- Idle time used for drafter training: 75% of 12.0 slice-seconds.",
        "- Programs compiled after warm-up: 1.",
        "| rollout | 2.500 | 62.5% |",
        "![overview of the run](plots/overview.png)",
        "Chunks by strategy: plain 12, chain-2 12.",
        "python -m tlt_jax.train --config=CONFIG --workdir=DIR",
    ):
        assert line in text.splitlines(), line
    assert "3e-05 nats (step 4)" in text
    assert "Not finite" not in text


def test_page_of_one_plain_step_with_a_broken_number(make_workdir, make_metrics, make_chunk):
    row = make_metrics(
        7,
        accept_length=1.0,
        drafter_loss=None,
        idle_seconds=0.0,
        idle_training_seconds=0.0,
        logprob_gap_max=float("nan"),
    )
    chunk = make_chunk(7, strategy="plain", roles=["ROLLOUT", "IDLE"])
    text = summary_text(read_run(make_workdir([row], [chunk])), workdir="DIR", drawn=[])
    assert "1 step (7 to 7) on 2 slices" in text
    assert "| drafter loss | - | - |" in text
    assert "- No slice was ever idle during a rollout. All decoding was plain." in text
    assert "nan nats (step 7)" in text
    assert "- **Not finite:** logprob_gap_max (steps 7)." in text
    assert "None yet: `python -m tlt_jax.report DIR` draws them." in text


def test_file_is_written_with_config_and_links_to_what_was_drawn(make_workdir, make_metrics):
    workdir = make_workdir([make_metrics(0), make_metrics(1)])
    (workdir / "config.json").write_text(json.dumps({"seed": 3, "model": {"layers": 2, "x": None}}))
    (workdir / "plots").mkdir()
    (workdir / "plots" / "reward_by_step.png").touch()
    assert "reward_by_step" in FIGURES
    path = write_summary(workdir)
    assert path == workdir / "summary.md"
    text = path.read_text()
    assert "seed = 3\nmodel: layers=2 x=null\n" in text
    assert "- [reward by step](plots/reward_by_step.png)" in text
    assert "overview" not in text
    assert not [file for file in workdir.iterdir() if file.name.startswith(".")]


def test_missing_logs_write_no_page(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        write_summary(tmp_path)
    assert not (tmp_path / "summary.md").exists()
