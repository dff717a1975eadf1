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
    """How a chunk decodes: what is drafted in a round, and how many tokens are verified.

    A draft tree is `depth` tokens deep. At each level the `top_k` most promising nodes get `top_k`
    children each, and of all nodes the most promising are verified: with the pending token,
    `verify_tokens` of them. A chain is the tree of `top_k` 1, which is verified whole, and plain
    decoding the chain of depth 0. `verify_tokens` 0 stands for all nodes.

    `ngram` says that guesses come from texts (`ngram`) and not from the trained drafter.

    Written `plain`, `chain-DEPTH`, `tree-DEPTH-TOPK-VERIFY`, and with the n-gram drafter
    `ngram-DEPTH` or `ngram-DEPTH-TOPK-VERIFY`.
    """

    depth: int = 0
    top_k: int = 1
    verify_tokens: int = 0
    ngram: bool = False

    def __post_init__(self):
        if self.depth < 0 or self.top_k < 1:
            raise UserError(
                f"strategy depth is {self.depth} and top-k {self.top_k}; depth must be 0 (plain) "
                "or more, top-k 1 (a chain) or more."
            )
        if self.is_plain and (self.top_k > 1 or self.ngram):
            raise UserError(
                f"strategy depth is 0 (plain), so nothing is drafted, but top-k is {self.top_k}"
                f"{' and the n-gram drafter asked for' if self.ngram else ''}."
            )
        if self.verify_tokens == 0:
            object.__setattr__(self, "verify_tokens", 1 + self.candidates)
        if not self.depth < self.verify_tokens <= 1 + self.candidates:
            raise UserError(
                f"strategy verifies {self.verify_tokens} tokens; with depth {self.depth} and top-k "
                f"{self.top_k} it can be {self.depth + 1} to {1 + self.candidates}."
            )

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """The strategy of its written form.

        Raises:
          UserError: no such form, or numbers that do not fit together.
        """
        kind, *numbers = text.split("-")
        counts = {"plain": (0,), "chain": (1,), "tree": (3,), "ngram": (1, 3)}.get(kind, ())
        if len(numbers) not in counts or not all(number.isdecimal() for number in numbers):
            raise UserError(
                f"there is no strategy '{text}'; write 'plain', 'chain-4' (depth 4), "
                "'tree-6-4-16' (depth 6, top-k 4, 16 tokens verified), or 'ngram-4' or "
                "'ngram-6-4-16' (the same with the n-gram drafter)."
            )
        depth, top_k, verify_tokens = [*map(int, numbers), *(0, 1, 0)[len(numbers) :]]
        return cls(depth, top_k, verify_tokens, ngram=kind == "ngram")

    @property
    def is_plain(self) -> bool:
        return self.depth == 0

    @property
    def uses_drafter(self) -> bool:
        """Whether the trained drafter drafts."""
        return not (self.is_plain or self.ngram)

    @property
    def drafter(self) -> str:
        """Who drafts: "trained", "n-gram", or "" for nobody."""
        return "" if self.is_plain else "n-gram" if self.ngram else "trained"

    @property
    def is_chain(self) -> bool:
        """Whether each node has one child, so that all drafts lie on one path."""
        return self.top_k == 1

    @property
    def candidates(self) -> int:
        """Nodes of the whole tree: children of the pending token, then of `top_k` nodes a level."""
        return self.top_k + (self.depth - 1) * self.top_k**2 if self.depth else 0

    @property
    def most_committed(self) -> int:
        """Tokens that a round can add to a sequence: a path of drafts and the target's own."""
        return self.depth + 1

    @property
    def written_slots(self) -> int:
        """Cache positions from the pending token on that a round writes, drafter's included."""
        return max(self.verify_tokens, 1 + self.top_k * (self.depth - 1))

    def __str__(self) -> str:
        if self.is_plain:
            return "plain"
        if self.is_chain:
            return f"{'ngram' if self.ngram else 'chain'}-{self.depth}"
        kind = "ngram" if self.ngram else "tree"
        return f"{kind}-{self.depth}-{self.top_k}-{self.verify_tokens}"


@struct.dataclass
class SamplingParams:
    """Sampling parameters as data: changing a value compiles nothing.

    Two fields are static, because they change what is computed: `filtered` says whether top-k /
    top-p filtering is part of the program at all (a sort over the vocabulary), `rejection` whether
    drafts are verified by rejection sampling instead of against the coupled sample.
    """

    temperature: jax.Array  # [] float32, 0 is greedy
    top_k: jax.Array  # [] int32, 0 keeps every token
    top_p: jax.Array  # [] float32, 1 keeps every token
    filtered: bool = struct.field(pytree_node=False, default=False)
    rejection: bool = struct.field(pytree_node=False, default=False)
