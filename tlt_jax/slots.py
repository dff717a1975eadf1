"""The prompts of a rollout, and the arrays with which they go into the slots of the slices.

A slot is a row of the rollout's arrays. There may be more sequences than slots.
"""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from tlt_jax.config import RolloutConfig
from tlt_jax.types import INVALID, UserError


@dataclasses.dataclass(frozen=True)
class Asked:
    """Prompts by sequence."""

    prompts: Sequence[np.ndarray]  # [length] int32 each
    ids: list[int]  # equal for equal prompts, the same in every epoch
    max_prompt_length: int
    max_response_length: int

    def arrays(self, hands: Sequence[Sequence[int]], *, rows: int) -> tuple[np.ndarray, ...]:
        """Arguments of the programs that begin sequences, for `rows` rows of each slice.

        Args:
          hands: sequences of each slice, at most `rows`.
          rows: per slice; those that are left over get the sequence id `INVALID`.

        Returns:
          Tokens [slices * rows, max_prompt_length], lengths, limits, sequence ids and prompt ids
          [slices * rows], all int32.
        """
        count = len(hands) * rows
        tokens = np.zeros((count, self.max_prompt_length), np.int32)
        lengths = np.ones(count, np.int32)
        ids, of_prompts = np.full((2, count), INVALID, np.int32)
        for slice_, hand in enumerate(hands):
            for row, sequence in enumerate(hand, start=slice_ * rows):
                prompt = self.prompts[sequence]
                tokens[row, : len(prompt)] = prompt
                lengths[row] = len(prompt)
                ids[row], of_prompts[row] = sequence, self.ids[sequence]
        return tokens, lengths, lengths + self.max_response_length, ids, of_prompts


def ask(prompts: Sequence[np.ndarray], config: RolloutConfig) -> Asked:
    """Checks prompts and numbers them.

    Raises:
      UserError: a prompt is empty or too long.
    """
    for sequence, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= config.max_prompt_length:
            raise UserError(
                f"prompt {sequence} has {len(prompt)} tokens, but the cache is laid out for 1 to "
                f"{config.max_prompt_length}; raise config.rollout.max_prompt_length."
            )
    ids = [_prompt_id(prompt) for prompt in prompts]
    return Asked(prompts, ids, config.max_prompt_length, config.max_response_length)


def _prompt_id(prompt: np.ndarray) -> int:
    """A checksum of the prompt's tokens, so that a prompt is known again in the next epoch."""
    return zlib.crc32(np.asarray(prompt, np.int32).tobytes()) >> 1
