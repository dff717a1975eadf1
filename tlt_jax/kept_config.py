"""The configuration that a workdir belongs to: its `config.json`."""

import dataclasses
import json
import pathlib
from collections.abc import Collection

from tlt_jax.config import RunConfig
from tlt_jax.reporting.writers import write_atomically
from tlt_jax.types import UserError


def check(config: RunConfig, workdir: pathlib.Path, *, may_change: Collection[str]) -> None:
    """Checks that `config.json`, where there is one, says what is asked for now.

    `may_change` are the keys and groups of keys, "config.a.b", that may be set anew.

    Raises:
      UserError: the workdir belongs to a run of another configuration.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    try:
        kept = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged ({error}); remove it to write it anew.") from error
    different = _first_difference(kept, _as_json(config), "config", may_change)
    if different is not None:
        raise UserError(
            f"{workdir} holds a run with another {different}; give the same value, or another "
            "--workdir."
        )


def keep(config: RunConfig, workdir: pathlib.Path) -> None:
    """Writes `config.json`."""
    text = json.dumps(_as_json(config), indent=2) + "\n"
    write_atomically(workdir / "config.json", text.encode())


def _as_json(config: RunConfig) -> dict[str, object]:
    """The config as JSON gives it back: tuples are lists."""
    values: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def _first_difference(
    kept: object, asked: object, where: str, may_change: Collection[str]
) -> str | None:
    if where in may_change:
        return None
    if not isinstance(kept, dict) or not isinstance(asked, dict):
        return None if kept == asked else f"{where} ({kept!r}, now {asked!r})"
    for key in sorted(set(kept) | set(asked)):
        found = _first_difference(kept.get(key), asked.get(key), f"{where}.{key}", may_change)
        if found is not None:
            return found
    return None
