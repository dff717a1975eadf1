"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1). G responses per group."""

import jax
import jax.numpy as jnp


def group_relative(rewards: jax.Array, *, normalize: bool) -> jax.Array:
    """Reward minus the group's mean, divided by its standard deviation if `normalize`.

    Args:
      rewards: [groups, G] float32.
      normalize: False leaves the division out (Dr. GRPO, arXiv 2503.20783).

    Returns:
      [groups, G] float32; a group of equal rewards gives zeros.
    """
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    if not normalize:
        return centred
    return centred / (jnp.std(rewards, axis=1, keepdims=True) + 1e-4)
