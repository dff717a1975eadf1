"""Speeds by row bucket: counted by hand, and what a choice among strategies gains."""

import types

import pytest

from tlt_jax import paces
from tlt_jax.paces import Pace


def _chunk(rows, strategy, *, committed, row_rounds, rounds_run, seconds):
    """The fields of a `ChunkRecord` that count."""
    return types.SimpleNamespace(
        rows=rows,
        strategy=strategy,
        committed=committed,
        row_rounds=row_rounds,
        rounds_run=rounds_run,
        seconds=seconds,
    )


def test_rows_that_have_ended_count_as_if_they_were_live():
    """Three tokens a round and row; half of the rows of the last chunk had ended."""
    chunks = [
        _chunk(4, "chain-4", committed=[60, 60], row_rounds=[20, 20], rounds_run=[5, 5], seconds=2),
        _chunk(4, "chain-4", committed=[60, 0], row_rounds=[20, 0], rounds_run=[10, 0], seconds=3),
        _chunk(1, "plain", committed=[7, 7], row_rounds=[7, 7], rounds_run=[7, 7], seconds=1),
        _chunk(1, "plain", committed=[0, 0], row_rounds=[0, 0], rounds_run=[9, 9], seconds=9),
    ]
    found = paces.by_bucket(chunks)
    assert found[4] == Pace(3.0 * 4 * 2 * (5 + 10), 5)
    assert found[1].tokens == pytest.approx(2 * (7 + 9)) and found[1].seconds == 10
    assert paces.overall(found).rate == pytest.approx((360 + 32) / 15)


def test_strategies_of_a_bucket_keep_their_own_accept_lengths():
    chunks = [
        _chunk(2, "plain", committed=[8], row_rounds=[8], rounds_run=[4], seconds=1),
        _chunk(2, "chain-2", committed=[6], row_rounds=[2], rounds_run=[2], seconds=1),
    ]
    assert paces.by_bucket(chunks)[2] == Pace(1.0 * 2 * 4 + 3.0 * 2 * 2, 2)


def test_a_choice_is_held_against_the_best_of_every_bucket():
    """At 8 rows A is twice as fast, at 1 row B; the bandit follows with a tenth less."""
    a = {8: Pace(200, 10), 1: Pace(50, 10)}
    b = {8: Pace(100, 10), 1: Pace(100, 10), 4: Pace(1, 1)}
    bandit = {8: Pace(180, 10), 1: Pace(90, 10)}
    slow = {8: Pace(1, 10), 1: Pace(1, 10)}
    found = paces.verdict({"A": [a, a, slow], "B": [b] * 3}, [bandit] * 3)
    assert [(entry["rows"], entry["best"]) for entry in found["buckets"]] == [(8, "A"), (1, "B")]
    assert [entry["bandit_share"] for entry in found["buckets"]] == pytest.approx([0.9, 0.9])
    assert found["best_single"] == "A"
    assert found["perfect_choice"] == pytest.approx(20 / 15)
    told = paces.sentences(found)
    assert "8 rows per slice: A is the fastest kept throughout, the bandit has 90 %" in told
    assert told.endswith("the fastest in every bucket would be 1.33 times as fast as A throughout")
