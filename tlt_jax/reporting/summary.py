"""The page a person reads first after a run: `summary.md`, only numbers from the logs."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tlt_jax.reporting.plots import FIGURES
from tlt_jax.reporting.run_files import PHASES, Run, first_and_last, read_run
from tlt_jax.reporting.writers import Record, non_finite, write_atomically


def write_summary(workdir: str | os.PathLike[str]) -> Path:
    """Writes `workdir/summary.md` and returns its path; the file is replaced in one go.

    Call it after `plots.write_all`: it links the pictures that are there.

    Raises:
      UserError: a log is missing, empty or malformed; see `read_run`.
    """
    workdir = Path(workdir)
    path = workdir / "summary.md"
    drawn = [name for name in FIGURES if (workdir / "plots" / f"{name}.png").is_file()]
    text = summary_text(read_run(workdir), workdir=str(workdir), drawn=drawn)
    write_atomically(path, text.encode("utf-8"))
    return path


def summary_text(run: Run, *, workdir: str, drawn: Sequence[str]) -> str:
    """The summary as Markdown.

    Args:
      run: the run's records.
      workdir: how the commands at the end name the workdir.
      drawn: names of the pictures in `plots/`, without `.png`.
    """
    sections = [
        ["# Summary of a run", "", _headline(run)],
        ["## Result", "", *_result_table(run), "", *_findings(run)],
        ["## Where the time went", "", *_seconds_table(run.metrics)],
        ["## Pictures", "", *_pictures(workdir, drawn)],
        ["## What ran", "", *_what_ran(run)],
        ["## What next", "", *_commands(workdir)],
    ]
    return "\n\n".join("\n".join(section) for section in sections) + "\n"


def mean(rows: Sequence[Record], name: str) -> float | None:
    """Mean of a metric over the rows that have it, NaN if one is NaN; None if no row has it."""
    values = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(values)) if values else None


def idle_used_share(rows: Sequence[Record]) -> float | None:
    """Share of all idle slice-seconds spent on drafter training; None if nothing was ever idle."""
    idle = sum(row["idle_seconds"] for row in rows)
    return sum(row["idle_training_seconds"] for row in rows) / idle if idle else None


def seconds_by_phase(rows: Sequence[Record]) -> dict[str, tuple[float, float]]:
    """Per phase: median seconds of a step, and its share of the total seconds of all steps."""
    total = sum(row["seconds"]["total"] for row in rows)
    result = {}
    for phase in PHASES:
        seconds = [row["seconds"][phase] for row in rows]
        result[phase] = float(np.median(seconds)), sum(seconds) / total if total else 0.0
    return result


def _headline(run: Run) -> str:
    metrics = run.metrics
    tokens = sum(row["tokens"] for row in metrics)
    seconds = sum(row["seconds"]["total"] for row in metrics)
    slices = len(run.decisions[-1]["roles"])
    return (
        f"{_count(len(metrics), 'step')} ({metrics[0]['step']} to {metrics[-1]['step']}) on "
        f"{_count(slices, 'slice')}, {tokens:,} response tokens, {seconds:.1f} seconds."
    )


def _result_table(run: Run) -> list[str]:
    first, last = first_and_last(run.metrics)
    lengths = [
        [length for row in rows for length in row["responses"]["length"]] for rows in (first, last)
    ]

    def metric(title: str, name: str, style: str) -> str:
        return f"| {title} | {_show(mean(first, name), style)} | {_show(mean(last, name), style)} |"

    def length(title: str, measure: Callable[[list[int]], float]) -> str:
        return f"| {title} | {measure(lengths[0]):.0f} | {measure(lengths[1]):.0f} |"

    def percentile(percent: int) -> Callable[[list[int]], float]:
        return lambda values: float(np.percentile(values, percent, method="inverted_cdf"))

    steps = _count(len(first), "step")
    return [
        f"| | start (first {steps}) | end (last {steps}) |",
        "| --- | ---: | ---: |",
        metric("reward, mean", "reward_mean", ".3f"),
        metric("accept length, tokens per round and sequence", "accept_length", ".2f"),
        metric("rollout speed, tokens per second", "tokens_per_second", ".0f"),
        metric("drafter loss", "drafter_loss", ".3f"),
        length("response length, tokens: mean", lambda values: float(np.mean(values))),
        length("response length, tokens: p50", percentile(50)),
        length("response length, tokens: p99", percentile(99)),
        length("response length, tokens: longest", max),
        metric("truncated responses", "truncated_share", ".1%"),
    ]


def _findings(run: Run) -> list[str]:
    metrics = run.metrics
    share = idle_used_share(metrics)
    if share is None:
        idle = "No slice was ever idle during a rollout."
    else:
        seconds = sum(row["idle_seconds"] for row in metrics)
        idle = f"Idle time used for drafter training: {share:.0%} of {seconds:.1f} slice-seconds."
    if all(chunk["strategy"] == "plain" for chunk in run.decisions):
        idle += " All decoding was plain."
    gaps = np.asarray([row["logprob_gap_max"] for row in metrics], np.float64)
    worst = int(np.argmax(gaps))  # a NaN is larger than any number here
    lines = [
        f"- {idle}",
        f"- Programs compiled after warm-up: {sum(row['compiles'] for row in metrics)}.",
        "- Largest gap between the behaviour log-probabilities and the trainer's recomputation: "
        f"{gaps[worst]:.2g} nats (step {metrics[worst]['step']}).",
        f"- Drafter updates: {sum(row['drafter_updates'] for row in metrics)}.",
    ]
    broken = [(row["step"], name) for row in metrics for name, _ in non_finite(row)]
    if broken:
        names = ", ".join(sorted({name for _, name in broken}))
        steps = ", ".join(str(step) for step in sorted({step for step, _ in broken}))
        lines.append(f"- **Not finite:** {names} (steps {steps}).")
    return lines


def _seconds_table(metrics: list[Record]) -> list[str]:
    rows = [
        f"| {phase.replace('_', ' ')} | {median:.3f} | {share:.1%} |"
        for phase, (median, share) in seconds_by_phase(metrics).items()
    ]
    header = "| phase | median seconds per step | share of all seconds |"
    return [header, "| --- | ---: | ---: |", *rows]


def _pictures(workdir: str, drawn: Sequence[str]) -> list[str]:
    if not drawn:
        return [f"None yet: `python -m tlt_jax.report {workdir}` draws them."]
    links = [f"- [{name.replace('_', ' ')}](plots/{name}.png)" for name in drawn]
    if "overview" in drawn:
        return ["![overview of the run](plots/overview.png)", "", *links]
    return links


def _what_ran(run: Run) -> list[str]:
    strategies = Counter(chunk["strategy"] for chunk in run.decisions)
    used = ", ".join(f"{name} {count}" for name, count in strategies.most_common())
    lines = [f"Chunks by strategy: {used}."]
    if run.config is None:
        return [*lines, "", "There is no `config.json` in the workdir."]
    return [*lines, "", "```", *_config_lines(run.config), "```"]


def _config_lines(config: dict[str, Any]) -> list[str]:
    """One line per top-level entry; a section becomes `name: key=value key=value`."""
    lines = []
    for name, value in config.items():
        if isinstance(value, dict):
            pairs = " ".join(f"{key}={json.dumps(inner)}" for key, inner in value.items())
            lines.append(f"{name}: {pairs}")
        else:
            lines.append(f"{name} = {json.dumps(value)}")
    return lines


def _commands(workdir: str) -> list[str]:
    return [
        "Resume or extend the run, compare rollout modes on its config, draw this page again "
        "(`CONFIG` is the config file the run was started with):",
        "",
        "```",
        f"python -m tlt_jax.train --config=CONFIG --workdir={workdir}",
        f"python -m tlt_jax.benchmark --config=CONFIG --workdir={workdir}",
        f"python -m tlt_jax.report {workdir}",
        "```",
    ]


def _show(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
