"""The timeline of a step, against arithmetic by hand."""

import pytest

from tlt_jax.reporting.timeline import (
    Activity,
    Phase,
    Span,
    chunk_spans,
    live_over_time,
    merge_spans,
    step_timeline,
)
from tlt_jax.types import UserError

ROLLOUT, TRAINING, IDLE = Activity.ROLLOUT, Activity.TRAINING, Activity.IDLE


def test_early_finish_and_short_training_leave_idle_remainders(make_chunk):
    chunk = make_chunk(
        seconds=2.0,
        rounds_run=[4, 3, 0, 0],
        roles=["ROLLOUT", "ROLLOUT", "TRAIN", "IDLE"],
        live=[2, 1, 0, 0],
        microbatches=[0, 0, 3, 0],
    )
    assert chunk_spans(chunk, start=10.0, microbatch_seconds=0.5) == [
        Span(0, 10.0, 2.0, ROLLOUT),
        Span(1, 10.0, 1.5, ROLLOUT),
        Span(1, 11.5, 0.5, IDLE),
        Span(2, 10.0, 1.5, TRAINING),
        Span(2, 11.5, 0.5, IDLE),
        Span(3, 10.0, 2.0, IDLE),
    ]


def test_training_never_leaves_its_chunk_and_none_is_idle(make_chunk):
    chunk = make_chunk(seconds=1.0, microbatches=[0, 3])
    assert chunk_spans(chunk, start=0.0, microbatch_seconds=0.5)[1] == Span(1, 0.0, 1.0, TRAINING)
    chunk = make_chunk(seconds=1.0, microbatches=[0, 0])
    assert chunk_spans(chunk, start=0.0, microbatch_seconds=0.0)[1] == Span(1, 0.0, 1.0, IDLE)


def test_a_slice_that_falls_idle_in_a_chunk_trains_after_its_rounds(make_chunk):
    chunk = make_chunk(
        seconds=2.0, roles=["ROLLOUT", "ROLLOUT"], rounds_run=[8, 2], microbatches=[0, 3]
    )
    assert chunk_spans(chunk, start=1.0, microbatch_seconds=0.25)[1:] == [
        Span(1, 1.0, 0.5, ROLLOUT),
        Span(1, 1.5, 0.75, TRAINING),
        Span(1, 2.25, 0.75, IDLE),
    ]


def test_unknown_role_is_refused(make_chunk):
    with pytest.raises(UserError, match="step 3, chunk 1: role 'SLEEP'"):
        chunk_spans(make_chunk(3, 1, roles=["ROLLOUT", "SLEEP"]), start=0.0, microbatch_seconds=0.0)


def test_step_is_laid_out_from_zero_with_prefill_first(make_chunk, make_metrics):
    """Rollout took 2.5 s and chunks cover 2 s of it; 0.75 s of training are 3 microbatches."""
    both = {"roles": ["ROLLOUT", "ROLLOUT"], "rounds_run": [4, 2], "microbatches": [0, 0]}
    chunks = [make_chunk(0, 0, start=100.0, **both), make_chunk(0, 1, start=101.0)]
    timeline = step_timeline(chunks, make_metrics(0))
    assert timeline.spans == [
        Span(0, 0.5, 1.0, ROLLOUT),
        Span(1, 0.5, 0.5, ROLLOUT),
        Span(1, 1.0, 0.5, IDLE),
        Span(0, 1.5, 1.0, ROLLOUT),
        Span(1, 1.5, 0.75, TRAINING),
        Span(1, 2.25, 0.25, IDLE),
    ]
    assert timeline.phases == [
        Phase("prefill", 0.0, 0.5),
        Phase("learn", 2.5, 1.0),
        Phase("reshard", 3.5, 0.25),
    ]
    assert (timeline.rollout_end, timeline.seconds) == (2.5, 3.75)  # without 0.25 of compiling


def test_the_run_clock_does_not_matter(make_chunk, make_metrics):
    before, after = (
        step_timeline([make_chunk(0, i, start=clock + i) for i in range(2)], make_metrics(0))
        for clock in (512.0, 0.0)
    )
    assert before == after


def test_merge_joins_neighbours_of_one_slice_and_activity():
    spans = [
        Span(0, 0.0, 1.0, ROLLOUT),
        Span(1, 0.0, 1.0, TRAINING),
        Span(0, 1.01, 1.0, ROLLOUT),
        Span(1, 1.0, 1.0, IDLE),
        Span(0, 2.5, 0.5, ROLLOUT),
    ]
    assert merge_spans(spans, gap=0.02) == [
        Span(0, 0.0, 2.01, ROLLOUT),
        Span(0, 2.5, 0.5, ROLLOUT),
        Span(1, 0.0, 1.0, TRAINING),
        Span(1, 1.0, 1.0, IDLE),
    ]


def test_live_over_time_ends_at_zero(make_chunk):
    chunks = [
        make_chunk(0, 0, start=7.0, live=[3, 2]),
        make_chunk(0, 1, start=8.5, seconds=2.0, live=[1, 0]),
    ]
    assert live_over_time(chunks) == ([0.0, 1.5, 3.5], [5, 1, 0])
