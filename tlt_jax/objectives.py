"""What the drafter learns, and how good it is: by microbatch, without a rollout.

Both look at packed rows at the draft depths 1, 2, ..., each pair with what it would see if drafts
had begun there (`drafter.packed_steps`), and at the target's own distribution for the same place.

Axes: M packed rows, C tokens of each that count, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tlt_jax import blocks, drafter, kv_cache, losses, policy, sampling, sharding
from tlt_jax.buffer import Microbatch
from tlt_jax.config import DrafterConfig, PolicyConfig
from tlt_jax.types import SamplingParams


class _Drafts(NamedTuple):
    """What the drafter gives at the draft depths, and what it should be."""

    estimates: tuple[jax.Array, ...]  # [M, C, D] each, of the target's final hidden states
    hidden: jax.Array  # [M, C, D], these
    weights: tuple[jax.Array, ...]  # [M, C] float32 each, 1 where there is such a draft


Term = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""Of draft and target logits [M, C, V], estimated and true hidden states [M, C, D]: [M, C]."""


def loss_sum(
    params: Any,
    target_params: Any,
    policy_config: PolicyConfig,
    config: DrafterConfig,
    microbatch: Microbatch,
) -> tuple[jax.Array, jax.Array]:
    """The objective, summed over `config.microbatch_tokens` tokens of each row and draft depths.

    `config.objective` is one of

    - "eagle" (arXiv 2401.15077, section 3.2) and "hass" (arXiv 2408.15766): cross-entropy against
      the target's distribution, plus smooth-L1 between estimated and true final hidden state;
    - "eagle3" (arXiv 2503.01840, section 3.1): the cross-entropy alone.

    No gradient reaches the target's embedding and head. Returns the sum and how many terms it has.
    """

    def term(logits, target_logits, estimates, hidden):
        found = losses.soft_cross_entropy(logits, target_logits)
        if config.objective != "eagle3":
            found += config.feature_loss_weight * losses.smooth_l1(estimates, hidden)
        return found

    drafts = _drafts(params, target_params, policy_config, config, microbatch, config.train_depth)
    sums = _weighted_sums(term, target_params, policy_config, drafts)
    loss, count = jnp.float32(0), jnp.float32(0)
    for of_depth, number in sums:
        loss, count = loss + of_depth, count + number
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

    def term(logits, target_logits, *_):
        return _acceptance(logits, target_logits, sampling_params)

    drafts = _drafts(params, target_params, policy_config, config, microbatch, depth)
    sums = _weighted_sums(term, target_params, policy_config, drafts)
    accepted, counted = zip(*sums, strict=True)
    return jnp.stack(accepted), jnp.stack(counted)


def _acceptance(
    logits: jax.Array, target_logits: jax.Array, sampling_params: SamplingParams
) -> jax.Array:
    """Probability [M, C] that a draft is accepted, from [M, C, V] each."""
    rejection = sampling_params.rejection
    accepted = losses.rejection_acceptance if rejection else losses.coupled_acceptance
    return accepted(*(sampling.scaled(x, sampling_params) for x in (logits, target_logits)))


def _weighted_sums(
    term: Term, target_params: Any, policy_config: PolicyConfig, drafts: _Drafts
) -> list[tuple[jax.Array, jax.Array]]:
    """Sum of a term over the drafts of each depth, and their number; logits exist by block."""
    target_params = jax.lax.stop_gradient(target_params)

    def terms(estimates: tuple[jax.Array, ...], hidden: jax.Array) -> list[jax.Array]:
        target_logits = policy.logits(target_params, hidden)
        return [term(policy.logits(target_params, x), target_logits, x, hidden) for x in estimates]

    rows, count, _ = drafts.hidden.shape
    size = blocks.size(count, rows * policy_config.vocab_size)
    found = blocks.over_tokens(terms, (drafts.estimates, drafts.hidden), size)
    pairs = zip(found, drafts.weights, strict=True)
    return [(jnp.sum(of_depth * weights), jnp.sum(weights)) for of_depth, weights in pairs]


def _drafts(
    params: Any,
    target_params: Any,
    policy_config: PolicyConfig,
    config: DrafterConfig,
    microbatch: Microbatch,
    depth: int,
) -> _Drafts:
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
    return _Drafts(
        estimates=tuple(estimates for estimates, _ in steps),
        hidden=hidden,
        weights=tuple(counted * exists for _, exists in steps),
    )
