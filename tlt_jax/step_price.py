"""What a whole RL step takes without a drafter, with one, and with one that idle slices train.

All sides begin from the same weights and take the same steps, in turns: the same prompts, keys and
policy updates, hence the same tokens. The drafter's learning rate is 0, so that training cannot pay
for itself by better drafts; what remains between "training" and "resting" is its price.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from tlt_jax import metrics, setup
from tlt_jax.budget import Budget
from tlt_jax.config import RunConfig
from tlt_jax.rl_step import Machinery, RunState, rl_step
from tlt_jax.rollout import ChunkRecord

STEPS = 6  # of a repeat, one after another
PLAIN, NGRAM, RESTING, TRAINING = SIDES = ("no drafter", "n-gram", "resting", "training")


@dataclasses.dataclass
class Side:
    """One way of taking the same steps, and what they took."""

    name: str
    machinery: Machinery
    first: RunState  # kept; steps run on copies of it
    microbatch_seconds: float
    seconds: list[float] = dataclasses.field(default_factory=list)  # one per repeat, all steps
    rollout_seconds: list[float] = dataclasses.field(default_factory=list)
    chunks: list[ChunkRecord] = dataclasses.field(default_factory=list)


def measure(config: RunConfig, policy_params: Any, drafter_params: Any) -> dict[str, Any]:
    """Times `STEPS` steps of each side, `config.benchmark.repeats` times after an untimed pass.

    Returns:
      "sides": for each the seconds of a step and of its rollout (medians), of all steps of each
      repeat, and how many times as long as without a drafter a step took in the same repeat
      (median, least, largest). "training": the same ratio between training and resting, the
      median one of their rollouts, and the share of idle time spent on training.
    """
    sides = [make_side(config, policy_params, drafter_params, name) for name in SIDES]
    for repeat in range(config.benchmark.repeats + 1):
        take_turns(sides, first=repeat % len(sides))
        if repeat == 0:  # it had programs to load, and prices to learn
            for side in sides:
                side.seconds, side.rollout_seconds, side.chunks = [], [], []
    for side in sides:
        side.machinery.close()
    resting, training = (next(s for s in sides if s.name == name) for name in (RESTING, TRAINING))
    idle = metrics.idle_seconds(training.chunks)
    used = metrics.idle_training_seconds(training.chunks, training.microbatch_seconds)
    rollouts = np.array(training.rollout_seconds) / np.array(resting.rollout_seconds)
    return {
        "sides": [_row(side, sides[0]) for side in sides],
        "training": {f"over_resting_{key}": x for key, x in _times(training, resting).items()}
        | {
            "over_resting_rollout_times": float(np.median(rollouts)),
            "idle_used_share": used / idle if idle > 0 else 0.0,
        },
    }


def make_side(config: RunConfig, policy_params: Any, drafter_params: Any, name: str) -> Side:
    """Compiled machinery and first state of one of `SIDES`."""
    train = name == TRAINING
    drafter_config = dataclasses.replace(config.drafter, train=train, learning_rate=0.0)
    rollout = dataclasses.replace(config.rollout, speculate=name != PLAIN)
    if name == NGRAM:
        strategies = (f"ngram-{rollout.deepest}",) * len(rollout.row_buckets)
        rollout = dataclasses.replace(rollout, strategies=strategies)
    machinery = setup.make_machinery(
        dataclasses.replace(config, drafter=drafter_config, rollout=rollout)
    )
    state = setup.first_state(machinery, policy_params, drafter_params)
    setup.order_programs(machinery, state)
    return Side(name, machinery, *setup.time_microbatch(machinery, state))


def take_turns(sides: Sequence[Side], *, first: int) -> list[RunState]:
    """`STEPS` steps of all sides, step by step; keeps their seconds, returns their last states.

    What they have taught about times is known when a side begins again.
    """
    states = [_copy(side.first) for side in sides]
    totals, rollouts = [0.0] * len(sides), [0.0] * len(sides)
    for _ in range(STEPS):
        for place in [*range(first, len(sides)), *range(first)]:
            start = time.perf_counter()
            outcome = rl_step(sides[place].machinery, states[place])
            totals[place] += time.perf_counter() - start
            rollouts[place] += outcome.row["seconds"]["rollout"]
            states[place] = outcome.state
            sides[place].chunks += outcome.chunks
    for side, state, total, rollout in zip(sides, states, totals, rollouts, strict=True):
        side.first = _knowing(side.first, state.carry.controller.budget)
        side.seconds.append(total)
        side.rollout_seconds.append(rollout)
    return states


def _knowing(state: RunState, budget: Budget) -> RunState:
    controller = dataclasses.replace(state.carry.controller, budget=budget)
    return dataclasses.replace(state, carry=dataclasses.replace(state.carry, controller=controller))


def _copy(state: RunState) -> RunState:
    """A state whose arrays a step may take; those of `state` stay."""
    copied = jax.block_until_ready(jax.tree.map(lambda x: x.copy(), state.arrays()))
    return state.with_arrays(**copied)


def _row(side: Side, other: Side) -> dict[str, Any]:
    return {
        "side": side.name,
        "seconds": float(np.median(side.seconds)) / STEPS,
        "rollout_seconds": float(np.median(side.rollout_seconds)) / STEPS,
        "seconds_all": side.seconds,
        "accept_length": metrics.accept_length(side.chunks),
    } | _times(side, other)


def _times(side: Side, other: Side) -> dict[str, float]:
    """How many times as long as the other a side took in the same repeat."""
    ratios = np.array(side.seconds) / np.array(other.seconds)
    return {
        "times": float(np.median(ratios)),
        "times_min": float(ratios.min()),
        "times_max": float(ratios.max()),
    }


def table(price: Mapping[str, Any]) -> str:
    """The measurement as aligned text, and what training costs in words."""
    lines = [f"{'an RL step':<14}{'seconds':>9}{'rollout':>9}{'times (min-max)':>24}{'accept':>8}"]
    for row in price["sides"]:
        times = f"{row['times']:.3f} ({row['times_min']:.3f}-{row['times_max']:.3f})"
        lines.append(
            f"{row['side']:<14}{row['seconds']:>9.3f}{row['rollout_seconds']:>9.3f}{times:>24}"
            f"{row['accept_length']:>8.2f}"
        )
    told = price["training"]
    times, least, most, rollout = (
        told[f"over_resting_{key}"] for key in ("times", "times_min", "times_max", "rollout_times")
    )
    lines.append(
        f"a step whose idle slices train takes {times:.3f} ({least:.3f}-{most:.3f}) times as long "
        f"as one whose idle slices rest, its rollout {rollout:.3f} times; they train for "
        f"{100 * told['idle_used_share']:.0f} % of their idle time"
    )
    return "\n".join(lines)
