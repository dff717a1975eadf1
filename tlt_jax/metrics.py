"""Turns the records of a step into the numbers of `metrics.jsonl`; plain Python on host data.

Times are seconds. Idle time is counted in slice-seconds: a slice idles while it runs no rounds and
another slice still does.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tlt_jax.rollout import ChunkRecord, Response


def idle_seconds(chunks: Sequence[ChunkRecord]) -> float:
    """Slice-seconds without rounds of their own, rounds of a chunk taken as equally long."""
    return sum(sum(_idle_by_slice(record)) for record in chunks)


def idle_training_seconds(chunks: Sequence[ChunkRecord], microbatch_seconds: float) -> float:
    """Slice-seconds of idle time that went into microbatches, never more than a slice was idle."""
    return sum(
        min(idle, taken * microbatch_seconds)
        for record in chunks
        for idle, taken in zip(_idle_by_slice(record), record.microbatches, strict=True)
    )


def _idle_by_slice(record: ChunkRecord) -> list[float]:
    longest = max(record.rounds_run)
    if longest == 0:
        return [0.0] * len(record.rounds_run)
    return [record.seconds * (1 - run / longest) for run in record.rounds_run]


def accept_length(chunks: Sequence[ChunkRecord]) -> float:
    """Tokens committed per round and live sequence over speculative chunks; 1.0 without any."""
    speculative = [record for record in chunks if record.strategy != "plain"]
    rounds = sum(sum(record.row_rounds) for record in speculative)
    return sum(sum(record.committed) for record in speculative) / rounds if rounds else 1.0


def accept_by_position(chunks: Sequence[ChunkRecord]) -> list[float]:
    """Share of drafts accepted at draft position 1, 2, ..., of the rounds that drafted so deep."""
    deepest = max((len(record.accepted) for record in chunks), default=0)
    shares = []
    for position in range(deepest):
        drafted = [record for record in chunks if len(record.accepted) > position]
        rounds = sum(sum(record.row_rounds) for record in drafted)
        hits = sum(record.accepted[position] for record in drafted)
        shares.append(hits / rounds if rounds else 0.0)
    return shares


def drafter_loss(chunks: Sequence[ChunkRecord]) -> float | None:
    """Mean loss of the updates of a step, None without any."""
    seen = [record.draft_loss for record in chunks if record.draft_loss is not None]
    return float(np.mean(seen)) if seen else None


def idle_metrics(chunks: Sequence[ChunkRecord], microbatch_seconds: float) -> dict[str, Any]:
    """What a metrics row says of idle time and what it was used for."""
    idle = idle_seconds(chunks)
    used = idle_training_seconds(chunks, microbatch_seconds)
    return {
        "idle_seconds": idle,
        "idle_training_seconds": used,
        "idle_used_share": used / idle if idle > 0 else None,
    }


def rollout_metrics(chunks: Sequence[ChunkRecord], rollout_seconds: float) -> dict[str, Any]:
    """The rest of what a metrics row says of a rollout."""
    tokens = sum(sum(record.committed) for record in chunks)
    return {
        "accept_length": accept_length(chunks),
        "accept_by_position": accept_by_position(chunks),
        "rounds": sum(max(record.rounds_run) for record in chunks),
        "tokens": tokens,
        "tokens_per_second": tokens / rollout_seconds,
        "drafter_version": chunks[-1].drafter_version,
        "drafter_updates": sum(record.draft_loss is not None for record in chunks),
        "drafter_loss": drafter_loss(chunks),
    }


def response_metrics(
    responses: Sequence[Response], rewards: np.ndarray, stop_tokens: tuple[int, ...]
) -> dict[str, Any]:
    """Rewards and lengths of a batch; lengths are response tokens, stop token included."""
    lengths = np.asarray([len(r.response) for r in responses])
    cut = [r.response[-1] not in stop_tokens for r in responses]
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "response_length_mean": float(lengths.mean()),
        "response_length_p50": float(np.percentile(lengths, 50)),
        "response_length_p99": float(np.percentile(lengths, 99)),
        "response_length_max": float(lengths.max()),
        "truncated_share": float(np.mean(cut)),
        "responses": {"length": lengths.tolist(), "reward": rewards.tolist()},
    }
