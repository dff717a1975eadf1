"""Losses on arrays, never on models. T tokens, V vocabulary; log-probabilities in nats."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class PolicyLoss(NamedTuple):
    """Per-token terms of the GRPO objective, each shaped like its inputs."""

    loss: jax.Array  # to be minimised, KL penalty included
    kl: jax.Array  # low-variance estimate, nats
    clipped: jax.Array  # float32, 1 where the clip is active


def low_variance_kl(log_probs: jax.Array, reference_log_probs: jax.Array) -> jax.Array:
    """Estimator of KL(policy || reference) per sampled token: exp(r) - 1 - r, r = ref - policy.

    Never negative, unbiased (Schulman, "Approximating KL divergence", k3).
    """
    ratio = reference_log_probs - log_probs
    return jnp.expm1(ratio) - ratio


def grpo(
    log_probs: jax.Array,
    old_log_probs: jax.Array,
    advantages: jax.Array,
    reference_log_probs: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
) -> PolicyLoss:
    """Clipped surrogate with KL penalty (GRPO, arXiv 2402.03300, equation 3), per token.

    Args:
      log_probs: of the sampled tokens under the policy being updated.
      old_log_probs: under the policy before the first update on this batch.
      advantages: of the token's sequence.
      reference_log_probs: under the reference policy; unused when `kl_coef` is 0.
      clip_low: the ratio is clipped below at 1 - clip_low.
      clip_high: and above at 1 + clip_high (DAPO, arXiv 2503.14476, allows it to be larger).
      kl_coef: weight of the KL estimate.
    """
    ratio = jnp.exp(log_probs - old_log_probs)
    clipped_ratio = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    surrogate = jnp.minimum(ratio * advantages, clipped_ratio * advantages)
    kl = low_variance_kl(log_probs, reference_log_probs)
    clipped = (clipped_ratio * advantages < ratio * advantages).astype(jnp.float32)
    return PolicyLoss(loss=-surrogate + kl_coef * kl, kl=kl, clipped=clipped)


def truncated_importance(
    old_log_probs: jax.Array, behaviour_log_probs: jax.Array, cap: float
) -> jax.Array:
    """Weight min(pi_old / behaviour, cap) that corrects a trainer / rollout mismatch."""
    return jnp.minimum(jnp.exp(old_log_probs - behaviour_log_probs), cap)


def smooth_l1(estimate: jax.Array, target: jax.Array) -> jax.Array:
    """Mean smooth-L1 distance over the last axis, in float32."""
    distance = jnp.abs(estimate.astype(jnp.float32) - target.astype(jnp.float32))
    return jnp.mean(jnp.where(distance < 1.0, 0.5 * distance**2, distance - 0.5), axis=-1)


def soft_cross_entropy(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """Cross-entropy of `logits` [..., V] against the distribution of `target_logits`, in nats."""
    target = jax.nn.softmax(target_logits, axis=-1)
    return -jnp.sum(target * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def coupled_acceptance(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """Probability that a draft under shared Gumbel noise is the token that the target takes.

    With p the target's distribution and q the drafter's, softmax of [..., V] each, the two noisy
    arg-maxes are both i with probability 1 / sum_j max(p_j / p_i, q_j / q_i) (Daliri et al.,
    arXiv 2408.07978). In the order of q / p the sum is what p holds up to i, over p_i, plus what q
    holds beyond, over q_i: V log V operations and not V squared. Shape [...].
    """
    log_p, log_q = jax.nn.log_softmax(target_logits), jax.nn.log_softmax(logits)
    order = jnp.argsort(log_q - log_p, axis=-1)
    p, q = (jnp.exp(jnp.take_along_axis(x, order, axis=-1)) for x in (log_p, log_q))
    up_to = jnp.cumsum(p, axis=-1)
    beyond = jax.lax.cumsum(q, axis=q.ndim - 1, reverse=True) - q
    whole = up_to * q + beyond * p
    possible = whole > 0  # not so where both distributions are zero
    return jnp.sum(jnp.where(possible, p * q / jnp.where(possible, whole, 1.0), 0.0), axis=-1)


def rejection_acceptance(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """Probability that rejection sampling keeps a draft: the sum of min(p, q), shape [...].

    Source: Leviathan et al., arXiv 2211.17192, corollary 3.6.
    """
    overlap = jnp.minimum(jax.nn.softmax(logits), jax.nn.softmax(target_logits))
    return jnp.sum(overlap, axis=-1)
