"""Pictures of what `python -m tlt_jax.benchmark` found, beside the paper's figures.

Every drawing function takes the findings of one part, as `benchmark.json` holds them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tlt_jax.reporting import paper
from tlt_jax.reporting.plots import STYLE
from tlt_jax.types import Strategy

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#7A7A7A", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*X"
_LINES = ("-", "--", ":", "-.")


def write(workdir: Path, part: str, findings: Sequence[Mapping[str, Any]]) -> Path | None:
    """Draws the picture of a part into `workdir/plots`; None for a part that has none."""
    if part not in FIGURES or not findings:
        return None
    path = workdir / "plots" / f"benchmark_{part}.png"
    path.parent.mkdir(exist_ok=True)
    with matplotlib.rc_context(STYLE):
        FIGURES[part](findings).savefig(path)
    return path


def grid(findings: Sequence[Mapping[str, Any]]) -> Figure:
    """Speed-up by live rows and accept length by verified tokens; below, the paper's."""
    figure = Figure(figsize=(11.5, 8))
    (speed, length), (paper_speed, paper_length) = figure.subplots(2, 2)
    findings = sorted(findings, key=lambda finding: finding["rows"])
    rows = [finding["rows"] for finding in findings]
    modes = [{mode["mode"]: mode for mode in finding["modes"]} for finding in findings]
    for index, name in enumerate(name for name in modes[0] if name != "plain"):
        speedups = [by_name[name]["full_speedup"] for by_name in modes]
        _line(speed, index, rows, speedups, name)
        strategy = Strategy.parse(name)
        accepted = [by_name[name]["accept_length"] for by_name in modes]
        _line(length, index, [strategy.verify_tokens] * len(rows), accepted, name)
    _speed_axes(
        speed, sorted(rows), "live rows per slice", "Speed-up over plain decoding, all rows live"
    )
    _length_axes(length, "Accept length, each strategy at each number of rows")
    for index, (tokens, ratios) in enumerate(paper.TABLE_4_SPEEDUP.items()):
        _line(paper_speed, index, paper.TABLE_4_ROWS, ratios, f"verify {tokens}")
    _speed_axes(paper_speed, paper.TABLE_4_ROWS, "batch", "The paper's table 4: 32B, depth 10")
    for index, (depth, accept_lengths) in enumerate(paper.FIGURE_13_ACCEPT_LENGTH.items()):
        _line(paper_length, index, paper.FIGURE_13_VERIFY, accept_lengths, f"depth {depth}")
    _length_axes(paper_length, "The paper's figure 13: 32B, top-k 8, one sequence")
    return figure


def drafts(findings: Sequence[Mapping[str, Any]]) -> Figure:
    """Acceptance by draft position and accept length of every way to draft and to verify."""
    figure = Figure(figsize=(11.5, 3.9 * len(findings)))
    for finding, (left, right) in zip(
        findings, figure.subplots(len(findings), 2, squeeze=False), strict=True
    ):
        modes = [mode for mode in finding["modes"] if mode["mode"] != "plain"]
        for index, mode in enumerate(modes):
            shares = mode["accept_by_position"]
            _line(left, index, range(1, len(shares) + 1), shares, mode["mode"])
            colour = _COLOURS[index % len(_COLOURS)]
            right.barh(index, mode["accept_length"], color=colour)
            told = f" {mode['accept_length']:.2f}, {mode['speedup']:.2f}x plain"
            right.text(mode["accept_length"], index, told, va="center", fontsize=9)
        depths = range(1, 1 + max(len(mode["accept_by_position"]) for mode in modes))
        left.xaxis.set_major_locator(FixedLocator(list(depths)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
        left.set(xlabel="draft position", ylabel="share of drafts accepted")
        left.set_title(f"Acceptance at temperature {finding['temperature']:g}")
        left.grid(axis="y")
        left.legend()
        right.set_yticks(range(len(modes)), [mode["mode"] for mode in modes])
        right.set_xlim(0, 1.35 * max(mode["accept_length"] for mode in modes))
        right.invert_yaxis()
        right.set(xlabel="tokens per round and sequence")
        right.set_title("Accept length, and speed")
    return figure


def memory(findings: Sequence[Mapping[str, Any]]) -> Figure:
    """Memory of the three pools, ours and the paper's, as shares of that of every strategy."""
    figure = Figure(figsize=(7.5, 3.6))
    axes = figure.subplots()
    pools = {held["pool"]: held for held in findings[0]["pools"]}
    most = paper.TABLE_5_GIGABYTES["every strategy"]
    for index, (name, held) in enumerate(pools.items()):
        theirs = paper.TABLE_5_GIGABYTES[name]
        axes.barh(index - 0.2, held["share"], 0.36, color=_COLOURS[0])
        axes.barh(index + 0.2, theirs / most, 0.36, color="#BBBBBB")
        told = f" {held['bytes'] / 2**20:.0f} MiB, {held['programs']} programs"
        axes.text(held["share"], index - 0.2, told, va="center", fontsize=9)
        axes.text(theirs / most, index + 0.2, f" paper: {theirs:g} GB", va="center", fontsize=9)
    axes.set_yticks(range(len(pools)), list(pools))
    axes.set_xlim(0, 1.35)
    axes.invert_yaxis()
    axes.set(xlabel="share of the memory of every strategy in every bucket")
    axes.set_title("Compiled programs held in memory")
    return figure


def trainer(findings: Sequence[Mapping[str, Any]]) -> Figure:
    """Held up by checkpoints, and training speed by packing; ours and the paper's as shares."""
    figure = Figure(figsize=(11.5, 3.6))
    left, right = figure.subplots(1, 2)
    measured = {finding["measured"]: finding["rivals"] for finding in findings}
    blocked = {row["rival"]: 1e3 * row["seconds"] for row in measured["checkpoints"]}
    speeds = {row["rival"]: row["samples_per_second"] for row in measured["packing"]}
    _share_bars(left, blocked, paper.FIGURE_17_HELD_UP_MS, "ms")
    left.set(xlabel="share of a synchronous checkpoint of everything")
    left.set_title("How long a step is held up by a checkpoint")
    _share_bars(right, speeds, paper.FIGURE_17_SAMPLES_PER_SECOND, "samples/s")
    right.set(xlabel="share of the speed with packed rows")
    right.set_title("How fast the drafter trains")
    return figure


def _share_bars(
    axes: Axes, ours: Mapping[str, float], theirs: Mapping[str, float], unit: str
) -> None:
    """Two bars for each name, each as a share of the first name's."""
    for index, name in enumerate(ours):
        for offset, who, values, colour in (
            (-0.2, "", ours, _COLOURS[0]),
            (0.2, "paper: ", theirs, "#BBBBBB"),
        ):
            share = values[name] / next(iter(values.values()))
            axes.barh(index + offset, share, 0.36, color=colour)
            told = f" {who}{float(f'{values[name]:.3g}'):g} {unit}"  # three digits, no exponent
            axes.text(share, index + offset, told, va="center", fontsize=9)
    axes.set_yticks(range(len(ours)), list(ours))
    axes.set_xlim(0, 1.5)
    axes.invert_yaxis()


FIGURES: dict[str, Callable[[Sequence[Mapping[str, Any]]], Figure]] = {
    "grid": grid,
    "drafts": drafts,
    "memory": memory,
    "trainer": trainer,
}
"""The picture of each part that has one."""


def _line(axes: Axes, index: int, x: Sequence[int], y: Sequence[float], label: str) -> None:
    axes.plot(
        x, y, label=label, markersize=5, color=_COLOURS[index % len(_COLOURS)],
        marker=_MARKERS[index % len(_MARKERS)], linestyle=_LINES[index % len(_LINES)],
    )  # fmt: skip


def _speed_axes(axes: Axes, rows: Sequence[int], label: str, title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(rows)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:g}"))
    axes.axhline(1, color="#7A7A7A", linewidth=1, linestyle=":", zorder=1)
    axes.set(xlabel=label, ylabel="times as fast as plain decoding")
    axes.set_title(title)
    axes.grid(axis="y")
    _legend_above(axes)


def _length_axes(axes: Axes, title: str) -> None:
    axes.set(xlabel="verified tokens", ylabel="tokens per round and sequence")
    axes.set_title(title)
    axes.grid(axis="y")
    _legend_above(axes)


def _legend_above(axes: Axes) -> None:
    """A legend in two columns over the lines, with room made for it."""
    count = len(axes.get_legend_handles_labels()[1])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.045 * (count + 1) * (high - low))
    axes.legend(ncols=2, loc="upper left")
