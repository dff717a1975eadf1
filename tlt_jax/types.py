"""Words shared by every layer: error type, strategies, roles and sampling parameters."""

import dataclasses
import enum

import jax
from flax import struct

INVALID = -1
"""Marks an empty sequence id, segment id or slot everywhere in the library."""


class UserError(ValueError):
    """Bad input, told in one sentence: what was wrong, where, and what would be right."""


class Role(enum.IntEnum):
    """What a slice does in a chunk."""

    ROLLOUT = 0
    TRAIN = 1


@dataclasses.dataclass(frozen=True, order=True)
class Strategy:
    """How a chunk decodes: `depth` drafted tokens a round, or plain decoding when `depth` is 0."""

    depth: int = 0

    def __post_init__(self):
        if self.depth < 0:
            raise UserError(f"strategy depth is {self.depth}; it must be 0 (plain) or more.")

    @property
    def is_plain(self) -> bool:
        return self.depth == 0

    @property
    def verify_tokens(self) -> int:
        """Query tokens of one verifying pass: the pending token and the drafts."""
        return self.depth + 1

    def __str__(self) -> str:
        return "plain" if self.is_plain else f"chain-{self.depth}"


@struct.dataclass
class SamplingParams:
    """Sampling parameters as data: changing a value compiles nothing.

    Only `filtered` is static: it says whether top-k / top-p filtering is part of the program at
    all (a sort over the vocabulary, left out of the program when nobody asks for it).
    """

    temperature: jax.Array  # [] float32, 0 is greedy
    top_k: jax.Array  # [] int32, 0 keeps every token
    top_p: jax.Array  # [] float32, 1 keeps every token
    filtered: bool = struct.field(pytree_node=False, default=False)
