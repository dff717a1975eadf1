"""What drafter training on idle slices costs an RL step: steps with it and without, in turns.

Both sides begin from the same weights and take the same steps: the same prompts, keys and policy
updates, hence the same tokens. The drafter's learning rate is 0, so that training cannot pay for
itself by better drafts; what remains is its price.
"""

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from tlt_jax import metrics, setup
from tlt_jax.budget import Budget
from tlt_jax.config import RunConfig
from tlt_jax.rl_step import Machinery, RunState, rl_step
from tlt_jax.rollout import ChunkRecord

STEPS = 6  # of a repeat, one after another


@dataclasses.dataclass
class Side:
    """Steps with or without drafter training, and what they took."""

    machinery: Machinery
    first: RunState  # kept; steps run on copies of it
    microbatch_seconds: float
    seconds: list[float] = dataclasses.field(default_factory=list)  # one per repeat, all steps
    rollout_seconds: list[float] = dataclasses.field(default_factory=list)
    chunks: list[ChunkRecord] = dataclasses.field(default_factory=list)


def measure(config: RunConfig, policy_params: Any, drafter_params: Any) -> dict[str, Any]:
    """Times `STEPS` steps of each side, `config.benchmark.repeats` times after an untimed pass.

    Returns:
      Seconds with and without training of each repeat, median, least and largest ratio of the
      step and median ratio of the rollout, and the share of idle time spent on training.
    """
    sides = [
        make_side(config, policy_params, drafter_params, train=train) for train in (False, True)
    ]
    for repeat in range(config.benchmark.repeats + 1):
        take_turns(sides, first=repeat % 2)
    for side in sides:  # the first pass had programs to load
        side.seconds, side.rollout_seconds = side.seconds[1:], side.rollout_seconds[1:]
        side.machinery.close()
    without, training = sides
    ratios = _ratios(training.seconds, without.seconds)
    idle = metrics.idle_seconds(training.chunks)
    used = metrics.idle_training_seconds(training.chunks, training.microbatch_seconds)
    return {
        "steps": STEPS,
        "seconds": without.seconds,
        "seconds_training": training.seconds,
        "ratio": float(np.median(ratios)),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "rollout_ratio": float(
            np.median(_ratios(training.rollout_seconds, without.rollout_seconds))
        ),
        "idle_used_share": used / idle if idle > 0 else 0.0,
    }


def make_side(config: RunConfig, policy_params: Any, drafter_params: Any, *, train: bool) -> Side:
    """Compiled machinery and first state of one side."""
    drafter_config = dataclasses.replace(config.drafter, train=train, learning_rate=0.0)
    rollout_config = dataclasses.replace(config.rollout, speculate=True)
    machinery = setup.make_machinery(
        dataclasses.replace(config, drafter=drafter_config, rollout=rollout_config)
    )
    state = setup.first_state(machinery, policy_params, drafter_params)
    setup.order_programs(machinery, state)
    return Side(machinery, *setup.time_microbatch(machinery, state))


def take_turns(sides: list[Side], *, first: int) -> list[RunState]:
    """`STEPS` steps of both sides, step by step; keeps their seconds, returns their last states.

    What they have taught about times is known when a side begins again.
    """
    states = [_copy(side.first) for side in sides]
    totals, rollouts = [0.0, 0.0], [0.0, 0.0]
    for _ in range(STEPS):
        for place in (first, 1 - first):
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


def _ratios(seconds: list[float], others: list[float]) -> list[float]:
    return [a / b for a, b in zip(seconds, others, strict=True)]


def sentence(price: dict[str, Any]) -> str:
    """The measurement in words."""
    return (
        f"a step whose idle slices train takes {price['ratio']:.3f} "
        f"({price['ratio_min']:.3f}-{price['ratio_max']:.3f}) times as long as one whose idle "
        f"slices rest, its rollout {price['rollout_ratio']:.3f} times; they train for "
        f"{100 * price['idle_used_share']:.0f} % of their idle time"
    )
