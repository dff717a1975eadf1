"""Picks the strategy of a chunk by evidence: a bucketed epsilon-greedy bandit (TLT, section 5.2).

Each row bucket has its own arms, and of every arm the last rewards: tokens per second, that is
accept length times rows by seconds of a round. The bandit mostly takes the arm with the best median
and now and then the one that was not tried for longest. An arm that was never tried in a bucket is
rated by what it gave, beside the others, in the nearest bucket; one that was tried nowhere by a
cost model, which also says in which order to try what is new, so that a cold start is not random.

The state is frozen and on the host. Rewards come from a clock: where several processes run, one of
them decides (`choice`). Nothing here draws random numbers: exploration follows from a counter.
"""

import dataclasses
import math
import statistics
from collections.abc import Collection, Sequence
from typing import Any

from tlt_jax.types import Strategy

WINDOW = 8
"""Rewards kept of each arm."""
MEMORY = 64
"""A reward of so many choices ago counts only where the arm has no newer one."""
GUESSED_ACCEPTANCE = 0.8
"""Chance that a draft of the trained drafter is accepted, before anything is known."""
GUESSED_NGRAM_ACCEPTANCE = 0.4
"""The same of the n-gram drafter."""
PROMISING = 0.5
"""What is new is tried at once if the cost model rates it at least so well beside the best."""
GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly whatever their number."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is known of a strategy in a row bucket."""

    rows: int  # the bucket, rows per slice
    strategy: str
    rewards: tuple[float, ...]  # tokens per second, the newest last
    choices: tuple[int, ...]  # how many choices had been made when each reward came
    accept_length: float  # when the newest reward came

    @property
    def tried(self) -> int:
        """When it was tried last; -1 for never."""
        return self.choices[-1] if self.choices else -1

    def median(self, now: int) -> float | None:
        """Of what it gave lately, after `now` choices; None if it was never tried."""
        recent = [
            reward
            for reward, choice in zip(self.rewards, self.choices, strict=True)
            if choice == self.tried or choice > now - MEMORY
        ]
        return statistics.median(recent) if recent else None


@dataclasses.dataclass(frozen=True)
class Bandit:
    """All arms that were tried, and how many choices were made."""

    arms: tuple[Arm, ...] = ()
    choices: int = 0

    def known(self, rows: int, strategy: Strategy) -> Arm:
        """The arm, without rewards if it was never tried."""
        for arm in self.arms:
            if (arm.rows, arm.strategy) == (rows, str(strategy)):
                return arm
        return Arm(rows, str(strategy), (), (), 0.0)

    def to_record(self) -> dict[str, Any]:
        """The state as JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Bandit":
        """Undoes `to_record`."""
        arms = [
            Arm(**(arm | {name: tuple(arm[name]) for name in ("rewards", "choices")}))
            for arm in record["arms"]
        ]
        return cls(tuple(arms), record["choices"])


UNTRIED = Bandit()
"""Nothing was tried yet."""


@dataclasses.dataclass(frozen=True)
class CostModel:
    """What a round costs before any was timed, in passes of the target over a single token.

    A pass over n tokens costs `1 + n / free_tokens`: on accelerators nothing is paid for hundreds
    of tokens, on CPU cores for a handful. The trained drafter is one layer of `layers`.
    """

    layers: int
    free_tokens: float

    def accept_length(self, strategy: Strategy) -> float:
        """Tokens a round commits in each row."""
        chance = GUESSED_NGRAM_ACCEPTANCE if strategy.ngram else GUESSED_ACCEPTANCE
        miss = (1 - chance) ** strategy.top_k  # of a level of the tree
        return sum((1 - miss) ** depth for depth in range(strategy.most_committed))

    def rate(self, rows: int, strategy: Strategy) -> float:
        """Tokens per unit of cost of a bucket of `rows` rows."""
        passes = 1 + rows * strategy.verify_tokens / self.free_tokens
        if strategy.uses_drafter:
            nodes = rows * (strategy.most_committed + strategy.top_k * (strategy.depth - 1))
            passes += (strategy.depth + nodes / self.free_tokens) / self.layers
        return rows * self.accept_length(strategy) / passes


def select(
    bandit: Bandit,
    rows: int,
    strategies: Sequence[Strategy],
    *,
    model: CostModel,
    epsilon: float,
    broken: Collection[str] = (),
) -> tuple[Bandit, Strategy, str]:
    """Chooses a strategy for the bucket of `rows` rows.

    Args:
      bandit: the state before.
      rows: rows per slice.
      strategies: what there is to choose from, one or more.
      model: rates what was never tried.
      epsilon: share of choices that explore.
      broken: drafters that are of no use now, see `Strategy.drafter`: whoever explores tries them,
        and nobody else as long as there is another strategy.

    Returns:
      The state after, the strategy, and why: "best" or "explored".
    """
    after = dataclasses.replace(bandit, choices=bandit.choices + 1)
    explores = (bandit.choices * GOLDEN) % 1.0 >= 1 - epsilon
    if explores:
        longest_ago = min(strategies, key=lambda strategy: bandit.known(rows, strategy).tried)
        return after, longest_ago, "explored"
    trusted = [strategy for strategy in strategies if strategy.drafter not in broken] or strategies
    promising = _promising(bandit, rows, trusted, model) if epsilon > 0 else []
    if promising:
        return after, promising[0], "explored"
    rated = ratings(bandit, rows, strategies, model)
    return after, max(trusted, key=lambda strategy: rated[strategy]), "best"


def _promising(
    bandit: Bandit, rows: int, strategies: Sequence[Strategy], model: CostModel
) -> list[Strategy]:
    """What was tried in no bucket and may be good, the best first."""
    rates = {strategy: model.rate(rows, strategy) for strategy in strategies}
    tried = {arm.strategy for arm in bandit.arms if arm.choices}
    new = [strategy for strategy in strategies if str(strategy) not in tried]
    good = [strategy for strategy in new if rates[strategy] >= PROMISING * max(rates.values())]
    return sorted(good, key=lambda strategy: -rates[strategy])


def ratings(
    bandit: Bandit, rows: int, strategies: Sequence[Strategy], model: CostModel
) -> dict[Strategy, float]:
    """Median rewards in tokens per second; of what was never tried in the bucket, an estimate.

    What the tried ones gave there is scaled by what strategies gave beside one another in the
    nearest bucket that knows them, or else by the model's rates; where none was tried at all, the
    rates are all there is.
    """
    rates = {strategy: model.rate(rows, strategy) for strategy in strategies}
    medians = _medians(bandit, rows, strategies)
    others = sorted(
        {arm.rows for arm in bandit.arms} - {rows}, key=lambda other: abs(math.log(other / rows))
    )
    elsewhere = [_medians(bandit, other, strategies) for other in others]

    def estimate(strategy: Strategy) -> float:
        for known in elsewhere:
            shared = [medians[arm] / known[arm] for arm in medians.keys() & known.keys()]
            if strategy in known and shared:
                return known[strategy] * statistics.median(shared)
        scales = [median / rates[arm] for arm, median in medians.items()]
        return rates[strategy] * (statistics.median(scales) if scales else 1.0)

    return {strategy: estimate(strategy) for strategy in strategies} | medians


def _medians(bandit: Bandit, rows: int, strategies: Sequence[Strategy]) -> dict[Strategy, float]:
    """Median rewards of what was tried in a bucket."""
    return {
        strategy: median
        for strategy in strategies
        if (median := bandit.known(rows, strategy).median(bandit.choices)) is not None
    }


def give_up_below(
    bandit: Bandit,
    rows: int,
    strategy: Strategy,
    strategies: Sequence[Strategy],
    model: CostModel,
) -> float:
    """Accept length under which a chunk of the strategy should end early: its drafter is broken.

    It lies half-way between 1, nothing accepted, and the accept length at which the best other
    strategy would be as fast; but below what is usual, so that a slower one can be explored. It is
    0 where nothing is drafted or there is no other strategy.
    """
    if strategy.is_plain or len(strategies) == 1:
        return 0.0
    rated = ratings(bandit, rows, strategies, model)
    best_other = max(rating for other, rating in rated.items() if other != strategy)
    guess, arm = model.accept_length(strategy), bandit.known(rows, strategy)
    even = best_other * (arm.accept_length if arm.rewards else guess) / rated[strategy]
    return (1 + min(even, max(arm.accept_length, guess))) / 2


def update(
    bandit: Bandit,
    rows: int,
    strategy: Strategy,
    reward: float,
    *,
    accept_length: float,
    gave_up: bool = False,
) -> Bandit:
    """Adds what a chunk of the strategy has shown.

    Args:
      bandit: the state before.
      rows: the bucket.
      strategy: what ran.
      reward: tokens per second.
      accept_length: tokens a round committed in a row.
      gave_up: the chunk ended early (`give_up_below`): what the arm gave before is forgotten.
    """
    arm = bandit.known(rows, strategy)
    kept = dataclasses.replace(arm, rewards=(), choices=()) if gave_up else arm
    newer = dataclasses.replace(
        kept,
        rewards=(*kept.rewards, reward)[-WINDOW:],
        choices=(*kept.choices, bandit.choices)[-WINDOW:],
        accept_length=accept_length,
    )
    others = tuple(other for other in bandit.arms if other != arm)
    return dataclasses.replace(bandit, arms=(*others, newer))
