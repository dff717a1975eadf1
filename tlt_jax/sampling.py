"""Sampling as a pure function of logits, key, sequence and position.

The token at (sequence, position) is `argmax(processed logits + temperature * Gumbel noise)`, with
noise drawn from (step key, sequence id, position) alone. The drafter uses the same noise for its
guesses, so a good drafter guesses the *sample* and not the mode (coupled sampling, Daliri et al.,
arXiv 2408.07978). `argmax(l / T + g) == argmax(l + T g)`, and the second form also covers T = 0.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlt_jax.config import RolloutConfig
from tlt_jax.types import SamplingParams

MASKED = -1e30


def make_params(
    temperature: float, top_k: int, top_p: float, *, filtered: bool, rejection: bool = False
) -> SamplingParams:
    """Sampling parameters as device data; `filtered` says whether top-k / top-p apply at all."""
    return SamplingParams(
        temperature=jnp.float32(temperature),
        top_k=jnp.int32(top_k),
        top_p=jnp.float32(top_p),
        filtered=filtered,
        rejection=rejection,
    )


def params_of(config: RolloutConfig) -> SamplingParams:
    """The sampling parameters of a rollout."""
    return make_params(
        config.temperature,
        config.top_k,
        config.top_p,
        filtered=config.filtered,
        rejection=config.rejection,
    )


def position_noise(
    key: jax.Array, sequence_ids: jax.Array, starts: jax.Array, *, count: int, vocab_size: int
) -> jax.Array:
    """Standard Gumbel noise of `count` consecutive positions per sequence.

    Args:
      key: the step's key.
      sequence_ids: [B] int32, the sequence's index in the step's batch.
      starts: [B] int32, first position per sequence.
      count: positions per sequence.
      vocab_size: V.

    Returns:
      [B, count, V] float32; the value at (b, i) depends on the key, `sequence_ids[b]` and
      `starts[b] + i` only.
    """

    return _by_position(jax.random.gumbel, key, sequence_ids, starts, count, vocab_size)


def position_uniforms(
    key: jax.Array, sequence_ids: jax.Array, starts: jax.Array, *, count: int, width: int
) -> jax.Array:
    """Uniform numbers in [0, 1), [B, count, width] float32; arguments as of `position_noise`."""

    return _by_position(jax.random.uniform, key, sequence_ids, starts, count, width)


def _by_position(
    draw: Callable[[jax.Array, tuple[int, ...], Any], jax.Array],
    key: jax.Array,
    sequence_ids: jax.Array,
    starts: jax.Array,
    count: int,
    width: int,
) -> jax.Array:
    """`width` float32 draws for each of `count` positions of each sequence, [B, count, width]."""

    def one(sequence_id: jax.Array, position: jax.Array) -> jax.Array:
        folded = jax.random.fold_in(jax.random.fold_in(key, sequence_id), position)
        return draw(folded, (width,), jnp.float32)

    positions = starts[:, None] + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(jax.vmap(one, in_axes=(None, 0)))(sequence_ids, positions)


def process_logits(logits: jax.Array, params: SamplingParams) -> jax.Array:
    """Applies top-k, then top-p, leaving the scale alone.

    Args:
      logits: [..., V]. Top-p counts probability at `params.temperature`, as plain decoding does.
      params: sampling parameters.

    Returns:
      [..., V] float32 with filtered tokens at `MASKED`. Tokens tied with the last kept one stay.
    """
    logits = logits.astype(jnp.float32)
    if not params.filtered:
        return logits
    vocab_size = logits.shape[-1]
    falling = -jnp.sort(-logits, axis=-1)
    kept = jnp.where(params.top_k > 0, jnp.minimum(params.top_k, vocab_size), vocab_size)
    in_top_k = jnp.arange(vocab_size) < kept
    scaled = jnp.where(in_top_k, falling / _safe(params.temperature), MASKED)
    probs = jax.nn.softmax(scaled, axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    # At top-p 1 rounding must not cut the tail off: what comes before it may sum to one.
    in_top_p = ((mass_before < params.top_p) | (params.top_p >= 1)) & in_top_k
    threshold = jnp.min(jnp.where(in_top_p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, MASKED)


def unscaled(log_probs: jax.Array, params: SamplingParams) -> jax.Array:
    """Logits [..., V] whose softmax at the sampling temperature has these log-probabilities."""
    return log_probs * _safe(params.temperature)


def noisy(processed: jax.Array, noise: jax.Array, params: SamplingParams) -> jax.Array:
    """Processed logits plus noise at the temperature's scale, [..., V] each."""
    return processed + params.temperature * noise


def pick(processed: jax.Array, noise: jax.Array, params: SamplingParams) -> jax.Array:
    """The coupled sample: [...] int32 from processed logits and noise, both [..., V]."""
    return jnp.argmax(noisy(processed, noise, params), axis=-1).astype(jnp.int32)


def scaled(logits: jax.Array, params: SamplingParams) -> jax.Array:
    """Logits [..., V] whose softmax is the distribution that sampling draws from."""
    return process_logits(logits, params) / _safe(params.temperature)


def probs(processed: jax.Array, params: SamplingParams) -> jax.Array:
    """The distribution that sampling draws from, [..., V] from processed logits [..., V]."""
    return jax.nn.softmax(processed / _safe(params.temperature), axis=-1)


def log_probs(processed: jax.Array, tokens: jax.Array, params: SamplingParams) -> jax.Array:
    """Log-probability in nats of `tokens` [...] under processed logits [..., V].

    This is the distribution that sampling draws from: temperature and filters included.
    """
    scaled = processed / _safe(params.temperature)
    chosen = jnp.take_along_axis(scaled, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(scaled, axis=-1)


def _safe(temperature: jax.Array) -> jax.Array:
    """Temperature for a division: greedy decoding is the limit of small temperatures."""
    return jnp.maximum(temperature, 1e-4)
