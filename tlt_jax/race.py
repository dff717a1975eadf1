"""Compares rollout modes side by side: same prompts, keys and weights, in one process.

    python -m tlt_jax.benchmark --config=configs/quickstart.py --workdir=runs/quickstart

Takes the weights of the run in the workdir if it has ended, else those of its warm start. Every
mode first runs all batches once, untimed, which gives the tokens to compare. Then timed modes take
turns. Prints a table, where a round's time goes in plain decoding and in the configured mix, and
what drafter training on idle slices costs an RL step; writes `benchmark.json`.
"""

import collections
import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from tlt_jax import (
    chunk,
    command_line,
    comparison,
    drafter,
    metrics,
    policy,
    profiling,
    rl_step,
    rollout,
    setup,
    sharding,
    spot_training,
    step_price,
    validation,
    weights,
)
from tlt_jax.buffer import DrafterBuffer
from tlt_jax.config import MeshConfig, RolloutConfig, RunConfig
from tlt_jax.controller import FRESH, Controller
from tlt_jax.dealing import NO_HISTORY
from tlt_jax.ngram import Library
from tlt_jax.program_pool import ProgramPool
from tlt_jax.programs import RolloutPrograms
from tlt_jax.reporting.writers import write_atomically
from tlt_jax.rollout import ChunkRecord, Response, RolloutResult
from tlt_jax.spot_training import DrafterState
from tlt_jax.types import Strategy

FIRST_BATCH = 1_000_000  # prompts that training does not reach
TAIL_SHARE = 4  # the workload of few sequences makes a fourth of the tokens


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way of running the same rollout."""

    name: str
    rollout: RolloutConfig
    slices: int
    timed: bool = False
    training: bool = False  # idle slices train, at learning rate 0: the price without the gain
    frozen: bool = False  # with the drafter of the warm start, as if it had never been trained


@dataclasses.dataclass
class Runner:
    """A mode's programs and weights, and what was measured with them."""

    mode: Mode
    config: RunConfig
    programs: RolloutPrograms
    target: Any
    draft: Any  # drafter parameters, None for plain decoding
    stop_tokens: tuple[int, ...]
    seconds: list[float] = dataclasses.field(default_factory=list)  # one per repeat, all batches
    chunks: list[ChunkRecord] = dataclasses.field(default_factory=list)  # of the untimed pass
    controller: Controller = FRESH  # what all passes so far have taught about strategies

    def beginning(self) -> tuple[DrafterState | None, DrafterBuffer | None, Library | None]:
        """Drafter state, buffer and library that a rollout begins with and may take."""
        state = buffer = None
        if self.draft is not None:
            tx = spot_training.optimizer(self.config.drafter)
            state = setup.drafter_state(tx, self.programs.mesh, self.draft)
        if self.mode.training:
            buffer = chunk.empty_buffers(
                self.programs.mesh, self.config.policy, self.config.drafter
            )
        return jax.block_until_ready((state, buffer, self.programs.empty_library()))

    def run(self, prompts: list[np.ndarray], key: jax.Array) -> tuple[RolloutResult, float]:
        """One rollout and its seconds; the next one goes on with what it taught."""
        state, buffer, library = self.beginning()
        start = time.perf_counter()
        result = rollout.run(
            self.programs,
            self.target,
            state,
            buffer,
            prompts,
            key,
            stop_tokens=self.stop_tokens,
            library=library,
            controller=self.controller,
        )
        seconds = time.perf_counter() - start
        # Without lengths: prompts come back here with the very same responses, which no run sees.
        self.controller = dataclasses.replace(result.controller, history=NO_HISTORY)
        return result, seconds

    def run_untimed(self, prompts: list[np.ndarray], key: jax.Array) -> list[Response]:
        """One rollout whose records are kept."""
        result, _ = self.run(prompts, key)
        self.chunks += result.chunks
        return result.responses


def modes(config: RunConfig, batch: int) -> list[Mode]:
    """Modes compared on batches of `batch` sequences; the first one is plain decoding."""
    group = min(config.rollout.group_size, batch)
    base = dataclasses.replace(
        config.rollout, prompts_per_step=batch // group, group_size=group, speculate=True
    )
    slices = config.mesh.slices
    fixed = [
        Mode(strategy, _throughout(base, strategy), slices, timed=True)
        for strategy in config.benchmark.strategies
    ]
    plain = dataclasses.replace(base, speculate=False)
    compared = [
        Mode("plain", plain, slices, timed=True),
        *fixed,
        Mode("by bucket", base, slices, timed=True),
        Mode(
            "bandit", _throughout(base, "plain", *config.benchmark.strategies), slices, timed=True
        ),
        Mode("by bucket + idle training", base, slices, timed=slices > 1, training=slices > 1),
    ]
    others = [count for count in config.benchmark.other_slices if batch % count == 0]
    chunked = dataclasses.replace(base, chunk_tokens=config.benchmark.other_chunk_tokens)
    # One strategy throughout, so that accept lengths compare.
    deepest = max(config.benchmark.strategies, key=lambda text: Strategy.parse(text).depth)
    return [
        *compared,
        *[Mode(f"plain, {count} slices", plain, count) for count in others],
        *[Mode(f"by bucket, {count} slices", base, count) for count in others],
        Mode(f"{deepest}, frozen drafter", _throughout(base, deepest), slices, frozen=True),
        Mode(f"by bucket, chunks of {chunked.chunk_tokens}", chunked, slices),
    ]


def _throughout(base: RolloutConfig, *strategies: str) -> RolloutConfig:
    """The same strategies in every row bucket, and caches that hold what they write."""
    written = max(Strategy.parse(strategy).written_slots for strategy in strategies)
    lengths = (*base.length_buckets[:-1], max(base.max_length + written, base.length_buckets[-1]))
    arms = (" ".join(dict.fromkeys(strategies)),) * len(base.row_buckets)
    return dataclasses.replace(base, strategies=arms, length_buckets=lengths)


def make_runner(
    mode: Mode,
    config: RunConfig,
    target: Any,
    draft: Any,
    stop: tuple[int, ...],
    pool: ProgramPool,
) -> Runner:
    """Lays out a mode's weights on its mesh; compiles nothing yet.

    Modes with the same slices that all draft, or all do not, may share a pool: what else sets
    their programs apart is in the programs' keys.
    """
    rows = -(-mode.rollout.num_sequences // mode.slices)
    widest = mode.rollout
    drafter_config = dataclasses.replace(config.drafter, learning_rate=0.0)
    if rows > widest.row_buckets[0]:
        widest = dataclasses.replace(
            widest,
            row_buckets=(rows, *widest.row_buckets),
            strategies=(widest.strategies[0], *widest.strategies),
        )
        prices = drafter_config.rounds_per_microbatch
        drafter_config = dataclasses.replace(
            drafter_config, rounds_per_microbatch=(prices[0], *prices)
        )
    mesh_config = MeshConfig(slices=mode.slices, tensor=config.mesh.tensor)
    config = dataclasses.replace(config, mesh=mesh_config, rollout=widest, drafter=drafter_config)
    mesh = sharding.make_mesh(mesh_config)
    programs = RolloutPrograms(
        mesh=mesh,
        policy=config.policy,
        rollout=widest,
        drafter=config.drafter,
        drafting=widest.speculate,
        training=mode.training,
        pool=pool,
    )
    return Runner(
        mode=mode,
        config=config,
        programs=programs,
        target=rl_step.rollout_layout(mesh, config)(target),
        draft=draft if widest.speculate else None,
        stop_tokens=stop,
    )


def make_runners(
    config: RunConfig, batch: int, target: Any, draft: Any, frozen: Any, stop: tuple[int, ...]
) -> list[Runner]:
    """Runners of all modes for batches of `batch` sequences; like modes share their programs."""
    pools: dict[tuple[int, bool], ProgramPool] = collections.defaultdict(ProgramPool)
    return [
        make_runner(
            mode,
            config,
            target,
            frozen if mode.frozen else draft,
            stop,
            pools[mode.slices, mode.rollout.speculate],
        )
        for mode in modes(config, batch)
    ]


def load_weights(config: RunConfig, workdir: pathlib.Path) -> tuple[Any, Any, str]:
    """Policy and drafter parameters of the workdir's run or of the warm start, and which."""
    path = workdir / "policy.safetensors"
    if not path.exists():
        origin = config.warm_start_dir or "random initial weights"
        return setup.initial_policy(config), setup.initial_drafter(config), origin
    dtype = config.policy.dtype
    draft_specs = drafter.param_specs(config.policy, config.drafter)
    return (
        weights.load(path, policy.param_specs(config.policy), dtype=dtype),
        weights.load(workdir / "drafter" / "drafter.safetensors", draft_specs, dtype=dtype),
        str(workdir),
    )


def benchmark(config: RunConfig, workdir: pathlib.Path) -> dict[str, Any]:
    """Both workloads; returns what is written to `benchmark.json`."""
    task, prompts = setup.load_task(config)
    target, draft, origin = load_weights(config, workdir)
    print(f"weights: {origin}", flush=True)
    frozen = setup.initial_drafter(config)
    stop = (task.tokenizer.eos_id,)
    wanted = {config.rollout.num_sequences: config.benchmark.min_tokens}
    wanted.setdefault(config.benchmark.small_batch, config.benchmark.min_tokens // TAIL_SHARE)
    workloads: list[dict[str, Any]] = []
    profile: list[dict[str, Any]] = []
    for batch, min_tokens in wanted.items():
        runners = make_runners(config, batch, target, draft, frozen, stop)
        workloads.append(compare(config, runners, prompts, batch, min_tokens))
        print(table(workloads[-1]), flush=True)
        if len(workloads) == 1:
            profile = [entry for runner in runners for entry in round_profile(runner)]
            print(profile_table(profile), flush=True)
        del runners  # and their programs: a process may hold only so many compiled for CPU
    price = None
    if config.mesh.slices > 1:
        price = step_price.measure(config, target, draft)
        print(step_price.sentence(price), flush=True)
    results = {
        "weights": origin,
        "repeats": config.benchmark.repeats,
        "workloads": workloads,
        "profile": profile,
        "step_price": price,
    }
    write_atomically(workdir / "benchmark.json", (json.dumps(results, indent=2) + "\n").encode())
    return results


def compare(
    config: RunConfig, runners: list[Runner], prompts: Any, batch: int, min_tokens: int
) -> dict[str, Any]:
    """Runs all modes on batches of `batch` sequences and gathers their rows.

    Batches are drawn until plain decoding, the first runner, has made `min_tokens` tokens.
    Programs that only untimed modes use are dropped as soon as their tokens have been compared.
    """
    runners[0].programs.warm_up(runners[0].target, *runners[0].beginning())
    batches: list[tuple[list[np.ndarray], jax.Array]] = []
    expected: list[list[Response]] = []
    tokens = 0
    while tokens < min_tokens:
        index = len(batches)
        batches.append(draw_batch(runners[0].mode.rollout, prompts, config.seed, index))
        expected.append(runners[0].run_untimed(*batches[-1]))
        tokens += sum(len(response.response) for response in expected[-1])
    timed = [runner for runner in runners if runner.mode.timed]
    kept = [runner.programs.pool for runner in timed]
    parted: dict[str, list[comparison.Parting]] = {runners[0].mode.name: []}
    for runner in runners[1:]:
        runner.programs.warm_up(runner.target, *runner.beginning())
        parted[runner.mode.name] = check_mode(config, runner, batches, expected)
        print(f"  {runner.mode.name}: {len(parted[runner.mode.name])} mismatches", flush=True)
        if not any(runner.programs.pool is pool for pool in kept):
            runner.programs.pool.clear()
    for repeat in range(config.benchmark.repeats):
        first = repeat % len(timed)
        totals = dict.fromkeys(range(len(timed)), 0.0)
        for drawn in batches:
            for place in [*range(first, len(timed)), *range(first)]:
                totals[place] += timed[place].run(*drawn)[1]
        for place, seconds in totals.items():
            timed[place].seconds.append(seconds)
    rows = [mode_row(runner, tokens, runners[0], parted[runner.mode.name]) for runner in runners]
    return {"batch": batch, "batches": len(batches), "tokens": tokens, "modes": rows}


def draw_batch(
    shape: RolloutConfig, prompts: Any, seed: int, index: int
) -> tuple[list[np.ndarray], jax.Array]:
    """Prompts, each repeated for its group, and the key of one batch."""
    first = FIRST_BATCH + index * shape.prompts_per_step
    drawn = [prompts[first + i]["prompt_ids"] for i in range(shape.prompts_per_step)]
    asked = [prompt for prompt in drawn for _ in range(shape.group_size)]
    return asked, jax.random.fold_in(jax.random.key(seed), FIRST_BATCH + index)


def check_mode(
    config: RunConfig,
    runner: Runner,
    batches: list[tuple[list[np.ndarray], jax.Array]],
    expected: list[list[Response]],
) -> list[comparison.Parting]:
    """Runs a mode untimed on all batches; returns where its tokens part from the expected."""
    found = []
    for (prompts, key), wanted in zip(batches, expected, strict=True):
        responses = runner.run_untimed(prompts, key)
        found += comparison.partings(
            runner.target,
            config.policy,
            runner.programs.sampler(key, runner.stop_tokens),
            wanted,
            responses,
            near_tie=config.benchmark.near_tie,
            row_length=config.rollout.length_buckets[-1],
        )
    return found


def round_profile(runner: Runner) -> list[dict[str, Any]]:
    """Where a round's time goes in plain decoding or in the configured mix; empty for others."""
    if runner.mode.name not in ("plain", "by bucket"):
        return []
    state, _, _ = runner.beginning()
    return profiling.round_profile(runner.programs, runner.target, state)


def profile_table(profile: list[dict[str, Any]]) -> str:
    """`round_profile` as aligned text, milliseconds of one round of one slice."""
    scopes = [*profiling.SCOPES, "other"]
    lines = ["milliseconds of a round by what they are spent on, one slice"]
    lines.append(f"{'strategy':<10}{'rows':>5}{'length':>8}" + "".join(f"{s:>18}" for s in scopes))
    for entry in profile:
        spent = entry["milliseconds"]
        cells = "".join(f"{spent.get(scope, 0.0):>18.3f}" for scope in scopes)
        lines.append(f"{entry['strategy']:<10}{entry['rows']:>5}{entry['length']:>8}{cells}")
    return "\n".join(lines)


def mode_row(
    runner: Runner, tokens: int, plain: Runner, parted: list[comparison.Parting]
) -> dict[str, Any]:
    """A mode's row of `benchmark.json`; times are None for modes that were only compared."""
    row: dict[str, Any] = {
        "mode": runner.mode.name,
        "slices": runner.mode.slices,
        "tokens": tokens,
        "rounds": sum(max(record.rounds_run) for record in runner.chunks),
        "accept_length": metrics.accept_length(runner.chunks),
        "accept_by_position": metrics.accept_by_position(runner.chunks),
        "mismatches": len(parted),
        "explained_mismatches": sum(parting.explained for parting in parted),
        "partings": [dataclasses.asdict(parting) for parting in parted],
        "microbatches": sum(sum(record.microbatches) for record in runner.chunks),
        "seconds": None,
    }
    if runner.seconds:
        speedups = [p / s for p, s in zip(plain.seconds, runner.seconds, strict=True)]
        median = float(np.median(runner.seconds))
        row |= {
            "seconds": median,
            "seconds_all": runner.seconds,
            "tokens_per_second": tokens / median,
            "speedup": float(np.median(speedups)),
            "speedup_min": min(speedups),
            "speedup_max": max(speedups),
        }
    return row


def table(workload: dict[str, Any]) -> str:
    """The workload's rows as aligned text."""
    lines = [
        f"{workload['batches']} batches of {workload['batch']} sequences, "
        f"{workload['tokens']} tokens",
        f"{'mode':<28}{'seconds':>9}{'tokens/s':>10}{'speed-up (min-max)':>22}"
        f"{'accept':>8}{'rounds':>8}{'mismatches':>12}{'explained':>11}",
    ]
    for row in workload["modes"]:
        timing = f"{'-':>9}{'-':>10}{'-':>22}"
        if row["seconds"] is not None:
            spread = f"{row['speedup']:.2f}x ({row['speedup_min']:.2f}-{row['speedup_max']:.2f})"
            timing = f"{row['seconds']:>9.2f}{row['tokens_per_second']:>10.0f}{spread:>22}"
        lines.append(
            f"{row['mode']:<28}{timing}{row['accept_length']:>8.2f}{row['rounds']:>8}"
            f"{row['mismatches']:>12}{row['explained_mismatches']:>11}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    config, workdir = command_line.start(
        argv, slices=lambda config: max([config.mesh.slices, *config.benchmark.other_slices])
    )
    validation.validate_benchmark(config)
    jax.config.update("jax_compilation_cache_dir", str((workdir / "xla_cache").absolute()))
    benchmark(config, workdir)
    print(f"wrote {workdir / 'benchmark.json'}", flush=True)


if __name__ == "__main__":
    command_line.run(main)
