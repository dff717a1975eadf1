"""How fast strategies are in each row bucket, and what choosing among them gains.

A round costs the same however many rows of its bucket are live. So tokens are counted here as if
all rows had been live in all rounds, whatever the share of chunks in which rows had ended.
"""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tlt_jax.rollout import ChunkRecord


@dataclasses.dataclass(frozen=True)
class Pace:
    """What chunks came to."""

    tokens: float  # as if all rows had been live
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


Paces = Mapping[int, Pace]
"""By row bucket."""


def by_bucket(chunks: Sequence[ChunkRecord]) -> Paces:
    """Paces of a rollout's chunks by rows per slice."""
    alike: dict[tuple[int, str], list[ChunkRecord]] = collections.defaultdict(list)
    for record in chunks:
        alike[record.rows, record.strategy].append(record)
    found: dict[int, Pace] = {}
    for (rows, _), group in alike.items():
        live = sum(sum(record.row_rounds) for record in group)
        if live:
            committed = sum(sum(record.committed) for record in group)
            full = sum(rows * len(c.rounds_run) * max(c.rounds_run) for c in group)
            so_far = found.get(rows, Pace(0.0, 0.0))
            seconds = sum(record.seconds for record in group)
            found[rows] = Pace(so_far.tokens + full * committed / live, so_far.seconds + seconds)
    return found


def overall(paces: Paces) -> Pace:
    """The pace of all buckets together."""
    values = paces.values()
    return Pace(sum(pace.tokens for pace in values), sum(pace.seconds for pace in values))


def verdict(fixed: Mapping[str, Sequence[Paces]], bandit: Sequence[Paces]) -> dict[str, Any]:
    """The bandit beside strategies that were kept throughout, on the same sequences.

    Args:
      fixed: of each strategy its paces, one entry per repeat.
      bandit: the same of the bandit.

    Returns:
      For each bucket that all of them came to, the fastest strategy, its tokens per second, and
      the bandit's share of these; the strategy that is fastest over all buckets, and how many times
      as fast as it one would be that is fastest in each. Medians over the repeats.
    """
    came_to = [set(paces) for repeats in [*fixed.values(), bandit] for paces in repeats]
    buckets = sorted(set.intersection(*came_to), reverse=True)

    def rate(repeats: Sequence[Paces], rows: int) -> float:
        return statistics.median(paces[rows].rate for paces in repeats)

    rates = {name: {r: rate(repeats, r) for r in buckets} for name, repeats in fixed.items()}
    best = {rows: max(rates, key=lambda name: rates[name][rows]) for rows in buckets}
    seconds = {
        name: {r: statistics.median(paces[r].seconds for paces in repeats) for r in buckets}
        for name, repeats in fixed.items()
    }
    single = min(seconds, key=lambda name: sum(seconds[name].values()))
    perfect = sum(seconds[single][r] * rates[single][r] / rates[best[r]][r] for r in buckets)
    return {
        "buckets": [
            {
                "rows": rows,
                "best": best[rows],
                "tokens_per_second": rates[best[rows]][rows],
                "bandit_share": rate(bandit, rows) / rates[best[rows]][rows],
            }
            for rows in buckets
        ],
        "best_single": single,
        "perfect_choice": sum(seconds[single].values()) / perfect,
    }


def sentences(found: dict[str, Any]) -> str:
    """A verdict in words."""
    lines = [
        f"{bucket['rows']} rows per slice: {bucket['best']} is the fastest kept throughout, the "
        f"bandit has {100 * bucket['bandit_share']:.0f} % of its speed"
        for bucket in found["buckets"]
    ]
    gain = f"{found['perfect_choice']:.2f} times as fast as {found['best_single']} throughout"
    return "\n".join([*lines, f"the fastest in every bucket would be {gain}"])
