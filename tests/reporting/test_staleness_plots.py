"""The experiment's table by hand, and that its pictures show the drafters."""

import json

import pytest

from tlt_jax.reporting import staleness_plots

ACCEPT_LENGTHS = {"frozen": 2.0, "eagle-512": 3.0, "hass-512": 4.0, "n-gram": 1.5}


def _line(step, rate, seed):
    return {
        "learning_rate": rate,
        "seed": seed,
        "step": step,
        "kl": 0.1 * step,
        "reward_mean": 0.5,
        "tokens": 100,
        "drafters": {
            name: {
                "accept_length": length + seed * (name == "hass-512") - 0.1 * (step < 6),
                "accept_by_position": None if name == "n-gram" else [0.9, 0.5],
                "loss": None if name in ("frozen", "n-gram") else 1.0,
            }
            for name, length in ACCEPT_LENGTHS.items()
        },
        "prices": {"frozen": 0.0, "eagle-512": 0.5, "hass-512": 1.5 + seed % 2}
        if step == 0
        else None,
    }


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "runs").mkdir()
    for rate in (3e-4, 1e-4):
        for seed in (0, 1, 2):
            lines = [json.dumps(_line(step, rate, seed)) + "\n" for step in range(11)]
            (tmp_path / "runs" / f"rate_{rate:g}_seed_{seed}.jsonl").write_text("".join(lines))
    return tmp_path


def _files(workdir):
    return sorted((workdir / "runs").iterdir())


def test_the_table_by_hand(workdir):
    rows = staleness_plots.table(staleness_plots.read(_files(workdir)))
    assert [row["learning_rate"] for row in rows] == [1e-4] * 4 + [3e-4] * 4
    held = {row["drafter"]: row for row in rows[4:]}
    assert list(held) == list(ACCEPT_LENGTHS)
    hass = held["hass-512"]
    assert hass["accept_length_first"] == pytest.approx(4.9)
    assert hass["accept_length_last"] == pytest.approx(5.0)
    assert (hass["gain"], hass["gain_min"], hass["gain_max"]) == pytest.approx((2.5, 2.0, 3.0))
    assert (hass["cost"], held["frozen"]["cost"], held["n-gram"]["cost"]) == (3.0, 0.0, None)
    assert hass["seeds"] == 3 and hass["kl"] == pytest.approx(1.0)


def test_pictures_have_a_panel_for_each_learning_rate(workdir):
    runs = staleness_plots.read(_files(workdir))
    above = staleness_plots.overview(runs).axes[:2]
    assert [axes.get_title() for axes in above] == [
        "Learning rate 0.0001",
        "Learning rate 0.0003",
    ]
    for axes in above:
        assert [line.get_label() for line in axes.lines] == list(ACCEPT_LENGTHS)
        assert len(staleness_plots.overview(runs).axes[2].lines) == 3 + 2  # n-gram left out
        # Means of five steps; the last has nothing of the first six.
        assert axes.lines[0].get_ydata()[[0, -1]].tolist() == pytest.approx([1.9, 2.0])
    drift, _, loss = staleness_plots.course(runs).axes
    assert drift.lines[0].get_ydata()[-1] == pytest.approx(0.8)
    assert [line.get_label() for line in loss.lines] == ["eagle-512", "hass-512"]
    assert len(staleness_plots.write(workdir, _files(workdir))) == 3
