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

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONTROL = re.compile(r"^(while|conditional|call)([._]|$)")


def scopes_of(program_text: str) -> dict[str, str]:
    """Scope of each instruction of a compiled program, from `Compiled.as_text()`.

    Simplifying passes leave instructions without a name, such as the matmuls of an attention with
    one kv head. Such an instruction belongs where its first operand with a scope does.
    """
    found: dict[str, str] = {}
    for instruction, definition in filter(None, map(_parts, program_text.splitlines())):
        named = _OP_NAME.search(definition)
        if named:
            found[instruction] = scope_of_path(named[1])
        else:
            words = re.findall(r"[\w.-]+", definition)
            scopes = (found[word] for word in words if found.get(word, "other") != "other")
            found[instruction] = next(scopes, "other")
    return found


def _parts(line: str) -> tuple[str, str] | None:
    """An instruction's name and its definition, None for another line."""
    match = _INSTRUCTION.match(line)
    return (match[1], match[2]) if match else None


def scope_of_path(path: str) -> str:
    """`jit(chunk)/rollout/while/body/verify/ffn/dot_general` -> `ffn`; "other" without a scope."""
    parts = set(path.split("/"))
    return next((scope for scope in SCOPES if scope in parts), "other")


def seconds_by_scope(
    program: Any, make_arguments: Callable[[], tuple[Any, ...]]
) -> dict[str, float]:
    """Seconds that all devices together spend in each scope of one run of `program`.

    Args:
      program: a compiled program (`jax.stages.Compiled`).
      make_arguments: gives its arguments, which it may take; called outside the measured time.
    """
    _trace(program, make_arguments())  # under its first trace XLA:CPU takes 50 us for small matmuls
    scopes = scopes_of(program.as_text())
    totals: dict[str, float] = collections.defaultdict(float)
    for name, seconds in _trace(program, make_arguments()):
        totals[scopes.get(name, "other")] += seconds
    return dict(totals)


def _trace(program: Any, arguments: tuple[Any, ...]) -> list[tuple[str, float]]:
    """(instruction, seconds) of everything that one run of `program` executes."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(program(*arguments))
        paths = pathlib.Path(folder).rglob("*.xplane.pb")
        return [entry for path in paths for entry in _executed(ProfileData.from_file(str(path)))]


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

    Of several strategies of a bucket the first is looked at.

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
        kind = ChunkKind(programs.arms(bucket)[0])
        room = config.length_buckets[0] - config.max_prompt_length - config.slack
        rounds = min(config.chunk_tokens, room) // kind.strategy.most_committed
        orders = programs.orders(kind.strategy, rounds=rounds, index=0)
        given = target, drafter_state, None, programs.empty_library(), sampler, orders, rows
        program = programs.chunk_program(kind, given)
        seconds = seconds_by_scope(program, functools.partial(_undonated, given))
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


def table(profile: list[dict[str, Any]]) -> str:
    """`round_profile` as aligned text, milliseconds of one round of one slice."""
    scopes = [*SCOPES, "other"]
    lines = ["milliseconds of a round by what they are spent on, one slice"]
    lines.append(f"{'strategy':<10}{'rows':>5}{'length':>8}" + "".join(f"{s:>18}" for s in scopes))
    for entry in profile:
        spent = entry["milliseconds"]
        cells = "".join(f"{spent.get(scope, 0.0):>18.3f}" for scope in scopes)
        lines.append(f"{entry['strategy']:<10}{entry['rows']:>5}{entry['length']:>8}{cells}")
    return "\n".join(lines)


def _undonated(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A chunk's arguments with copies of those that it donates."""
    target, state, buffer, library, sampler, orders, rows = arguments
    copied = jax.tree.map(jnp.copy, (state, library, rows))
    state, library, rows = jax.block_until_ready(copied)
    return target, state, buffer, library, sampler, orders, rows
