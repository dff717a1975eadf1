"""What the benchmark can measure, part by part: which modes race, and what else is looked at."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tlt_jax import paces, pool_price, profiling, step_price, trainer_price
from tlt_jax.config import RolloutConfig, RunConfig
from tlt_jax.program_pool import ProgramPool
from tlt_jax.race import Mode, Runner, Subject, make_runners, race, throughout
from tlt_jax.types import Strategy

SMALL_SHARE = 4  # the workload of few sequences, and each of the grid, makes a fourth of the tokens
QUEUE = 4  # sequences for each slot


def modes(config: RunConfig, batch: int) -> list[Mode]:
    """Modes compared on batches of `batch` sequences; the first one is plain decoding."""
    base = _sized(config, batch)
    slices = config.mesh.slices
    plain, *fixed = _plain_and_fixed(config, base, config.benchmark.strategies)
    compared = [
        plain,
        *fixed,
        Mode("by bucket", base, slices, timed=True),
        _bandit(config, base),
        Mode("by bucket + idle training", base, slices, timed=slices > 1, training=slices > 1),
    ]
    others = [count for count in config.benchmark.other_slices if batch % count == 0]
    chunked = dataclasses.replace(base, chunk_tokens=config.benchmark.other_chunk_tokens)
    # One strategy throughout, so that accept lengths compare.
    deepest = max(config.benchmark.strategies, key=lambda text: Strategy.parse(text).depth)
    return [
        *compared,
        *[Mode(f"plain, {count} slices", plain.rollout, count) for count in others],
        *[Mode(f"by bucket, {count} slices", base, count) for count in others],
        Mode(f"{deepest}, frozen drafter", throughout(base, deepest), slices, drafter="frozen"),
        Mode(f"by bucket, chunks of {chunked.chunk_tokens}", chunked, slices),
    ]


def queue_modes(config: RunConfig) -> list[Mode]:
    """Modes with `QUEUE` times as many sequences as a step has, in the slots of a step."""
    slices, usual = config.mesh.slices, config.rollout
    first = usual.row_buckets.index(usual.slots(slices))
    base = dataclasses.replace(
        _sized(config, QUEUE * usual.num_sequences),
        row_buckets=usual.row_buckets[first:],
        strategies=usual.strategies[first:],
    )
    return [
        *_plain_and_fixed(config, base, config.benchmark.strategies),
        Mode("by bucket", base, slices, timed=True),
        _bandit(config, base),
        Mode("by bucket, no refill", dataclasses.replace(base, refill=False), slices, timed=True),
        Mode("by bucket, lengths known", base, slices, timed=True, informed=True),
    ]


def grid_modes(config: RunConfig, rows: int) -> list[Mode]:
    """Every strategy of the grid in slots of `rows` rows per slice that are refilled.

    Caches are as long as the longest sequences need, so that few programs compile.
    """
    base = dataclasses.replace(
        _sized(config, QUEUE * rows * config.mesh.slices),
        row_buckets=(rows,),
        strategies=("plain",),
        length_buckets=config.rollout.length_buckets[-1:],
    )
    return _plain_and_fixed(config, base, config.benchmark.grid_strategies)


def draft_modes(config: RunConfig, temperature: float) -> list[Mode]:
    """Ways to draft and to verify the same strategies."""
    base = dataclasses.replace(
        _sized(config, config.rollout.num_sequences), temperature=temperature
    )
    plain, *fixed = _plain_and_fixed(config, base, config.benchmark.draft_strategies)
    found = [plain]
    for coupled in fixed:
        likely = dataclasses.replace(coupled.rollout, shared_noise=False)
        rejecting = dataclasses.replace(coupled.rollout, verification="rejection")
        vary = functools.partial(dataclasses.replace, coupled)
        found += [
            coupled,
            vary(name=f"{coupled.name}, most likely", rollout=likely),
            vary(name=f"{coupled.name}, rejection", rollout=rejecting, exact=False),
        ]
    return found


def broken_modes(config: RunConfig) -> list[Mode]:
    """The bandit with drafters that are of no use, which it finds out anew in each rollout."""
    base = _sized(config, config.rollout.num_sequences)
    bandit = _bandit(config, base)
    return [
        *_plain_and_fixed(config, base, ()),
        bandit,
        *[
            dataclasses.replace(
                bandit, name=f"bandit, {drafter} drafter", drafter=drafter, surprised=True
            )
            for drafter in ("random", "NaN")
        ],
    ]


def _sized(config: RunConfig, batch: int) -> RolloutConfig:
    """A speculative rollout of `batch` sequences, with what modes leave out switched on."""
    group = math.gcd(config.rollout.group_size, batch)
    return dataclasses.replace(
        config.rollout,
        prompts_per_step=batch // group,
        group_size=group,
        library_texts=max(batch, config.rollout.library_texts),
        speculate=True,
        verification="coupled",
        shared_noise=True,
        threshold=0,
        deal_by_length=True,
        refill=True,
    )


def _plain_and_fixed(
    config: RunConfig, base: RolloutConfig, strategies: Sequence[str]
) -> list[Mode]:
    """Timed modes: plain decoding, then each strategy in all buckets."""
    slices = config.mesh.slices
    plain = Mode("plain", dataclasses.replace(base, speculate=False), slices, timed=True)
    return [plain, *(Mode(s, throughout(base, s), slices, timed=True) for s in strategies)]


def _bandit(config: RunConfig, base: RolloutConfig) -> Mode:
    arms = throughout(base, "plain", *config.benchmark.strategies)
    return Mode("bandit", arms, config.mesh.slices, timed=True)


def batch(subject: Subject) -> Iterator[dict[str, Any]]:
    """Batches of a step's size, and the profile of a round."""
    config = subject.config
    runners = make_runners(subject, modes(config, config.rollout.num_sequences))
    yield _with_verdict(runners, race(subject, runners, config.benchmark.min_tokens))
    yield {"profile": [entry for runner in runners for entry in _round_profile(runner)]}


def tail(subject: Subject) -> Iterator[dict[str, Any]]:
    """Few sequences."""
    config = subject.config.benchmark
    runners = make_runners(subject, modes(subject.config, config.small_batch))
    yield _with_verdict(runners, race(subject, runners, config.min_tokens // SMALL_SHARE))


def training(subject: Subject) -> Iterator[dict[str, Any]]:
    """Whole RL steps without a drafter and with one, idle slices training and resting."""
    if subject.config.mesh.slices > 1:
        yield step_price.measure(subject.config, subject.target, subject.drafters["trained"])


def queue(subject: Subject) -> Iterator[dict[str, Any]]:
    """More sequences than slots."""
    config = subject.config
    runners = make_runners(subject, queue_modes(config))
    yield _with_verdict(runners, race(subject, runners, config.benchmark.min_tokens))


def grid(subject: Subject) -> Iterator[dict[str, Any]]:
    """Strategies by live rows."""
    config = subject.config
    for rows in config.benchmark.grid_rows:
        runners = make_runners(subject, grid_modes(config, rows))
        found = race(subject, runners, config.benchmark.min_tokens // SMALL_SHARE)
        yield found | {"rows": rows}


def drafts(subject: Subject) -> Iterator[dict[str, Any]]:
    """How to draft and how to verify, at each temperature."""
    config = subject.config
    pools: dict[tuple[int, bool], ProgramPool] = collections.defaultdict(ProgramPool)
    for temperature in config.benchmark.temperatures:
        runners = make_runners(subject, draft_modes(config, temperature), pools)
        found = race(subject, runners, config.benchmark.min_tokens // SMALL_SHARE)
        yield found | {"temperature": temperature}


def broken(subject: Subject) -> Iterator[dict[str, Any]]:
    """Drafters that are of no use."""
    config = subject.config
    yield race(subject, make_runners(subject, broken_modes(config)), config.benchmark.min_tokens)


def memory(subject: Subject) -> Iterator[dict[str, Any]]:
    """Memory and compile time of pools of programs."""
    yield {"pools": pool_price.measure(subject)}


def trainer(subject: Subject) -> Iterator[dict[str, Any]]:
    """Packing, checkpoints and stored features."""
    yield from trainer_price.measure(subject)


PARTS: dict[str, Callable[[Subject], Iterator[dict[str, Any]]]] = {
    "batch": batch,
    "tail": tail,
    "training": training,
    "queue": queue,
    "grid": grid,
    "drafts": drafts,
    "broken": broken,
    "memory": memory,
    "trainer": trainer,
}
"""What can be measured. Each yields its findings one by one: races, or other tables."""


def _with_verdict(runners: Sequence[Runner], found: dict[str, Any]) -> dict[str, Any]:
    """What a race has found, and the bandit beside the strategies that it chooses from."""
    by_name = {runner.mode.name: runner.paces for runner in runners}
    names = "plain", *runners[0].config.benchmark.strategies
    return found | {
        "choice": paces.verdict({name: by_name[name] for name in names}, by_name["bandit"])
    }


def _round_profile(runner: Runner) -> list[dict[str, Any]]:
    """Where a round's time goes in plain decoding or in the configured mix; empty for others."""
    if runner.mode.name not in ("plain", "by bucket"):
        return []
    return profiling.round_profile(runner.programs, runner.target, runner.beginning().drafter)
