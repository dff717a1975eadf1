"""Synthetic rows of a run with two slices, small enough to check by hand."""

import json

import pytest


def _metrics(step=0, **changes):
    """A metrics row; `seconds` and `responses` in `changes` are merged into the defaults."""
    row = {
        "step": step,
        "reward_mean": 0.5,
        "reward_std": 0.5,
        "response_length_mean": 25.0,
        "response_length_p50": 20.0,
        "response_length_p99": 40.0,
        "response_length_max": 40.0,
        "truncated_share": 0.25,
        "accept_length": 2.0,
        "accept_by_position": [0.8, 0.4],
        "rounds": 12,
        "tokens": 100,
        "tokens_per_second": 50.0,
        "drafter_version": step,
        "drafter_updates": 2,
        "drafter_loss": 1.5,
        "idle_seconds": 1.0,
        "idle_training_seconds": 0.75,
        "idle_used_share": 0.75,
        "policy_loss": 0.01,
        "kl": 0.002,
        "clip_share": 0.0,
        "grad_norm": 0.3,
        "learning_rate": 1e-4,
        "logprob_gap_mean": 1e-6,
        "logprob_gap_max": 2e-5,
        "seconds": {
            "rollout": 2.5,
            "reward_wait": 0.0,
            "learn": 1.0,
            "reshard": 0.25,
            "compile": 0.25,
            "total": 4.0,
        },
        "compiles": 0,
        "responses": {"length": [10, 20, 30, 40], "reward": [0.0, 1.0, 1.0, 0.0]},
    }
    for name in ("seconds", "responses"):
        row[name] |= changes.pop(name, {})
    return row | changes


def _chunk(step=0, chunk=0, **changes):
    """A decision row: one second, slice 0 rolls out 4 rounds, slice 1 runs 3 microbatches."""
    row = {
        "step": step,
        "chunk": chunk,
        "start": 100.0 + chunk,
        "seconds": 1.0,
        "strategy": "chain-2",
        "rows": 2,
        "length": 64,
        "rounds": 4,
        "rounds_run": [4, 0],
        "live": [2, 0],
        "roles": ["ROLLOUT", "TRAIN"],
        "microbatches": [0, 3],
        "committed": [16, 0],
        "target_step": step,
        "drafter_version": step,
    }
    return row | changes


@pytest.fixture
def make_metrics():
    return _metrics


@pytest.fixture
def make_chunk():
    return _chunk


@pytest.fixture
def make_workdir(tmp_path):
    """Writes logs of a run: two chunks a step, both slices roll out in the first one."""

    def make(metrics, decisions=None):
        if decisions is None:
            both = {"rounds_run": [4, 3], "live": [2, 2], "microbatches": [0, 0]}
            both |= {"roles": ["ROLLOUT", "ROLLOUT"], "strategy": "plain"}
            decisions = [
                chunk
                for row in metrics
                for chunk in (_chunk(row["step"], 0, **both), _chunk(row["step"], 1))
            ]
        for name, rows in (("metrics", metrics), ("decisions", decisions)):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{name}.jsonl").write_text(text)
        return tmp_path

    return make
