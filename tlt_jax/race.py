"""Rollout modes taking turns in one process: same prompts, keys and weights.

Every mode first runs all batches once, untimed, which gives the tokens to compare. Then timed modes
take turns, repeat after repeat, each beginning with another one.
"""

import collections
import dataclasses
import pathlib
import time
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import jax
import numpy as np

from tlt_jax import (
    calibration,
    chunk,
    comparison,
    metrics,
    paces,
    rl_step,
    rollout,
    setup,
    sharding,
    spot_training,
)
from tlt_jax.config import MeshConfig, RolloutConfig, RunConfig
from tlt_jax.controller import FRESH, Controller
from tlt_jax.dealing import NO_HISTORY, LengthHistory
from tlt_jax.paces import Paces
from tlt_jax.program_pool import ProgramPool
from tlt_jax.programs import RolloutPrograms
from tlt_jax.rollout import Carry, ChunkRecord, Response, RolloutResult
from tlt_jax.types import Strategy

FIRST_BATCH = 1_000_000  # prompts that training does not reach
EARLIER = 1_000_000  # added to a batch's index: the key of an earlier answer to its prompts


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured: a configuration, its task's prompts, and weights."""

    config: RunConfig
    prompts: Any  # with random access
    stop_tokens: tuple[int, ...]
    target: Any  # policy parameters
    drafters: Mapping[str, Any]  # parameters by name, see `Mode.drafter`
    origin: str  # of the weights
    folder: pathlib.Path  # where what is written to be measured may be, until it is removed


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way of running the same rollout."""

    name: str
    rollout: RolloutConfig
    slices: int
    timed: bool = False
    training: bool = False  # idle slices train, at learning rate 0: the price without the gain
    drafter: str = "trained"  # "frozen": of the warm start; "random" and "NaN": broken
    informed: bool = False  # knows how long other responses to the same prompts were
    exact: bool = True  # must have the tokens of plain decoding
    surprised: bool = False  # each rollout begins as if the drafter had been the trained one so far


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
    tokens: list[int] = dataclasses.field(default_factory=list)  # the same
    paces: list[Paces] = dataclasses.field(default_factory=list)  # the same
    chunks: list[ChunkRecord] = dataclasses.field(default_factory=list)  # of the untimed pass
    controller: Controller = FRESH  # what all passes so far have taught about strategies
    history: LengthHistory = NO_HISTORY  # what rollouts begin with

    def beginning(self) -> Carry:
        """What a rollout begins with and may take."""
        state = buffer = None
        if self.draft is not None:
            tx = spot_training.optimizer(self.config.drafter)
            state = setup.drafter_state(tx, self.programs.mesh, self.draft)
        if self.mode.training:
            buffer = chunk.empty_buffers(
                self.programs.mesh, self.config.policy, self.config.drafter
            )
        library = self.programs.empty_library()
        jax.block_until_ready((state, buffer, library))
        known = dataclasses.replace(self.controller, history=self.history)
        return Carry(state, buffer, library, known)

    def run(self, prompts: list[np.ndarray], key: jax.Array) -> tuple[RolloutResult, float]:
        """One rollout and its seconds; the next one goes on with what it taught.

        But not with the lengths of responses: prompts come back with the very same ones here, which
        no run ever sees.
        """
        carry = self.beginning()
        start = time.perf_counter()
        result = rollout.run(
            self.programs,
            self.target,
            carry,
            prompts,
            key,
            stop_tokens=self.stop_tokens,
        )
        seconds = time.perf_counter() - start
        if not self.mode.surprised:
            self.controller = result.carry.controller
        return result, seconds

    def run_untimed(self, prompts: list[np.ndarray], key: jax.Array) -> list[Response]:
        """One rollout whose records are kept."""
        result, _ = self.run(prompts, key)
        self.chunks += result.chunks
        return result.responses


def throughout(base: RolloutConfig, *strategies: str) -> RolloutConfig:
    """The same strategies in every row bucket, and caches that hold what they write."""
    written = max(Strategy.parse(strategy).written_slots for strategy in strategies)
    lengths = (*base.length_buckets[:-1], max(base.max_length + written, base.length_buckets[-1]))
    arms = (" ".join(dict.fromkeys(strategies)),) * len(base.row_buckets)
    return dataclasses.replace(base, strategies=arms, length_buckets=lengths)


def make_runner(mode: Mode, subject: Subject, pool: ProgramPool) -> Runner:
    """Lays out a mode's weights on its mesh; compiles nothing yet.

    Modes with the same slices that all draft, or all do not, may share a pool: what else sets
    their programs apart is in the programs' keys.
    """
    mesh_config = MeshConfig(slices=mode.slices, tensor=subject.config.mesh.tensor)
    config = dataclasses.replace(
        subject.config,
        mesh=mesh_config,
        rollout=mode.rollout,
        drafter=dataclasses.replace(subject.config.drafter, learning_rate=0.0),
    )
    mesh = sharding.make_mesh(mesh_config)
    programs = RolloutPrograms(
        mesh=mesh,
        policy=config.policy,
        rollout=config.rollout,
        drafter=config.drafter,
        drafting=config.rollout.speculate,
        training=mode.training,
        pool=pool,
    )
    draft = subject.drafters[mode.drafter]
    return Runner(
        mode=mode,
        config=config,
        programs=programs,
        target=rl_step.rollout_layout(mesh, config)(subject.target),
        draft=draft if config.rollout.speculate else None,
        stop_tokens=subject.stop_tokens,
    )


def make_runners(
    subject: Subject,
    modes: Sequence[Mode],
    pools: MutableMapping[tuple[int, bool], ProgramPool] | None = None,
) -> list[Runner]:
    """Runners of all modes; like modes share their programs, across calls with the same `pools`."""
    if pools is None:
        pools = collections.defaultdict(ProgramPool)
    return [
        make_runner(mode, subject, pools[mode.slices, mode.rollout.speculate]) for mode in modes
    ]


def race(subject: Subject, runners: Sequence[Runner], min_tokens: int) -> dict[str, Any]:
    """Runs all modes on batches of the same sequences and gathers their rows.

    Batches are drawn until the first runner, plain decoding, has made `min_tokens` tokens.
    Programs that only untimed modes use are dropped as soon as their tokens have been compared.
    """
    plain = runners[0]
    plain.programs.warm_up(plain.target, *plain.beginning().arrays)
    batches: list[tuple[list[np.ndarray], jax.Array]] = []
    expected: list[list[Response]] = []
    tokens = 0
    while tokens < min_tokens:
        batches.append(draw_batch(subject, plain.mode.rollout, len(batches)))
        expected.append(plain.run_untimed(*batches[-1]))
        tokens += sum(len(response.response) for response in expected[-1])
    timed = [runner for runner in runners if runner.mode.timed]
    kept = [runner.programs.pool for runner in timed]
    rows = [mode_row(plain, tokens, [])]
    for runner in runners[1:]:
        runner.programs.warm_up(runner.target, *runner.beginning().arrays)
        if runner.mode.training and not runner.config.drafter.rounds_per_microbatch:
            carry, _ = calibration.time_microbatch(
                runner.programs, runner.target, runner.beginning()
            )
            runner.controller = carry.controller
        rows.append(compare(subject, runner, batches, expected))
        print(f"  {runner.mode.name}: {rows[-1]['mismatches']} mismatches", flush=True)
        if not any(runner.programs.pool is pool for pool in kept):
            runner.programs.pool.clear()
    take_turns(timed, batches, subject.config.benchmark.repeats)
    rows = [row | timing(runner, plain) for runner, row in zip(runners, rows, strict=True)]
    return {
        "batch": plain.mode.rollout.num_sequences,
        "batches": len(batches),
        "tokens": tokens,
        "modes": rows,
    }


def take_turns(
    timed: Sequence[Runner], batches: Sequence[tuple[list[np.ndarray], jax.Array]], repeats: int
) -> None:
    """Runs all batches `repeats` times in every mode, batch by batch, and notes the seconds."""
    for repeat in range(repeats):
        first = repeat % len(timed)
        passes: list[list[tuple[RolloutResult, float]]] = [[] for _ in timed]
        for drawn in batches:
            for place in [*range(first, len(timed)), *range(first)]:
                passes[place].append(timed[place].run(*drawn))
        for runner, ran in zip(timed, passes, strict=True):
            responses = [response for result, _ in ran for response in result.responses]
            runner.seconds.append(sum(seconds for _, seconds in ran))
            runner.tokens.append(sum(len(response.response) for response in responses))
            chunks = [record for result, _ in ran for record in result.chunks]
            runner.paces.append(paces.by_bucket(chunks))


def draw_batch(
    subject: Subject, shape: RolloutConfig, index: int
) -> tuple[list[np.ndarray], jax.Array]:
    """Prompts, each repeated for its group, and the key of one batch."""
    first = FIRST_BATCH + index * shape.prompts_per_step
    drawn = [subject.prompts[first + i]["prompt_ids"] for i in range(shape.prompts_per_step)]
    asked = [prompt for prompt in drawn for _ in range(shape.group_size)]
    return asked, _key(subject, index)


def _key(subject: Subject, index: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(subject.config.seed), FIRST_BATCH + index)


def compare(
    subject: Subject,
    runner: Runner,
    batches: Sequence[tuple[list[np.ndarray], jax.Array]],
    expected: Sequence[list[Response]],
) -> dict[str, Any]:
    """Runs a mode untimed on all batches; its row, with where its tokens part from the expected."""
    if runner.mode.informed:
        for index, (prompts, _) in enumerate(batches):
            earlier, _ = runner.run(prompts, _key(subject, EARLIER + index))
            lengths = {**runner.history.lengths, **earlier.carry.controller.history.lengths}
            runner.history = LengthHistory(lengths)
    if runner.mode.surprised:
        trained = dataclasses.replace(runner.mode, drafter="trained", surprised=False)
        healthy = make_runner(trained, subject, runner.programs.pool)
        for drawn in batches:
            healthy.run(*drawn)
        runner.controller = healthy.controller
    parted, tokens, config = [], 0, subject.config
    for (prompts, key), wanted in zip(batches, expected, strict=True):
        responses = runner.run_untimed(prompts, key)
        tokens += sum(len(response.response) for response in responses)
        if runner.mode.exact:
            parted += comparison.partings(
                runner.target,
                config.policy,
                runner.programs.sampler(key, runner.stop_tokens),
                wanted,
                responses,
                near_tie=config.benchmark.near_tie,
                row_length=config.rollout.length_buckets[-1],
            )
    return mode_row(runner, tokens, parted)


def mode_row(runner: Runner, tokens: int, parted: Sequence[comparison.Parting]) -> dict[str, Any]:
    """What the untimed pass of a mode has shown; times are None until it has been timed."""
    counted = runner.mode.exact
    return {
        "mode": runner.mode.name,
        "slices": runner.mode.slices,
        "tokens": tokens,
        "rounds": sum(max(record.rounds_run) for record in runner.chunks),
        "accept_length": metrics.accept_length(runner.chunks),
        "accept_by_position": metrics.accept_by_position(runner.chunks),
        "mismatches": len(parted) if counted else None,
        "explained_mismatches": sum(p.explained for p in parted) if counted else None,
        "partings": [dataclasses.asdict(parting) for parting in parted],
        "microbatches": sum(sum(record.microbatches) for record in runner.chunks),
        "seconds": None,
    }


def timing(runner: Runner, plain: Runner) -> dict[str, Any]:
    """A timed mode's entries; speed-ups are ratios of tokens per second of the same repeat."""
    if not runner.seconds:
        return {}
    rates, plain_rates = (np.array(r.tokens) / np.array(r.seconds) for r in (runner, plain))
    speedups = rates / plain_rates
    full_rates, plain_full_rates = (
        np.array([paces.overall(of_repeat).rate for of_repeat in r.paces]) for r in (runner, plain)
    )
    full = full_rates / plain_full_rates
    return {
        "seconds": float(np.median(runner.seconds)),
        "seconds_all": runner.seconds,
        "tokens_all": runner.tokens,
        "tokens_per_second": float(np.median(rates)),
        "speedup": float(np.median(speedups)),
        "speedup_min": float(speedups.min()),
        "speedup_max": float(speedups.max()),
        "full_tokens_per_second": float(np.median(full_rates)),
        "full_speedup": float(np.median(full)),
        "full_speedup_min": float(full.min()),
        "full_speedup_max": float(full.max()),
    }


def table(workload: dict[str, Any]) -> str:
    """The workload's rows as aligned text."""
    lines = [
        f"{workload['batches']} batches of {workload['batch']} sequences, "
        f"{workload['tokens']} tokens",
        f"{'mode':<28}{'seconds':>9}{'tokens/s':>10}{'speed-up (min-max)':>22}{'full rows':>11}"
        f"{'accept':>8}{'rounds':>8}{'mismatches':>12}{'explained':>11}",
    ]
    for row in workload["modes"]:
        timing = f"{'-':>9}{'-':>10}{'-':>22}{'-':>11}"
        if row["seconds"] is not None:
            spread = f"{row['speedup']:.2f}x ({row['speedup_min']:.2f}-{row['speedup_max']:.2f})"
            full = f"{row['full_speedup']:>10.2f}x"
            timing = f"{row['seconds']:>9.2f}{row['tokens_per_second']:>10.0f}{spread:>22}{full}"
        lines.append(
            f"{row['mode']:<28}{timing}{row['accept_length']:>8.2f}{row['rounds']:>8}"
            f"{_count(row['mismatches']):>12}{_count(row['explained_mismatches']):>11}"
        )
    return "\n".join(lines)


def _count(number: int | None) -> str:
    return "-" if number is None else str(number)
