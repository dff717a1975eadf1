"""Pictures of a run: rows of `metrics.jsonl` and `decisions.jsonl` become matplotlib figures.

Every figure function takes rows as `run_files.read_run` returns them and has no side effect;
`write_all` saves them. Colours are those of Okabe and Ito, which stay apart under colour blindness,
and every distinction that a colour makes is also made by lightness, line style or marker.
"""

import os
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from tlt_jax.reporting.run_files import Run, first_and_last, read_run
from tlt_jax.reporting.timeline import (
    Activity,
    Span,
    StepTimeline,
    live_over_time,
    merge_spans,
    step_timeline,
)
from tlt_jax.reporting.writers import Record
from tlt_jax.types import UserError

STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
}
_BLUE, _GREY, _VERMILION = "#0072B2", "#7A7A7A", "#D55E00"
_ACTIVITY_COLOURS = {
    Activity.ROLLOUT: _BLUE,
    Activity.TRAINING: "#E69F00",
    Activity.IDLE: "#E3E3E3",
}
_PHASE_COLOUR = "#767676"
_SMOOTHING = 5  # steps


class _Look(NamedTuple):
    colour: str
    line: str
    marker: str


_FIRST, _LAST = _Look(_GREY, "--", "o"), _Look(_BLUE, "-", "s")


def write_all(workdir: str | os.PathLike[str]) -> list[Path]:
    """Draws every picture of a run into `workdir/plots` and returns the paths written.

    Raises:
      UserError: a log is missing, empty or malformed; see `read_run`.
    """
    run = read_run(workdir)
    folder = Path(workdir) / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    for name, draw in FIGURES.items():
        path = folder / f"{name}.png"
        with matplotlib.rc_context(STYLE):
            draw(run).savefig(path)
        paths.append(path)
    return paths


@matplotlib.rc_context(STYLE)
def overview(run: Run) -> Figure:
    """One wide picture: reward, accept length and response lengths above one rollout's slices."""
    figure = Figure(figsize=(10.5, 5.8))
    grid = figure.add_gridspec(2, 3, height_ratios=(1.15, 1))
    _draw_reward(figure.add_subplot(grid[0, 0]), run.metrics)
    _draw_accept_length(figure.add_subplot(grid[0, 1]), run.metrics)
    _draw_survival(figure.add_subplot(grid[0, 2]), run.metrics)
    axes = figure.add_subplot(grid[1, :])
    timeline = _telling(_timelines(run))[-1]
    _draw_timeline(axes, [timeline], rollout_only=True)
    _timeline_title(axes, f"What each slice did in the rollout of step {timeline.step}")
    return figure


def _telling(timelines: Sequence[StepTimeline]) -> Sequence[StepTimeline]:
    """Steps up to the last one in which a slice trained the drafter; all if none ever did."""
    trained = [
        index
        for index, timeline in enumerate(timelines)
        if any(span.activity is Activity.TRAINING for span in timeline.spans)
    ]
    return timelines[: trained[-1] + 1] if trained else timelines


@matplotlib.rc_context(STYLE)
def slice_timeline(
    run: Run, *, steps: Sequence[int] | None = None, zoom: int | None = None
) -> Figure:
    """One lane per slice: rollout, drafter training, idle; below, the rollout of one step enlarged.

    Args:
      run: the run.
      steps: steps of the upper part; three up to the last with drafter training if not given.
      zoom: step of the lower part; the last one of `steps` if not given.

    Raises:
      UserError: a step is not in both logs.
    """
    timelines = {timeline.step: timeline for timeline in _timelines(run)}
    chosen = [t.step for t in _telling(list(timelines.values()))[-3:]]
    chosen = chosen if steps is None else list(steps)
    zoom = chosen[-1] if zoom is None else zoom
    unknown = [step for step in (*chosen, zoom) if step not in timelines]
    if unknown:
        raise UserError(
            f"step {unknown[0]} has no finished rollout in the logs; "
            f"they hold steps {min(timelines)} to {max(timelines)}."
        )
    lanes = 1 + max(span.slice_index for span in timelines[zoom].spans)
    height = min(0.16 * lanes, 3.5)
    figure = Figure(figsize=(10.5, 3.6 + 2 * height))
    above, below = figure.subplots(2, 1)
    _draw_timeline(above, [timelines[step] for step in chosen])
    _timeline_title(above, "What each slice did")
    _draw_timeline(below, [timelines[zoom]], rollout_only=True)
    below.set_title(f"Step {zoom}, rollout only")
    return figure


@matplotlib.rc_context(STYLE)
def live_sequences(run: Run) -> Figure:
    """Live sequences of all slices over time, in the first and the last step."""
    figure = Figure(figsize=(6.4, 3.8))
    axes = figure.subplots()
    steps = _chunks_by_step(run)
    ends = list(dict.fromkeys((min(steps), max(steps))))
    for step, look in zip(ends, _looks(len(ends)), strict=True):
        times, counts = live_over_time(steps[step])
        axes.step(
            times, counts, where="post", color=look.colour, ls=look.line, label=f"step {step}"
        )
    axes.set(xlabel="seconds since the first chunk", ylabel="live sequences")
    axes.set_title("Sequences still generating")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.legend()
    return figure


@matplotlib.rc_context(STYLE)
def response_lengths(run: Run) -> Figure:
    """Share of responses at least so long, in the first and the last steps."""
    figure = Figure(figsize=(6.4, 4.2))
    _draw_survival(figure.subplots(), run.metrics)
    return figure


@matplotlib.rc_context(STYLE)
def reward_by_step(run: Run) -> Figure:
    """Mean reward of each step."""
    figure = Figure(figsize=(6.4, 3.8))
    _draw_reward(figure.subplots(), run.metrics)
    return figure


@matplotlib.rc_context(STYLE)
def accept_by_step(run: Run) -> Figure:
    """Accept length of each step, and acceptance by draft position in the first and last steps."""
    figure = Figure(figsize=(10.5, 3.8))
    left, right = figure.subplots(1, 2)
    _draw_accept_length(left, run.metrics)
    _draw_accept_by_position(right, run.metrics)
    return figure


FIGURES: dict[str, Callable[[Run], Figure]] = {
    "overview": overview,
    "slice_timeline": slice_timeline,
    "live_sequences": live_sequences,
    "response_lengths": response_lengths,
    "reward_by_step": reward_by_step,
    "accept_by_step": accept_by_step,
}
"""Every picture by its file name (without `.png`), in the order a reader wants them."""


def survival(lengths: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Distinct lengths, ascending, and the share of responses at least that long.

    Returns:
      `[N] int64` tokens and `[N] float64` shares; the first share is 1.
    """
    distinct, counts = np.unique(np.asarray(lengths, np.int64), return_counts=True)
    return distinct, counts[::-1].cumsum()[::-1] / len(lengths)


def mean_by_position(rows: Sequence[Record]) -> list[float]:
    """Mean over rows of `accept_by_position`; a row counts for the positions it has."""
    depth = max((len(row["accept_by_position"]) for row in rows), default=0)
    columns = (
        [row["accept_by_position"][i] for row in rows if i < len(row["accept_by_position"])]
        for i in range(depth)
    )
    return [float(np.mean(column)) for column in columns]


def _chunks_by_step(run: Run) -> dict[int, list[Record]]:
    return {
        step: list(chunks) for step, chunks in groupby(run.decisions, lambda chunk: chunk["step"])
    }


def _timelines(run: Run) -> list[StepTimeline]:
    rows = {row["step"]: row for row in run.metrics}
    return [step_timeline(chunks, rows[step]) for step, chunks in _chunks_by_step(run).items()]


def _looks(count: int) -> tuple[_Look, ...]:
    return (_FIRST, _LAST) if count == 2 else (_LAST,)


def _windows(metrics: list[Record]) -> list[tuple[str, list[Record], _Look]]:
    """Label, rows and look of the first and last steps, or of the only step."""
    first, last = first_and_last(metrics)
    if len(metrics) == 1:
        return [(f"step {metrics[0]['step']}", last, _LAST)]
    plural = f"{len(first)} steps" if len(first) > 1 else "step"
    return [(f"first {plural}", first, _FIRST), (f"last {plural}", last, _LAST)]


def _draw_timeline(
    axes: Axes, timelines: Sequence[StepTimeline], *, rollout_only: bool = False
) -> None:
    """Steps one after another, slice 0 on top, other phases as a thin band under the slices."""
    extents = [timeline.rollout_end if rollout_only else timeline.seconds for timeline in timelines]
    width = sum(extents)
    lanes = 1 + max(span.slice_index for timeline in timelines for span in timeline.spans)
    band = (lanes - 0.3, max(0.2, lanes / 10))
    offset = 0.0
    for timeline, extent in zip(timelines, extents, strict=True):
        _draw_spans(axes, merge_spans(timeline.spans, gap=0.002 * width), offset=offset)
        for phase in timeline.phases:
            if phase.start >= extent:
                continue
            axes.broken_barh(
                [(offset + phase.start, phase.seconds)],
                band,
                facecolor=_PHASE_COLOUR,
                edgecolor="white",
                linewidth=0.6,
            )
            # About 140 characters fit across the picture.
            if phase.seconds / width * 140 > len(phase.name) + 1:
                middle = offset + phase.start + phase.seconds / 2, band[0] + band[1] / 2
                name = phase.name.replace("_", " ")
                axes.text(*middle, name, ha="center", va="center", fontsize=8, color="white")
        if len(timelines) > 1:
            axes.axvline(offset, color="#666666", linewidth=0.8)
            axes.text(offset, -0.6, f" step {timeline.step}", va="bottom", fontsize=9)
        offset += extent
    axes.set_xlim(0, width)
    axes.set_ylim(sum(band), -0.6)
    ticks = MaxNLocator(nbins=8, integer=True, steps=[1, 2, 4, 8, 10]).tick_values(0, lanes)
    axes.set_yticks([tick for tick in ticks if 0 <= tick < lanes])
    axes.set(xlabel=f"seconds since step {timelines[0].step} began", ylabel="slice")


def _draw_spans(axes: Axes, spans: Sequence[Span], *, offset: float) -> None:
    """One collection per lane and activity: a long step has tens of thousands of spans."""
    bars: dict[tuple[int, Activity], list[tuple[float, float]]] = {}
    for span in spans:
        key = (span.slice_index, span.activity)
        bars.setdefault(key, []).append((offset + span.start, span.seconds))
    for (lane, activity), extents in bars.items():
        colour = _ACTIVITY_COLOURS[activity]
        axes.broken_barh(extents, (lane - 0.42, 0.84), color=colour, linewidth=0)


def _timeline_title(axes: Axes, title: str) -> None:
    """Title left and legend right, both above the step labels."""
    axes.set_title(title, pad=20)
    handles = [Patch(color=colour, label=name.value) for name, colour in _ACTIVITY_COLOURS.items()]
    handles.append(Patch(color=_PHASE_COLOUR, label="other phases"))
    lifted = axes.transAxes + ScaledTranslation(0, 18 / 72, axes.figure.dpi_scale_trans)
    axes.legend(
        handles=handles, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderpad=0,
        bbox_transform=lifted, borderaxespad=0, handlelength=1.2, columnspacing=1.4,
    )  # fmt: skip


def _draw_reward(axes: Axes, metrics: list[Record]) -> None:
    _draw_by_step(axes, metrics, "reward_mean", title="Reward")
    axes.set(ylabel="mean reward of the step")


def _draw_accept_length(axes: Axes, metrics: list[Record]) -> None:
    _draw_by_step(axes, metrics, "accept_length", title="Accept length")
    axes.axhline(1, color=_GREY, linewidth=1, linestyle=":", zorder=1)
    axes.annotate(
        "plain decoding", (1, 1), (0, 3), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="bottom", fontsize=8.5, color="#555555",
    )  # fmt: skip
    axes.set_ylim(0.8, max(2.0, axes.get_ylim()[1]))
    axes.set(ylabel="tokens per round and sequence")


def _draw_by_step(axes: Axes, metrics: list[Record], name: str, *, title: str) -> None:
    """Values by step, their running mean in a long run, and a cross where one is not finite."""
    steps = np.asarray([row["step"] for row in metrics])
    values = np.asarray([row[name] for row in metrics], np.float64)
    finite = np.isfinite(values)
    shown = np.where(finite, values, np.nan)
    if len(values) >= 2 * _SMOOTHING:
        title += f" (thick: mean of {_SMOOTHING} steps)"
        half = _SMOOTHING // 2
        running = np.convolve(shown, np.full(_SMOOTHING, 1 / _SMOOTHING), mode="valid")
        axes.plot(steps, shown, color=_BLUE, linewidth=0.9, alpha=0.45)
        axes.plot(steps[half:-half], running, color=_BLUE)
    else:
        axes.plot(steps, shown, color=_BLUE, marker="s", markersize=4)
    if not finite.all():
        axes.plot(
            steps[~finite], np.full((~finite).sum(), 0.03), "x", color=_VERMILION,
            transform=axes.get_xaxis_transform(), label="not finite",
        )  # fmt: skip
        axes.legend(loc="upper left")
    if len(steps) == 1:
        axes.set_xticks(steps)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set(xlabel="RL step")
    axes.set_title(title)
    axes.grid(axis="y")


def _draw_accept_by_position(axes: Axes, metrics: list[Record]) -> None:
    axes.set_title("Acceptance by draft position")
    deepest = 0
    for label, rows, look in _windows(metrics):
        shares = mean_by_position(rows)
        deepest = max(deepest, len(shares))
        if shares:
            axes.plot(
                range(1, len(shares) + 1), shares, color=look.colour, linestyle=look.line,
                marker=look.marker, label=label,
            )  # fmt: skip
    if not deepest:
        axes.text(0.5, 0.5, "nothing was drafted", transform=axes.transAxes, ha="center")
        axes.set_axis_off()
        return
    axes.set(xlabel="draft position", ylabel="share of drafts accepted", ylim=(0, 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.grid(axis="y")
    axes.legend()


def _draw_survival(axes: Axes, metrics: list[Record]) -> None:
    """Both axes are logarithmic: the tail, one response in a hundred, is what decides."""
    for label, rows, look in _windows(metrics):
        pooled = [length for row in rows for length in row["responses"]["length"]]
        lengths, shares = survival(pooled)
        lengths = np.maximum(lengths, 1)  # a logarithmic axis has no 0
        p50, p99 = np.percentile(pooled, (50, 99), method="inverted_cdf").astype(int)
        axes.step(
            lengths, shares, where="pre", color=look.colour, linestyle=look.line,
            label=f"{label}\np50 {p50}, p99 {p99}",
        )  # fmt: skip
        at = np.interp((p50, p99), lengths, shares)
        axes.plot((p50, p99), at, look.marker, color=look.colour, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share * 100:g}%"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylim(top=1.3)
    axes.grid()
    axes.set(xlabel="response length, tokens", ylabel="responses at least so long")
    axes.set_title("Response lengths")
    axes.legend(loc="lower left")
