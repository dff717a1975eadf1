"""Numbers of `metrics.jsonl` by hand arithmetic on small records."""

import dataclasses

import numpy as np
import pytest

from tlt_jax import metrics
from tlt_jax.budget import NO_BLOCK
from tlt_jax.rollout import ChunkRecord, Response

PLAIN = ChunkRecord(
    chunk=0,
    start=0.0,
    seconds=2.0,
    strategy="plain",
    chosen="only",
    give_up_below=0.0,
    block=NO_BLOCK,
    rows=4,
    length=32,
    rounds=8,
    rounds_run=[8, 8],
    live=[4, 3],
    roles=["ROLLOUT", "ROLLOUT"],
    microbatches=[0, 0],
    committed=[32, 24],
    row_rounds=[32, 24],
    accepted=[],
    expected=[],
    draft_loss=None,
    drafter_version=4,
)
SHALLOW = dataclasses.replace(
    PLAIN,
    chunk=1,
    seconds=4.0,
    strategy="chain-2",
    rounds_run=[8, 2],
    microbatches=[0, 3],
    committed=[20, 5],
    row_rounds=[10, 4],
    accepted=[9, 2],
    expected=[0.0, 0.0],
)
DEEP = dataclasses.replace(
    SHALLOW,
    chunk=2,
    seconds=1.0,
    strategy="chain-4",
    rounds_run=[0, 4],
    live=[0, 1],
    roles=["TRAIN", "ROLLOUT"],
    microbatches=[2, 0],
    committed=[0, 14],
    row_rounds=[0, 6],
    accepted=[5, 2, 1, 0],
    expected=[0.0] * 4,
    draft_loss=1.5,
    drafter_version=5,
)
CHUNKS = [PLAIN, SHALLOW, DEEP]


def test_idle_seconds():
    """None in the first; 6 of 8 rounds of 4 seconds; all of 1 second."""
    assert metrics.idle_seconds([PLAIN]) == 0
    assert metrics.idle_seconds([SHALLOW]) == pytest.approx(3.0)
    assert metrics.idle_seconds(CHUNKS) == pytest.approx(4.0)


def test_idle_seconds_that_were_trained_in():
    """3 and 2 microbatches of 0.4 seconds; no slice trains longer than it was idle."""
    assert metrics.idle_training_seconds(CHUNKS, 0.4) == pytest.approx(1.2 + 0.8)
    assert metrics.idle_training_seconds(CHUNKS, 0.9) == pytest.approx(2.7 + 1.0)
    assert metrics.idle_training_seconds(CHUNKS, 9.0) == pytest.approx(metrics.idle_seconds(CHUNKS))


def test_training_between_steps_is_nobodys_idle_time():
    between = dataclasses.replace(DEEP, rounds_run=[0], microbatches=[7], roles=["TRAIN"])
    assert metrics.idle_seconds([between]) == 0
    assert metrics.idle_training_seconds([between], 1.0) == 0


def test_accept_length_counts_speculative_chunks_alone():
    assert metrics.accept_length(CHUNKS) == pytest.approx((25 + 14) / (14 + 6))
    assert metrics.accept_length([SHALLOW]) == pytest.approx(25 / 14)
    assert metrics.accept_length([PLAIN]) == 1.0
    assert metrics.accept_length([]) == 1.0


def test_acceptance_by_position_counts_the_rounds_that_drafted_so_deep():
    assert metrics.accept_by_position(CHUNKS) == pytest.approx([14 / 20, 4 / 20, 1 / 6, 0.0])
    assert metrics.accept_by_position([PLAIN]) == []
    assert metrics.accept_by_position([]) == []


def test_drafter_loss_is_the_mean_over_updates():
    assert metrics.drafter_loss([PLAIN, SHALLOW]) is None
    other = dataclasses.replace(DEEP, draft_loss=2.5)
    assert metrics.drafter_loss([PLAIN, DEEP, other]) == pytest.approx(2.0)


def test_a_rollouts_row():
    row = metrics.rollout_metrics(CHUNKS, 10.0)
    assert row["rounds"] == 8 + 8 + 4
    assert row["tokens"] == 56 + 25 + 14
    assert row["tokens_per_second"] == pytest.approx(9.5)
    assert (row["drafter_version"], row["drafter_updates"], row["drafter_loss"]) == (5, 1, 1.5)


def test_a_row_tells_how_idle_time_was_used():
    assert metrics.idle_metrics(CHUNKS, 0.4)["idle_used_share"] == pytest.approx(0.5)
    assert metrics.idle_metrics([PLAIN], 0.4)["idle_used_share"] is None


def test_a_responses_row():
    """Stop token 9; lengths count it. The second response was cut off, the third ended just so."""
    responses = [
        Response(
            sequence=index,
            tokens=np.array([1, 1, *body], np.int32),
            log_probs=np.zeros(2 + len(body), np.float32),
            prompt_length=2,
        )
        for index, body in enumerate(([9], [5, 5, 5, 5, 5], [5, 9], [7, 7, 9, 9]))
    ]
    row = metrics.response_metrics(responses, np.array([1, 0, 0, 1], np.float32), (8, 9))
    assert row["reward_mean"] == 0.5 and row["reward_std"] == 0.5
    assert row["response_length_mean"] == 3.0 and row["response_length_max"] == 5.0
    assert row["response_length_p50"] == 3.0
    assert row["response_length_p99"] == pytest.approx(4.97)
    assert row["truncated_share"] == 0.25
    assert row["responses"] == {"length": [1, 5, 2, 4], "reward": [1.0, 0.0, 0.0, 1.0]}
