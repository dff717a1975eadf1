"""Writers of a run: JSON lines that survive a crash, TensorBoard scalars, one console line a step.

`metrics.jsonl` and `decisions.jsonl` hold one JSON object per line. A process that dies while it
writes leaves at most one torn last line, which every reader here drops. NaN and infinity are
written as Python's `NaN` and `Infinity`, so that a broken number is never taken for a missing one
(`null`).
"""

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tensorboardX import SummaryWriter

from tlt_jax.types import UserError

Record = dict[str, Any]

_TAGS = {
    "reward_mean": "reward/mean",
    "reward_std": "reward/std",
    "response_length_mean": "rollout/response_length_mean",
    "response_length_p50": "rollout/response_length_p50",
    "response_length_p99": "rollout/response_length_p99",
    "response_length_max": "rollout/response_length_max",
    "truncated_share": "rollout/truncated_share",
    "accept_length": "rollout/accept_length",
    "rounds": "rollout/rounds",
    "tokens": "rollout/tokens",
    "tokens_per_second": "rollout/tokens_per_second",
    "idle_seconds": "rollout/idle_seconds",
    "compiles": "rollout/compiles",
    "drafter_version": "drafter/version",
    "drafter_updates": "drafter/updates",
    "drafter_loss": "drafter/loss",
    "idle_training_seconds": "drafter/idle_training_seconds",
    "idle_used_share": "drafter/idle_used_share",
    "policy_loss": "learner/policy_loss",
    "kl": "learner/kl",
    "clip_share": "learner/clip_share",
    "grad_norm": "learner/grad_norm",
    "learning_rate": "learner/learning_rate",
    "logprob_gap_mean": "learner/logprob_gap_mean",
    "logprob_gap_max": "learner/logprob_gap_max",
}


class JsonlWriter:
    """Appends records to a JSON-lines file, one flushed line each.

    Opening creates the file and its folder, and cuts off a torn last line, so that the next record
    never lands behind half of another. Use it in a `with` block or call `close`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._rewrite(_complete_lines(self.path))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends `record`; NumPy scalars and arrays become numbers and lists.

        Raises:
          TypeError: a value is neither JSON nor NumPy. Nothing is written then.
        """
        self._file.write(json.dumps(record, default=_plain) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drops every record with `record["step"] >= step`: `step` is the first one to run again.

        The rest is rewritten through a temporary file, so a crash in here leaves the old file.

        Raises:
          UserError: a line is not a JSON object or has no integer "step".
        """
        lines = _complete_lines(self.path)
        kept = []
        for number, line in enumerate(lines, start=1):
            record_step = _parse(line, self.path, number).get("step")
            if not isinstance(record_step, int):
                raise UserError(
                    f'{self.path}, line {number}: there is no integer "step" to resume by.'
                )
            if record_step < step:
                kept.append(line)
        self._file.close()
        self._rewrite(kept)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _rewrite(self, lines: list[bytes]) -> None:
        content = b"".join(line + b"\n" for line in lines)
        if content != self.path.read_bytes():
            write_atomically(self.path, content)


def read_jsonl(path: str | os.PathLike[str]) -> list[Record]:
    """Records of a JSON-lines file in file order, without a torn last line.

    Raises:
      UserError: the file is missing, or a line other than a torn last one is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; a run writes it into its workdir.")
    return [
        _parse(line, path, number) for number, line in enumerate(_complete_lines(path), start=1)
    ]


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces `path` by `content`: a reader sees the old file or the new one, never a part."""
    path = Path(path)
    # mkstemp files are private to their owner; the mode of the file they replace, or the one
    # a plain `open` would give, keeps a shared workdir readable.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_csv(path: str | os.PathLike[str], rows: Sequence[Record]) -> None:
    """Writes records as comma-separated values; what one lacks stays empty.

    Columns come in the order in which the records name them first.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomically(path, text.getvalue().encode())


class TensorboardWriter:
    """Logs metrics rows as TensorBoard scalars, tags grouped as in `reward/mean`."""

    def __init__(self, directory: str | os.PathLike[str], *, first_step: int = 0):
        """Opens a new event file in `directory`.

        Args:
          directory: created when missing.
          first_step: the first step this process writes; events of older processes from that step
            on are hidden by TensorBoard, so a resumed run shows no step twice.
        """
        self._writer = SummaryWriter(str(directory), purge_step=first_step)

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """Logs every number of a metrics row; `null` values are left out, NaN is kept."""
        for tag, value in scalar_tags(row).items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


def scalar_tags(row: Mapping[str, Any]) -> dict[str, float]:
    """TensorBoard tags and values of a metrics row; a number nobody grouped goes to `other/`."""
    scalars = {}
    for name, value in row.items():
        if name != "step" and _is_number(value):
            scalars[_TAGS.get(name, f"other/{name}")] = float(value)
    for phase, seconds in row.get("seconds", {}).items():
        scalars[f"seconds/{phase}"] = float(seconds)
    for position, share in enumerate(row.get("accept_by_position", []), start=1):
        scalars[f"drafter/accept_at_{position}"] = float(share)
    return scalars


def progress_line(row: Mapping[str, Any], *, num_steps: int) -> str:
    """One console line for a metrics row; lines of a run align.

    Seconds are this step's wall time, lengths are tokens, and the step is the 0-based one of
    `metrics.jsonl`. Two things are appended only when they happen: programs compiled after
    warm-up, and the name and value of every metric that is not finite, shown above or not.

    Args:
      row: a metrics row.
      num_steps: number of steps of the whole run.
    """
    used = row["idle_used_share"]
    seconds = row["seconds"]
    parts = [
        f"step {row['step']:>{len(str(num_steps))}}/{num_steps}",
        f"reward {row['reward_mean']:5.2f}",
        f"len {row['response_length_mean']:5.0f} p99 {row['response_length_p99']:5.0f}",
        f"accept {row['accept_length']:5.2f}",
        f"idle used {'-' if used is None else f'{used:.0%}':>4}",
        f"rollout {seconds['rollout']:6.2f}s reward {seconds['reward_wait']:6.2f}s "
        f"learn {seconds['learn']:6.2f}s total {seconds['total']:6.2f}s",
    ]
    if row["compiles"]:
        parts.append(f"compiled {row['compiles']}")
    broken = [f"{name}={value}" for name, value in non_finite(row)]
    if broken:
        parts.append("NOT FINITE " + " ".join(broken))
    return " | ".join(parts)


def non_finite(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names (dotted when nested) and values of a row's numbers that are NaN or infinite.

    A list counts once, by its first such number.
    """
    for name, value in row.items():
        if isinstance(value, Mapping):
            for inner, number in non_finite(value):
                yield f"{name}.{inner}", number
            continue
        numbers = value if isinstance(value, list | tuple) else [value]
        broken = [item for item in numbers if _is_number(item) and not math.isfinite(item)]
        if broken:
            yield name, float(broken[0])


def _complete_lines(path: Path) -> list[bytes]:
    """Lines without their newline; an unterminated last line only if it is a whole record."""
    *lines, tail = path.read_bytes().split(b"\n")
    if tail:
        try:
            _parse(tail, path, len(lines) + 1)
        except UserError:
            return lines  # torn by a crash: the caller asked for complete records
        lines.append(tail)
    return lines


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        record = json.loads(line.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}, line {number}: this is not a line of JSON ({error}).") from error
    if not isinstance(record, dict):
        raise UserError(
            f"{path}, line {number}: expected a JSON object, found {type(record).__name__}."
        )
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"a log record cannot hold a {type(value).__name__}: {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)
