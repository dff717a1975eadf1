"""What the drafter learns, and how good it is: by microbatch, without a rollout.

Both look at packed rows at the draft depths 1, 2, ..., each pair with what it would see if drafts
had begun there (`drafter.packed_steps`), and at the target's own distribution for the same place.

Axes: M packed rows, C tokens of each that count, D width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tlt_jax import drafter, kv_cache, losses, policy, sampling, sharding
from tlt_jax.buffer import Microbatch
from tlt_jax.config import DrafterConfig, PolicyConfig
from tlt_jax.types import SamplingParams

LEAST_ACCEPTANCE = 1e-9
"""What is less likely to be accepted gives "acceptance" no gradient, and no infinity."""


class _Drafts(NamedTuple):
    """What the drafter gives at one draft depth, and what it should be."""

    logits: jax.Array  # [M, C, V]
    target_logits: jax.Array  # [M, C, V]
    estimates: jax.Array  # [M, C, D], of the target's final hidden states
    hidden: jax.Array  # [M, C, D], these
    weights: jax.Array  # [M, C] float32, 1 where there is such a draft


def loss_sum(
    params: Any,
    target_params: Any,
    policy_config: PolicyConfig,
    config: DrafterConfig,
    sampling_params: SamplingParams,
    microbatch: Microbatch,
) -> tuple[jax.Array, jax.Array]:
    """The objective, summed over `config.microbatch_tokens` tokens of each row and draft depths.

    `config.objective` is one of

    - "eagle" (arXiv 2401.15077, section 3.2) and "hass" (arXiv 2408.15766): cross-entropy against
      the target's distribution, plus smooth-L1 between estimated and true final hidden state;
    - "eagle3" (arXiv 2503.01840, section 3.1): the cross-entropy alone;
    - "acceptance": the negative log-probability that the draft is accepted, as the rollout samples
      (`sampling_params`) and verifies, plus the same smooth-L1.

    No gradient reaches the target's embedding and head. Returns the sum and how many terms it has.
    """
    loss, count = jnp.float32(0), jnp.float32(0)
    for drafts in _drafts(
        params, target_params, policy_config, config, microbatch, config.train_depth
    ):
        if config.objective == "acceptance":
            terms = -jnp.log(jnp.maximum(_acceptance(drafts, sampling_params), LEAST_ACCEPTANCE))
        else:
            terms = losses.soft_cross_entropy(drafts.logits, drafts.target_logits)
        if config.objective != "eagle3":
            terms += config.feature_loss_weight * losses.smooth_l1(drafts.estimates, drafts.hidden)
        loss += jnp.sum(terms * drafts.weights)
        count += jnp.sum(drafts.weights)
    return loss, count


def acceptance_sums(
    params: Any,
    target_params: Any,
    policy_config: PolicyConfig,
    config: DrafterConfig,
    sampling_params: SamplingParams,
    microbatch: Microbatch,
    *,
    depth: int,
) -> tuple[jax.Array, jax.Array]:
    """How likely drafts of chains are to be accepted if those before them were.

    Exact for the places looked at, which are all of them alike; a rollout drafts more often where
    drafts fail.

    Returns:
      Summed probabilities and their number at each draft depth, [depth] float32 both.
    """
    found = _drafts(params, target_params, policy_config, config, microbatch, depth)
    sums = [
        (jnp.sum(_acceptance(drafts, sampling_params) * drafts.weights), jnp.sum(drafts.weights))
        for drafts in found
    ]
    accepted, counted = zip(*sums, strict=True)
    return jnp.stack(accepted), jnp.stack(counted)


def _acceptance(drafts: _Drafts, sampling_params: SamplingParams) -> jax.Array:
    """Probability [M, C] that a draft is accepted."""
    rejection = sampling_params.rejection
    accepted = losses.rejection_acceptance if rejection else losses.coupled_acceptance
    drawn = (drafts.logits, drafts.target_logits)
    return accepted(*(sampling.scaled(logits, sampling_params) for logits in drawn))


def _drafts(
    params: Any,
    target_params: Any,
    policy_config: PolicyConfig,
    config: DrafterConfig,
    microbatch: Microbatch,
    depth: int,
) -> Iterator[_Drafts]:
    """Drafts at depth 1 .. `depth` over `config.microbatch_tokens` tokens of each row."""
    target_params = jax.lax.stop_gradient(target_params)
    params = sharding.cast(params, policy_config.dtype)
    features = microbatch.features
    if features is None:
        _, features = policy.packed_forward(
            target_params,
            policy_config,
            microbatch.tokens,
            microbatch.positions,
            microbatch.segment_ids,
        )
    pairs = drafter.training_pairs(microbatch.tokens, features, microbatch.segment_ids)
    starts, count = microbatch.starts, config.microbatch_tokens
    steps = drafter.packed_steps(
        params,
        policy_config,
        pairs.features,
        policy.embed(target_params, pairs.next_tokens),
        microbatch.positions,
        microbatch.segment_ids,
        starts,
        count=count,
        steps=depth,
    )
    hidden = kv_cache.take_rows(pairs.target_features, starts, count)[..., -policy_config.width :]
    counted = kv_cache.take_rows(pairs.weights, starts, count)
    target_logits = policy.logits(target_params, hidden)
    for estimates, exists in steps:
        logits = policy.logits(target_params, estimates)
        yield _Drafts(logits, target_logits, estimates, hidden, counted * exists)
