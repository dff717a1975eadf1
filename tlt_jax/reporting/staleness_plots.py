"""Pictures and tables of the experiment `drafter_staleness`, beside the paper's.

Every run is a file of JSON lines; every function here but `write` takes runs as `read` gives them,
the lines of each by the policy's learning rate.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from tlt_jax.reporting import paper
from tlt_jax.reporting.plots import STYLE
from tlt_jax.reporting.writers import read_jsonl, write_csv

Runs = dict[float, list[list[dict[str, Any]]]]

_COLOURS = ("#000000", "#56B4E9", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#7A7A7A", "#D55E00")
_LINES = ("--", ":", "-", "-", "-.", "-", ":", "--")
_SMOOTHING = 5  # steps
AT_EITHER_END = 5
"""Steps whose mean stands for the beginning and the end of a run in the tables."""


def write(workdir: Path, files: Iterable[Path]) -> list[Path]:
    """Writes `plots/drafter_staleness*.png` and `drafter_staleness.csv` of the runs in `files`.

    Returns the paths written.
    """
    runs, folder = read(files), workdir / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, draw in (("drafter_staleness", overview), ("drafter_staleness_course", course)):
        paths.append(folder / f"{name}.png")
        with matplotlib.rc_context(STYLE):
            draw(runs).savefig(paths[-1])
    paths.append(workdir / "drafter_staleness.csv")
    write_csv(paths[-1], table(runs))
    return paths


def read(files: Iterable[Path]) -> Runs:
    """The lines of all runs, learning rates rising."""
    found: dict[float, list[list[dict[str, Any]]]] = defaultdict(list)
    for path in files:
        lines = list(read_jsonl(path))
        found[lines[0]["learning_rate"]].append(lines)
    return dict(sorted(found.items()))


def drafters(runs: Runs) -> list[str]:
    """Names of the drafters, in the order of the configuration."""
    return list(next(iter(runs.values()))[0][0]["drafters"])


def table(runs: Runs) -> list[dict[str, Any]]:
    """A line for each learning rate and drafter; accept lengths are means over steps and seeds.

    `gain` is the accept length at the end over that of the frozen drafter in the same run, median,
    least and greatest of the seeds. `cost` is the time training takes, that of EAGLE taken as one.
    """
    lines = []
    for rate, of_rate in runs.items():
        prices = _prices(of_rate)
        eagle = next((prices[name] for name in prices if name.startswith("eagle-")), None)
        for name in drafters(runs):
            first, last = (
                np.array([_accept_length(run[part], name) for run in of_rate])
                for part in (slice(AT_EITHER_END), slice(-AT_EITHER_END, None))
            )
            line = {"learning_rate": rate, "drafter": name, "seeds": len(of_rate)}
            line |= {"kl": float(np.mean([run[-1]["kl"] for run in of_rate]))}
            line |= {"accept_length_first": first.mean(), "accept_length_last": last.mean()}
            if "frozen" in drafters(runs):
                frozen = [_accept_length(run[-AT_EITHER_END:], "frozen") for run in of_rate]
                gains = last / np.array(frozen)
                line |= {"gain": np.median(gains), "gain_min": gains.min(), "gain_max": gains.max()}
            line["cost"] = prices[name] / eagle if eagle and name in prices else None
            lines.append(line)
    return lines


def overview(runs: Runs) -> Figure:
    """Accept length by step, and below acceptance by draft position at the end, by drift."""
    figure = Figure(figsize=(3.6 * len(runs) + 1.6, 7.4))
    above, below = figure.subplots(2, len(runs), squeeze=False, sharey="row")
    for column, (rate, of_rate) in enumerate(runs.items()):
        lengths, shares = above[column], below[column]
        for index, name in enumerate(drafters(runs)):
            _by_step(lengths, index, of_rate, name, "accept_length")
            _by_position(shares, index, of_rate, name)
        lengths.set_title(f"Learning rate {rate:g}")
        lengths.set(xlabel="RL step", ylabel="tokens per round and sequence")
        for label, line in paper.FIGURE_16_ACCEPTANCE.items():
            positions = range(1, len(line) + 1)
            style = "--" if label == "frozen" else "-"
            label = f"the paper's, {label}"
            shares.plot(positions, line, label=label, zorder=1, color="#BBBBBB", linestyle=style)
        shares.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        shares.set(xlabel="draft position", ylabel=f"accepted, last {AT_EITHER_END} steps")
        for axes in (lengths, shares):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid(axis="y")
            if column > 0:
                axes.set_ylabel("")
    columns = min(1 + len(runs), 4)
    handles, labels = above[0].get_legend_handles_labels()
    papers, theirs = below[0].get_legend_handles_labels()
    count = len(paper.FIGURE_16_ACCEPTANCE)
    figure.legend(
        handles + papers[-count:],
        labels + theirs[-count:],
        loc="outside upper center",
        ncols=columns,
    )
    return figure


def course(runs: Runs) -> Figure:
    """What the policy does: drift and reward by step; what drafters learn: their losses."""
    figure = Figure(figsize=(11.5, 3.6))
    drift, reward, loss = figure.subplots(1, 3)
    for index, (rate, of_rate) in enumerate(runs.items()):
        for axes, name in ((drift, "kl"), (reward, "reward_mean")):
            values = np.array([[line[name] for line in run] for run in of_rate])
            _line(axes, index, values, f"learning rate {rate:g}")
    fastest = list(runs)[-1]
    for index, name in enumerate(drafters(runs)):
        if runs[fastest][0][0]["drafters"][name]["loss"] is not None:
            _by_step(loss, index, runs[fastest], name, "loss")
    drift.set_title("Drift: KL to the policy at the start")
    drift.set(xlabel="RL step", ylabel="nats per token")
    reward.set_title("Reward")
    reward.set(xlabel="RL step", ylabel="mean reward")
    loss.set_title(f"Drafters' losses, learning rate {fastest:g}")
    loss.set(xlabel="RL step", ylabel="mean loss of a step")
    for axes in (drift, reward, loss):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y")
        axes.legend()
    return figure


def _accept_length(lines: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([line["drafters"][name]["accept_length"] for line in lines]))


def _prices(runs: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Seconds of a lesson by drafter, medians of the runs."""
    told = [run[0]["prices"] for run in runs]
    return {name: float(np.median([prices[name] for prices in told])) for name in told[0]}


def _by_step(
    axes: Axes, index: int, runs: Sequence[Sequence[Mapping[str, Any]]], name: str, figure: str
) -> None:
    values = [[line["drafters"][name][figure] for line in run] for run in runs]
    _line(axes, index, np.array(values), name)


def _line(axes: Axes, index: int, values: np.ndarray, label: str) -> None:
    """The mean of [seeds, steps], and behind it all that lies between the seeds; both smoothed."""
    window = np.ones(min(_SMOOTHING, values.shape[1]))
    smooth = np.array([np.convolve(run, window, "valid") / window.size for run in values])
    steps = np.arange(smooth.shape[1]) + (window.size - 1) / 2
    colour, line = _COLOURS[index % len(_COLOURS)], _LINES[index % len(_LINES)]
    axes.plot(steps, smooth.mean(axis=0), label=label, color=colour, linestyle=line)
    if len(values) > 1:
        bounds = smooth.min(axis=0), smooth.max(axis=0)
        axes.fill_between(steps, *bounds, color=colour, alpha=0.07, linewidth=0)


def _by_position(
    axes: Axes, index: int, runs: Sequence[Sequence[Mapping[str, Any]]], name: str
) -> None:
    held = [line["drafters"][name] for run in runs for line in run[-AT_EITHER_END:]]
    if held[0]["accept_by_position"] is None:
        return
    shares = np.mean([one["accept_by_position"] for one in held], axis=0)
    axes.plot(
        range(1, len(shares) + 1),
        shares,
        label=name,
        color=_COLOURS[index % len(_COLOURS)],
        linestyle=_LINES[index % len(_LINES)],
    )
