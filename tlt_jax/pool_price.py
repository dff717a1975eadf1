"""What a pool of compiled programs costs: memory and compile time (the paper's table 5).

Three pools of the chunk programs of one mesh, for the same strategies:

one strategy     the first one configured for each row bucket, lengths as a rollout needs them
every strategy   in each row bucket and each length bucket
bucketed         in each row bucket those that the bandit's cost model rates best, and of the length
                 buckets those that rollouts come to: they grow as rows shrink

Programs stay in memory together, so their sizes add up; what they need while they run does not, so
of that the largest counts.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache

from tlt_jax.chunk import ChunkKind
from tlt_jax.program_pool import ProgramPool
from tlt_jax.programs import RolloutPrograms
from tlt_jax.race import Mode, Runner, Subject, make_runner, throughout
from tlt_jax.types import Strategy

BEST = 2
"""Strategies of a row bucket in the bucketed pool."""


class Place(NamedTuple):
    """What sets the chunk programs of a mesh apart."""

    rows: int
    length: int
    strategy: Strategy


class Price(NamedTuple):
    """What one program costs."""

    code_bytes: int  # of the serialised program
    scratch_bytes: int  # while it runs, on one device
    cold_seconds: float  # to compile what was traced and lowered
    cached_seconds: float  # to load it from JAX's persistent cache instead


def measure(subject: Subject) -> list[dict[str, Any]]:
    """Compiles every program of the largest pool, cold and from a cache on disk.

    Chunks in which idle slices train are left out.

    Returns:
      For each pool its "pool" name, the count of "programs" and sums of `Price`, of scratch the
      largest; "bytes" is code and scratch, "share" of the bytes of every strategy.
    """
    config = subject.config
    base = dataclasses.replace(config.rollout, speculate=True)
    configured = {rows: base.arms(rows)[0] for rows in base.row_buckets}
    named = [*map(str, configured.values()), "plain", *config.benchmark.strategies]
    mode = Mode("memory", throughout(base, *named), config.mesh.slices)
    runner = make_runner(mode, subject, ProgramPool())
    found = places(runner.programs, configured)
    prices = _prices(runner, sorted(set().union(*found.values())))
    sums = {name: _sum([prices[place] for place in chosen]) for name, chosen in found.items()}
    whole = sums["every strategy"]["bytes"]
    return [{"pool": name, **held, "share": held["bytes"] / whole} for name, held in sums.items()]


def places(programs: RolloutPrograms, configured: Mapping[int, Strategy]) -> dict[str, set[Place]]:
    """The programs of each pool by its name; `configured` is a strategy for each row bucket."""
    model, lengths = programs.cost_model, programs.rollout.length_buckets

    def best(rows: int) -> list[Strategy]:
        rated = sorted(programs.arms(rows), key=lambda arm: -model.rate(rows, arm))
        return rated[:BEST]

    def needed(chosen: Callable[[int], list[Strategy]]) -> set[Place]:
        return {
            Place(rows, length, arm)
            for rows in programs.buckets
            for length in lengths
            if length >= programs.least_length(rows)
            for arm in chosen(rows)
        }

    every = {
        Place(rows, length, arm)
        for rows in programs.buckets
        for length in lengths
        for arm in programs.arms(rows)
    }
    one = needed(lambda rows: [configured[rows]])
    return {"one strategy": one, "every strategy": every, "bucketed": needed(best)}


def _prices(runner: Runner, wanted: list[Place]) -> dict[Place, Price]:
    """Compiles each program twice, on as many threads as there are cores."""
    arrays = runner.beginning().arrays
    with _fresh_cache(), concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        compile_one = functools.partial(_compile, runner, arrays)
        cold = list(threads.map(compile_one, wanted))
        cached = list(threads.map(compile_one, wanted))
    return {
        place: Price(code, scratch, seconds, again)
        for place, (code, scratch, seconds), (_, _, again) in zip(wanted, cold, cached, strict=True)
    }


def _compile(runner: Runner, arrays: tuple[Any, ...], place: Place) -> tuple[int, int, float]:
    """Code and scratch bytes of a program, and seconds of compiling it."""
    programs = runner.programs
    kind = ChunkKind(place.strategy)
    held = runner.target, *arrays
    arguments = programs.chunk_shapes(kind, place.rows, place.length, held)
    lowered = programs.lowered_chunk(kind, arguments)
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    code, _, _ = serialize_executable.serialize(compiled)
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not tell what its programs need"
    return len(code), memory.temp_size_in_bytes, seconds


@contextlib.contextmanager
def _fresh_cache() -> Iterator[None]:
    """JAX's persistent cache in an empty folder that goes away."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        _set_cache(dict(zip(names, (folder, 0.0), strict=True)))
        try:
            yield
        finally:
            _set_cache(before)


def _set_cache(values: dict[str, Any]) -> None:
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # or it would go on with the folder it knows


def _sum(prices: list[Price]) -> dict[str, Any]:
    code = sum(price.code_bytes for price in prices)
    scratch = max(price.scratch_bytes for price in prices)
    return {
        "programs": len(prices),
        "bytes": code + scratch,
        "code_bytes": code,
        "scratch_bytes": scratch,
        "cold_seconds": sum(price.cold_seconds for price in prices),
        "cached_seconds": sum(price.cached_seconds for price in prices),
    }


def table(pools: list[dict[str, Any]]) -> str:
    """The pools as aligned text."""
    lines = [
        "chunk programs held together; seconds of compiling summed over programs",
        f"{'pool':<16}{'programs':>9}{'MiB':>8}{'share':>7}{'code':>8}{'scratch':>9}"
        f"{'cold s':>9}{'cached s':>10}",
    ]
    for held in pools:
        lines.append(
            f"{held['pool']:<16}{held['programs']:>9}{held['bytes'] / 2**20:>8.1f}"
            f"{held['share']:>7.2f}{held['code_bytes'] / 2**20:>8.1f}"
            f"{held['scratch_bytes'] / 2**20:>9.1f}{held['cold_seconds']:>9.1f}"
            f"{held['cached_seconds']:>10.1f}"
        )
    return "\n".join(lines)
