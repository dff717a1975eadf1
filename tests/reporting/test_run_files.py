"""Reading a workdir back: what is wrong with it is said in one sentence."""

import pytest

from tlt_jax.reporting.run_files import first_and_last, read_run
from tlt_jax.types import UserError


def test_chunks_of_an_unfinished_step_are_left_out(make_workdir, make_metrics, make_chunk):
    workdir = make_workdir([make_metrics(0)], [make_chunk(0, 1), make_chunk(0, 0), make_chunk(1)])
    run = read_run(workdir)
    assert [(chunk["step"], chunk["chunk"]) for chunk in run.decisions] == [(0, 0), (0, 1)]
    assert run.config is None


@pytest.mark.parametrize("name", ["metrics.jsonl", "decisions.jsonl"])
def test_missing_and_empty_logs_are_named(make_workdir, make_metrics, name):
    workdir = make_workdir([make_metrics(0)])
    (workdir / name).write_text("")
    with pytest.raises(UserError, match=f"{name} is empty"):
        read_run(workdir)
    (workdir / name).unlink()
    with pytest.raises(UserError, match=f"{name} does not exist"):
        read_run(workdir)


def test_incomplete_records_are_named(make_workdir, make_metrics, make_chunk):
    row = make_metrics(1)
    del row["kl"], row["tokens"]
    with pytest.raises(UserError, match=r"metrics\.jsonl, record 2: it lacks tokens, kl"):
        read_run(make_workdir([make_metrics(0), row]))
    row = make_metrics(0)
    del row["seconds"]["learn"]
    with pytest.raises(UserError, match='record 1: "seconds" lacks learn'):
        read_run(make_workdir([row]))
    with pytest.raises(UserError, match="holds no lengths"):
        read_run(make_workdir([make_metrics(0, responses={"length": []})]))
    with pytest.raises(UserError, match="same run"):
        read_run(make_workdir([make_metrics(0)], [make_chunk(5)]))


@pytest.mark.parametrize("text", ["{", "[]"])
def test_broken_config_is_named(make_workdir, make_metrics, text):
    workdir = make_workdir([make_metrics(0)])
    (workdir / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_run(workdir)


@pytest.mark.parametrize(
    ("count", "first", "last"),
    [
        (1, [0], [0]),
        (2, [0], [1]),
        (7, [0, 1, 2], [4, 5, 6]),
        (12, [0, 1, 2, 3, 4], [*range(7, 12)]),
    ],
)
def test_first_and_last_do_not_overlap(make_metrics, count, first, last):
    windows = first_and_last([make_metrics(step) for step in range(count)])
    assert [[row["step"] for row in rows] for rows in windows] == [first, last]
