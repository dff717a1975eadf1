"""Where a round's time goes: a chunk program traced while it runs, its operations by named scope.

The scopes are the `jax.named_scope`s of the library. A compiled program keeps them as metadata of
its instructions; the profiler gives each executed instruction's name and time.
"""

import collections
import functools
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from tlt_jax.calibration import synthetic_rows
from tlt_jax.chunk import ChunkKind
from tlt_jax.programs import RolloutPrograms
from tlt_jax.spot_training import DrafterState

SCOPES = ("draft", "noise", "attention_scores", "cache_write", "attention", "ffn", "head", "commit")
"""From all scopes on an instruction's path the one farthest left in this table is taken."""

_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{.*?op_name="([^"]*)"')
_CONTROL = re.compile(r"^(while|conditional|call)([._]|$)")


def scopes_of(program_text: str) -> dict[str, str]:
    """Scope of each instruction of a compiled program, from `Compiled.as_text()`."""
    found = {}
    for line in program_text.splitlines():
        match = _INSTRUCTION.match(line)
        if match:
            found[match[1]] = scope_of_path(match[2])
    return found


def scope_of_path(path: str) -> str:
    """`jit(chunk)/rollout/while/body/verify/ffn/dot_general` -> `ffn`; "other" without a scope."""
    parts = set(path.split("/"))
    return next((scope for scope in SCOPES if scope in parts), "other")


def seconds_by_scope(program: Any, run: Callable[[], Any]) -> dict[str, float]:
    """Seconds that all devices together spend in each scope of `program` while `run()` runs it.

    Args:
      program: a compiled program (`jax.stages.Compiled`).
      run: runs that program and no other one.
    """
    scopes = scopes_of(program.as_text())
    totals: dict[str, float] = collections.defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        for path in pathlib.Path(folder).rglob("*.xplane.pb"):
            for name, seconds in _executed(ProfileData.from_file(str(path))):
                totals[scopes.get(name, "other")] += seconds
    return dict(totals)


def _executed(profile: ProfileData) -> Iterable[tuple[str, float]]:
    """(instruction, seconds) of everything that ran and holds no other instruction."""
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                if "hlo_op" in stats and not _CONTROL.match(event.name):
                    yield str(stats["hlo_op"]), event.duration_ns * 1e-9


def round_profile(
    programs: RolloutPrograms, target: Any, drafter_state: DrafterState | None
) -> list[dict[str, Any]]:
    """Where a round's time goes in each row bucket, on synthetic rows that never end.

    Args:
      programs: compiled programs and settings; must not be `training`.
      target: policy parameters in rollout layout.
      drafter_state: the drafter, None without drafting; copied, not donated.

    Returns:
      Per row bucket: rows per slice, cache length, strategy, and "milliseconds" by scope for one
      round of one slice.
    """
    config, never = programs.rollout, (programs.policy.vocab_size,)
    sampler = programs.sampler(jax.random.key(0), never)
    rows, found = synthetic_rows(programs, target, live=True), []
    for bucket in programs.buckets:
        rows = programs.compact(rows, bucket)
        kind = ChunkKind(programs.strategy(bucket), training=False)
        room = config.length_buckets[0] - config.max_prompt_length - config.slack
        rounds = min(config.chunk_tokens, room) // kind.strategy.verify_tokens
        orders = programs.orders(rounds=rounds, index=0)
        given = target, drafter_state, None, sampler, orders, rows
        program = programs.chunk_program(kind, given)
        jax.block_until_ready(program(*_undonated(given)))  # the first run touches new memory
        again = _undonated(given)
        seconds = seconds_by_scope(program, functools.partial(program, *again))
        shares = programs.slices * rounds / 1e3
        found.append(
            {
                "rows": bucket,
                "length": rows.tokens.shape[1],
                "strategy": str(kind.strategy),
                "milliseconds": {scope: value / shares for scope, value in seconds.items()},
            }
        )
    return found


def _undonated(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A chunk's arguments with copies of those that it donates."""
    target, state, buffer, sampler, orders, rows = arguments
    state, rows = jax.block_until_ready(jax.tree.map(jnp.copy, (state, rows)))
    return target, state, buffer, sampler, orders, rows
