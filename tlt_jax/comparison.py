"""Compares the tokens of two rollouts that should be equal, and explains differences.

Tokens are a function of target, prompt and key; floating point is the one caveat, because other
row counts may round differently. A difference is explained if, at the first position where two
sequences part, the two best noisy logits are nearer to each other than a stated bound and are
those of the two tokens taken. What follows a parting is another, equally right, sequence.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import policy, sampling
from tlt_jax.config import PolicyConfig
from tlt_jax.rollout import Response
from tlt_jax.speculation import Sampler


@dataclasses.dataclass(frozen=True)
class Parting:
    """Where two responses to one prompt part."""

    sequence: int
    position: int  # of the first token that differs
    gap: float  # between the two best noisy logits there
    explained: bool


@functools.partial(jax.jit, static_argnames="config")
def _noisy_logits(
    params: Any, config: PolicyConfig, sampler: Sampler, tokens: jax.Array, sequence: jax.Array
) -> jax.Array:
    """Processed logits plus scaled noise for the token after each prefix: [W, V] from [W]."""
    count = tokens.shape[0]
    positions = jnp.arange(count, dtype=jnp.int32)
    hidden, _ = policy.packed_forward(
        params, config, tokens[None], positions[None], jnp.zeros((1, count), jnp.int32)
    )
    processed = sampling.process_logits(policy.logits(params, hidden[0]), sampler.params)
    noise = sampling.position_noise(
        sampler.key,
        sequence[None],
        jnp.ones((1,), jnp.int32),
        count=count,
        vocab_size=config.vocab_size,
    )
    return processed + sampler.params.temperature * noise[0]


def partings(
    params: Any,
    config: PolicyConfig,
    sampler: Sampler,
    expected: Sequence[Response],
    seen: Sequence[Response],
    *,
    near_tie: float,
    row_length: int,
) -> list[Parting]:
    """Every pair of responses that differ, with the reason looked up.

    Args:
      params: policy parameters both rollouts used.
      config: their shape.
      sampler: what both rollouts sampled with.
      expected: responses of one rollout, by sequence.
      seen: responses of the other.
      near_tie: largest gap of noisy logits that counts as an explanation.
      row_length: at least the longest sequence; prefixes are padded to it.
    """
    found = []
    for one, other in zip(expected, seen, strict=True):
        if np.array_equal(one.tokens, other.tokens):
            continue
        shared = min(len(one.tokens), len(other.tokens))
        differs = np.flatnonzero(one.tokens[:shared] != other.tokens[:shared])
        if not len(differs):  # equal as far as both go: one stopped and the other did not
            found.append(Parting(one.sequence, shared, float("inf"), explained=False))
            continue
        position = int(differs[0])
        padded = np.zeros(row_length, np.int32)
        padded[:position] = one.tokens[:position]
        noisy = np.asarray(
            _noisy_logits(params, config, sampler, padded, np.int32(one.sequence))[position - 1]
        )
        best, second = np.argsort(-noisy)[:2]
        gap = float(noisy[best] - noisy[second])
        taken = {int(one.tokens[position]), int(other.tokens[position])}
        explained = gap <= near_tie and taken == {int(best), int(second)}
        found.append(Parting(one.sequence, position, gap, explained))
    return found
