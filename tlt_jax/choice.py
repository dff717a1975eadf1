"""Which strategy the next chunk runs, and how much an idle slice trains in it.

The strategy is the only one, or that of a log, of a threshold, or of the bandit; how much there is
to train follows from constants, a log, or the budget. What the bandit and the budget say depends on
clocks. So the first process decides for all, and everything it decides is in the log of decisions,
from which it can be decided again.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from tlt_jax import bandit as bandit_lib
from tlt_jax import budget as budget_lib
from tlt_jax.budget import NO_BLOCK, Block
from tlt_jax.chunk import ChunkKind
from tlt_jax.controller import Controller
from tlt_jax.programs import RolloutPrograms
from tlt_jax.types import Strategy, UserError


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen for a chunk."""

    strategy: Strategy
    why: str  # of the strategy: "only", "best", "explored", "threshold" or "replayed"
    give_up_below: float = 0.0  # accept length, see `speculation.run_rounds`
    block: Block = NO_BLOCK  # what an idle slice trains

    @property
    def kind(self) -> ChunkKind:
        """The program that does it."""
        return ChunkKind(self.strategy, training=self.block != NO_BLOCK)


def choose(
    programs: RolloutPrograms,
    controller: Controller,
    *,
    rows: int,
    live: int,
    trains: bool,
    replay: Sequence[Choice] | None,
    chunk: int,
) -> tuple[Controller, Choice]:
    """Chooses for one chunk.

    Args:
      programs: with the strategies of each row bucket.
      controller: with the state of bandit and budget.
      rows: the bucket, rows per slice.
      live: live rows of the slice that has most.
      trains: whether slices that are idle, or fall idle, train.
      replay: what to choose in each chunk of this rollout, None to choose anew.
      chunk: number of the chunk in its rollout.

    Raises:
      UserError: the rollout to replay was another one.
    """
    arms = programs.arms(rows)
    if replay is not None:
        choice = _replayed(arms, replay, chunk)
        return controller, choice if trains else dataclasses.replace(choice, block=NO_BLOCK)
    controller, choice = _choose_strategy(programs, controller, rows=rows, live=live)
    if trains:
        block = _choose_block(programs, controller, rows, choice.strategy)
        choice = dataclasses.replace(choice, block=block)
    clocked = choice.why in ("best", "explored") or (trains and programs.price(rows) is None)
    return controller, _agreed(choice, arms) if clocked else choice


def _choose_strategy(
    programs: RolloutPrograms, controller: Controller, *, rows: int, live: int
) -> tuple[Controller, Choice]:
    arms, settings = programs.arms(rows), programs.rollout
    if len(arms) == 1:
        return controller, Choice(arms[0], "only")
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
    return dataclasses.replace(controller, bandit=bandit), Choice(strategy, why, give_up)


def _choose_block(
    programs: RolloutPrograms, controller: Controller, rows: int, strategy: Strategy
) -> Block:
    constant = programs.price(rows)
    if constant is not None:
        return Block(constant, 1)
    return budget_lib.block(controller.budget, rows, strategy, programs.rollout.rounds(strategy))


def choose_between_steps(
    programs: RolloutPrograms,
    controller: Controller,
    rounds: Sequence[tuple[int, str, int]],
    *,
    replay: Sequence[Choice] | None,
) -> tuple[Controller, Choice]:
    """What one slice, which is never idle, trains after a rollout.

    It gets a share of the rounds, `between_steps_budget`, in whole microbatches; what does not buy
    one is saved up. Rounds earn nothing before their price is known.

    Args:
      programs: with the share and the prices.
      controller: with the budget's state and what was saved up.
      rounds: of each chunk of the rollout its bucket, its strategy and the rounds it ran.
      replay: what to choose after those chunks, None to choose anew.
    """
    earned = 0.0
    for rows, strategy, count in rounds:
        price = programs.price(rows) or budget_lib.price(controller.budget, rows, strategy)
        earned += count / price if price else 0.0
    credit = controller.idle_credit + programs.drafter.between_steps_budget * earned
    rows, _, _ = rounds[-1]
    microbatches = math.floor(credit)
    choice = Choice(programs.arms(rows)[0], "only", block=Block(1, microbatches))
    if replay is not None:
        logged = replay[len(rounds)].block if len(replay) > len(rounds) else NO_BLOCK
        choice = dataclasses.replace(choice, why="replayed", block=logged)
    elif programs.price(rows) is None:
        choice = _agreed(choice, programs.arms(rows))
    left = credit - choice.block.microbatches
    return dataclasses.replace(controller, idle_credit=left), choice


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


def _agreed(choice: Choice, arms: Sequence[Strategy]) -> Choice:
    """What the first process says: times come from clocks, and those of processes differ."""
    if jax.process_count() == 1:
        return choice
    block = choice.block
    said = [
        arms.index(choice.strategy),
        choice.give_up_below,
        block.rounds,
        block.microbatches,
    ]
    told = multihost_utils.broadcast_one_to_all(np.array(said, np.float32))
    return dataclasses.replace(
        choice,
        strategy=arms[int(told[0])],
        give_up_below=float(told[1]),
        block=Block(int(told[2]), int(told[3])),
    )
