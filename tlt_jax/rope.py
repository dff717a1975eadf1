"""Rotary position embeddings (arXiv 2104.09864) with the frequency scaling of Llama 3."""

import jax
import jax.numpy as jnp

from tlt_jax.config import RopeScaling


def frequencies(head_size: int, theta: float, scaling: RopeScaling) -> jax.Array:
    """Angular frequencies in radians per token, [H/2] float32.

    Llama 3 divides the frequencies of wavelengths beyond `original_max_length /
    low_freq_factor` by `factor`, keeps those below `original_max_length / high_freq_factor`, and
    interpolates between the two.
    """
    base = theta ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    if scaling.factor == 1.0:
        return base
    turns = scaling.original_max_length * base / (2 * jnp.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return base * keep + base / scaling.factor * (1.0 - keep)


def angles(positions: jax.Array, freqs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of `positions` [B, T], each [B, T, 1, 1, H/2] float32."""
    phase = positions[..., None, None, None].astype(jnp.float32) * freqs[None, None, None, None]
    return jnp.cos(phase), jnp.sin(phase)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the halves of `x` [B, T, K, heads, H]; keeps its dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
