"""What the rollout engine learns from one chunk and uses in the next: host side, plain numbers.

A checkpoint holds it. All but the bandit's rewards, the budget's times and the credit that they buy
follows from what the device reports and never from a clock, so all processes keep the same state.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from tlt_jax.bandit import UNTRIED, Bandit
from tlt_jax.budget import UNTIMED, Budget
from tlt_jax.dealing import NO_HISTORY, LengthHistory
from tlt_jax.types import UserError

RATE = 2.0
"""Change of log sharpness per unit of acceptance that was over- or underestimated."""
TRUSTED_DRAFTS = 32
"""With so many drafts in a chunk its evidence counts half, with many more nearly in full."""
LOG_RANGE = math.log(16.0)
"""Sharpness stays within a factor of 16 of one."""


@dataclasses.dataclass(frozen=True)
class Controller:
    """State between chunks and steps.

    `idle_credit` are microbatches saved up for training between steps, with one slice.
    `log_sharpness` says for each draft depth by what factor (its logarithm) noisy logits are
    multiplied in the estimated acceptance (`trees`); depths beyond its end have 0. `bandit` chooses
    strategies. `broken` are the drafters whose drafts were hardly accepted when they drafted last.
    `history` are response lengths, by which prompts are dealt to slices. `budget` are the times
    that price microbatches, where no constants do.
    """

    idle_credit: float = 0.0
    log_sharpness: tuple[float, ...] = ()
    bandit: Bandit = UNTRIED
    broken: tuple[str, ...] = ()
    history: LengthHistory = NO_HISTORY
    budget: Budget = UNTIMED

    def sharpness(self, depths: int) -> list[float]:
        """The factor at draft depth 1 .. `depths`."""
        known = self.log_sharpness[:depths]
        return [math.exp(value) for value in (*known, *[0.0] * (depths - len(known)))]

    def to_record(self) -> dict[str, Any]:
        """The state as JSON."""
        return {
            "idle_credit": self.idle_credit,
            "log_sharpness": list(self.log_sharpness),
            "bandit": self.bandit.to_record(),
            "broken": list(self.broken),
            "history": self.history.to_record(),
            "budget": self.budget.to_record(),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Controller":
        """Undoes `to_record`.

        Raises:
          UserError: the record is of a version that knew less.
        """
        if missing := {"budget", "history", "broken", "bandit"} - record.keys():
            raise UserError(
                f"the checkpoint is of an older version, without '{min(missing)}'; begin anew in "
                "another --workdir."
            )
        return cls(
            record["idle_credit"],
            tuple(record["log_sharpness"]),
            Bandit.from_record(record["bandit"]),
            tuple(record["broken"]),
            LengthHistory.from_record(record["history"]),
            Budget.from_record(record["budget"]),
        )


FRESH = Controller()
"""The state of a new run."""


def calibrate(
    controller: Controller,
    drafted: int,
    accepted: Sequence[int],
    expected: Sequence[float],
) -> Controller:
    """Moves each depth's sharpness towards estimates that equal the measured acceptance.

    Sharper estimates are more confident ones. A depth is judged by the drafts whose parent was
    accepted, as only there the target's own token is known.

    Args:
      controller: the state before.
      drafted: trees drafted in a chunk.
      accepted: of these the ones accepted to depth 1, 2, ...
      expected: sum of the estimated probabilities of the same, given the depth before.
    """
    reached = [drafted, *accepted]
    logs = list(controller.log_sharpness)
    logs += [0.0] * (len(accepted) - len(logs))
    for index, (hits, estimate) in enumerate(zip(accepted, expected, strict=True)):
        trials = reached[index]
        if trials == 0:
            continue
        trust = trials / (trials + TRUSTED_DRAFTS)
        moved = logs[index] + RATE * trust * (hits - estimate) / trials
        logs[index] = min(max(moved, -LOG_RANGE), LOG_RANGE)
    return dataclasses.replace(controller, log_sharpness=tuple(logs))


def note_broken(controller: Controller, drafter: str, *, broken: bool) -> tuple[Controller, str]:
    """Keeps in mind whether a drafter is of use; returns a sentence if that changed."""
    known = drafter in controller.broken
    if broken == known:
        return controller, ""
    if broken:
        names = (*controller.broken, drafter)
        told = f"{drafter} drafter: hardly a draft is accepted; its strategies are left alone"
    else:
        names = tuple(name for name in controller.broken if name != drafter)
        told = f"{drafter} drafter: drafts are accepted again"
    return dataclasses.replace(controller, broken=names), told
