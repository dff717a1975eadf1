"""Pictures: the numbers behind them by hand, and that each one shows what it should."""

import matplotlib.image
import numpy as np
import pytest

from tlt_jax.reporting import plots
from tlt_jax.reporting.run_files import read_run
from tlt_jax.types import UserError

ROLLOUT_BLUE, TRAINING_ORANGE, IDLE_GREY = (0, 114, 178), (230, 159, 0), (227, 227, 227)


def _pixels(path, colour):
    image = matplotlib.image.imread(path)[..., :3] * 255
    return int((np.abs(image - colour).max(axis=-1) < 2).sum())


def test_survival_by_hand():
    lengths, shares = plots.survival([5, 3, 3, 9])
    assert lengths.tolist() == [3, 5, 9]
    assert shares.tolist() == [1.0, 0.5, 0.25]


def test_mean_by_position_takes_the_rows_that_have_it(make_metrics):
    rows = [make_metrics(accept_by_position=shares) for shares in ([0.5, 0.25], [1.0], [])]
    assert plots.mean_by_position(rows) == [0.75, 0.25]
    assert plots.mean_by_position([make_metrics(accept_by_position=[])]) == []


def test_write_all_draws_every_picture(make_workdir, make_metrics):
    workdir = make_workdir([make_metrics(step, reward_mean=step / 12) for step in range(12)])
    paths = plots.write_all(workdir)
    assert [path.name for path in paths] == [f"{name}.png" for name in plots.FIGURES]
    for path in paths:
        assert path.parent == workdir / "plots"
        assert _pixels(path, ROLLOUT_BLUE) > 100
    for name in ("overview", "slice_timeline"):
        rollout, training, idle = (
            _pixels(workdir / "plots" / f"{name}.png", colour)
            for colour in (ROLLOUT_BLUE, TRAINING_ORANGE, IDLE_GREY)
        )
        # Each second of rollout: 1 + 0.75 in the first chunk, 1 in the second; 0.75 s training
        # and 0.25 + 0.25 s idle. Anti-aliased edges and legend patches cost the equality.
        assert training / rollout == pytest.approx(0.75 / 2.75, rel=0.15)
        assert idle / rollout == pytest.approx(0.5 / 2.75, rel=0.15)


@pytest.mark.parametrize("steps", [[0], [4, 5, 6]])
def test_one_step_plain_decoding_and_a_resumed_run_are_drawn(
    make_workdir, make_metrics, make_chunk, steps
):
    plain = {"accept_by_position": [], "accept_length": 1.0, "drafter_loss": None}
    idle = {"idle_training_seconds": 0.0, "responses": {"length": [7, 7, 7, 7]}}
    chunks = [
        make_chunk(step, start=float(step % 2), strategy="plain", roles=["ROLLOUT", "IDLE"])
        for step in steps
    ]
    workdir = make_workdir([make_metrics(step, **plain, **idle) for step in steps], chunks)
    paths = plots.write_all(workdir)
    assert len(paths) == len(plots.FIGURES)
    assert all(path.stat().st_size > 5000 for path in paths)


def test_a_broken_reward_is_marked(make_workdir, make_metrics):
    rewards = [0.1, float("nan"), 0.3]
    run = read_run(make_workdir([make_metrics(i, reward_mean=r) for i, r in enumerate(rewards)]))
    (axes,) = plots.reward_by_step(run).axes
    crosses = [line for line in axes.lines if line.get_label() == "not finite"]
    assert [line.get_xdata().tolist() for line in crosses] == [[1]]


def test_chosen_steps_are_the_ones_drawn(make_workdir, make_metrics):
    run = read_run(make_workdir([make_metrics(step) for step in range(6)]))
    above, below = plots.slice_timeline(run, steps=[1, 2], zoom=1).axes
    assert [text.get_text() for text in above.texts if "step" in text.get_text()] == [
        " step 1",
        " step 2",
    ]
    assert above.get_xlim() == (0.0, 7.5)
    assert below.get_xlim() == (0.0, 2.5)
    with pytest.raises(UserError, match=r"step 9 .* steps 0 to 5"):
        plots.slice_timeline(run, steps=[9])


def test_the_step_shown_is_the_last_one_with_drafter_training(
    make_workdir, make_metrics, make_chunk
):
    busy = {"rounds_run": [4, 4], "live": [2, 2], "microbatches": [0, 0]}
    busy |= {"roles": ["ROLLOUT", "ROLLOUT"]}
    metrics = [make_metrics(step) for step in (0, 1)]
    metrics.append(make_metrics(2, idle_training_seconds=0.0, idle_seconds=0.0))
    chunks = [make_chunk(0), make_chunk(1), make_chunk(2, **busy)]
    run = read_run(make_workdir(metrics, chunks))
    assert plots.slice_timeline(run).axes[1].get_title(loc="left") == "Step 1, rollout only"
    run = read_run(make_workdir(metrics[2:], chunks[2:]))
    assert plots.slice_timeline(run).axes[1].get_title(loc="left") == "Step 2, rollout only"


def test_running_mean_is_drawn_in_a_long_run(make_workdir, make_metrics):
    run = read_run(make_workdir([make_metrics(i, accept_length=1.0 + i) for i in range(10)]))
    axes = plots.accept_by_step(run).axes[0]
    running = axes.lines[1]
    assert running.get_xdata().tolist() == [2, 3, 4, 5, 6, 7]
    np.testing.assert_allclose(running.get_ydata(), [3, 4, 5, 6, 7, 8])
