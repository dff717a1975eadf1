"""A workdir read back: checked metrics rows, checked decision rows, and the run's config."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from tlt_jax.reporting.writers import Record, read_jsonl
from tlt_jax.types import UserError

METRIC_FIELDS = (
    "step",
    "reward_mean",
    "reward_std",
    "response_length_mean",
    "response_length_p50",
    "response_length_p99",
    "response_length_max",
    "truncated_share",
    "accept_length",
    "accept_by_position",
    "rounds",
    "tokens",
    "tokens_per_second",
    "drafter_version",
    "drafter_updates",
    "drafter_loss",
    "idle_seconds",
    "idle_training_seconds",
    "idle_used_share",
    "policy_loss",
    "kl",
    "clip_share",
    "grad_norm",
    "learning_rate",
    "logprob_gap_mean",
    "logprob_gap_max",
    "seconds",
    "compiles",
    "responses",
)
DECISION_FIELDS = (
    "step",
    "chunk",
    "start",
    "seconds",
    "strategy",
    "rows",
    "length",
    "rounds",
    "rounds_run",
    "live",
    "roles",
    "microbatches",
    "committed",
    "target_step",
    "drafter_version",
)
PHASES = ("compile", "rollout", "reward_wait", "learn", "reshard", "total")


class Run(NamedTuple):
    """A workdir's records; both lists are in step order and hold finished steps only."""

    metrics: list[Record]  # one per step, at least one
    decisions: list[Record]  # one per chunk, ordered by (step, chunk), at least one
    config: dict[str, Any] | None  # config.json, if there is one


def read_run(workdir: str | os.PathLike[str]) -> Run:
    """Reads `metrics.jsonl`, `decisions.jsonl` and, if present, `config.json` of a workdir.

    Chunks of a step that has no metrics row yet (it was cut off, or is running now) are left out.

    Raises:
      UserError: a file is missing, empty or malformed, a record lacks a field, or no chunk belongs
        to a finished step.
    """
    workdir = Path(workdir)
    metrics = _read(workdir / "metrics.jsonl", METRIC_FIELDS)
    decisions = _read(workdir / "decisions.jsonl", DECISION_FIELDS)
    for number, row in enumerate(metrics, start=1):
        _check_metrics(row, f"{workdir / 'metrics.jsonl'}, record {number}")
    finished = {row["step"] for row in metrics}
    chunks = [chunk for chunk in decisions if chunk["step"] in finished]
    if not chunks:
        raise UserError(
            f"{workdir}: no chunk in decisions.jsonl belongs to a step of metrics.jsonl; "
            "both must come from the same run."
        )
    return Run(
        metrics=sorted(metrics, key=lambda row: row["step"]),
        decisions=sorted(chunks, key=lambda chunk: (chunk["step"], chunk["chunk"])),
        config=_read_config(workdir / "config.json"),
    )


def first_and_last(rows: list[Record], *, count: int = 5) -> tuple[list[Record], list[Record]]:
    """The first and the last `count` rows, or halves of a run too short for both.

    The two never overlap, except in a run of one step, where both are that step.
    """
    size = max(1, min(count, len(rows) // 2))
    return rows[:size], rows[-size:]


def _read(path: Path, fields: tuple[str, ...]) -> list[Record]:
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"{path} is empty; there is nothing to report before the first step ends.")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in fields if name not in row]
        if missing:
            raise UserError(f"{path}, record {number}: it lacks {', '.join(missing)}.")
    return rows


def _check_metrics(row: Record, where: str) -> None:
    missing = [phase for phase in PHASES if phase not in row["seconds"]]
    if missing:
        raise UserError(f'{where}: "seconds" lacks {", ".join(missing)}.')
    if not row["responses"].get("length"):
        raise UserError(f'{where}: "responses" holds no lengths; there is one per sequence.')


def _read_config(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: this is not JSON ({error}).") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(config).__name__}.")
    return config
