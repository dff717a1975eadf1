"""Which strategy the next chunk runs: the only one, by a log, by a threshold, or by the bandit.

What the bandit says depends on clocks. So the first process decides for all, and everything it
decides is in the log of decisions, from which it can be decided again.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from tlt_jax import bandit as bandit_lib
from tlt_jax.controller import Controller
from tlt_jax.programs import RolloutPrograms
from tlt_jax.types import Strategy, UserError


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a chunk."""

    strategy: Strategy
    why: str  # "only", "best", "explored", "threshold" or "replayed"
    give_up_below: float = 0.0  # accept length, see `speculation.run_rounds`


def choose(
    programs: RolloutPrograms,
    controller: Controller,
    *,
    rows: int,
    live: int,
    replay: Sequence[Choice] | None,
    chunk: int,
) -> tuple[Controller, Choice]:
    """Chooses for one chunk.

    Args:
      programs: with the strategies of each row bucket.
      controller: with the bandit's state.
      rows: the bucket, rows per slice.
      live: live rows of the slice that has most.
      replay: what to choose in each chunk of this rollout, None to choose anew.
      chunk: number of the chunk in its rollout.

    Raises:
      UserError: the rollout to replay was another one.
    """
    arms, settings = programs.arms(rows), programs.rollout
    if len(arms) == 1:
        return controller, Choice(arms[0], "only")
    if replay is not None:
        return controller, _replayed(arms, replay, chunk)
    if settings.threshold:
        chosen = next(arm for arm in arms if arm.is_plain == (live > settings.threshold))
        return controller, Choice(chosen, "threshold")
    model = programs.cost_model
    bandit, strategy, why = bandit_lib.select(
        controller.bandit,
        rows,
        arms,
        model=model,
        epsilon=settings.epsilon,
        broken=controller.broken,
    )
    give_up = bandit_lib.give_up_below(bandit, rows, strategy, arms, model)
    controller = dataclasses.replace(controller, bandit=bandit)
    index, give_up = _agreed(arms.index(strategy), give_up)
    return controller, Choice(arms[index], why, give_up)


def _replayed(arms: Sequence[Strategy], log: Sequence[Choice], chunk: int) -> Choice:
    if chunk >= len(log):
        raise UserError(
            f"the log to replay has {len(log)} chunks for this rollout, which needs more; replay "
            "the run that wrote it, from the same weights."
        )
    if log[chunk].strategy not in arms:
        raise UserError(
            f"chunk {chunk} to replay ran {log[chunk].strategy}, but config.rollout.strategies has "
            f"only '{' '.join(map(str, arms))}' for its bucket; replay with the config of that run."
        )
    return dataclasses.replace(log[chunk], why="replayed")


def _agreed(index: int, give_up_below: float) -> tuple[int, float]:
    """What the first process says: rewards come from clocks, and those of processes differ."""
    if jax.process_count() == 1:
        return index, give_up_below
    told = multihost_utils.broadcast_one_to_all(np.array([index, give_up_below], np.float32))
    return int(told[0]), float(told[1])
