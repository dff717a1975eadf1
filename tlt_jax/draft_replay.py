"""What a drafter would have drafted in a rollout that is over: from its sequences alone.

In `coupled` verification no token depends on the drafter, and a chain's draft is accepted iff it is
the token that is there. So one rollout serves any number of drafters: for each place and draft
depth it is enough to ask whether the draft is right if those before it were (`hits`), which
`drafter.packed_steps` answers for all places at once; then rounds are counted from the prompt on,
each beginning where the one before has ended (`count_rounds`). Up to rounding, the accept length is
that of the rollout with this drafter.

Axes: M packed rows, T row length, F feature width, d draft depth, L tokens of a sequence.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tlt_jax import drafter, offline_training, policy, sampling, sharding
from tlt_jax.buffer import Microbatch
from tlt_jax.config import PolicyConfig, RunConfig
from tlt_jax.rollout import Response
from tlt_jax.types import SamplingParams


class Shown(NamedTuple):
    """The sequences of a rollout, packed, with the features of the policy that made them."""

    batches: list[Microbatch]  # segment ids are sequence ids
    target: Any  # policy parameters, rollout layout
    key: jax.Array  # of the rollout
    prompt_lengths: list[int]  # by sequence


class Rounds(NamedTuple):
    """Sums over the rounds of all sequences."""

    rounds: int
    committed: int  # tokens
    drafted: np.ndarray  # [d] int, rounds with a token at this draft position
    accepted: np.ndarray  # [d] int, of these the ones whose drafts up to it were accepted

    def plus(self, other: "Rounds") -> "Rounds":
        """The sums over both."""
        return Rounds(
            self.rounds + other.rounds,
            self.committed + other.committed,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )

    @property
    def accept_length(self) -> float:
        return self.committed / self.rounds

    @property
    def accept_by_position(self) -> list[float]:
        """Share of drafts accepted at draft position 1, 2, ..., where the response goes so far."""
        return (self.accepted / np.maximum(self.drafted, 1)).tolist()


def show(
    config: RunConfig, mesh: Mesh, target: Any, key: jax.Array, responses: Sequence[Response]
) -> Shown:
    """Packs a rollout's responses, all of them in their order, and makes their features."""
    rows = offline_training.packed(config, responses)
    batches = [
        _with_features(target, config.policy, batch)
        for batch in offline_training.in_order(rows, config, mesh)
    ]
    return Shown(batches, target, key, [r.prompt_length for r in responses])


_with_features = jax.jit(offline_training.microbatch_of, static_argnames="config")


def narrow(features: jax.Array | None, config: PolicyConfig) -> jax.Array | None:
    """Of features [..., F] what a drafter of this configuration reads: all, or the last part."""
    return None if features is None else features[..., -config.feature_width :]


@functools.partial(jax.jit, static_argnames=("config", "depth"))
def hits(
    params: Any,
    target: Any,
    config: PolicyConfig,
    sampling_params: SamplingParams,
    key: jax.Array,
    microbatch: Microbatch,
    *,
    depth: int,
) -> jax.Array:
    """Whether drafts are right where those before them are, [d, M, T] bool.

    Entry (j, m, t) is of the token at t, as the draft at position j + 1 of a round whose pending
    token is at t - j - 1. Nothing is drafted for the first two tokens of a sequence.

    Args:
      params: drafter parameters.
      target: policy parameters.
      config: the policy's shape.
      sampling_params: of the rollout; the drafter picks under the target's own noise.
      key: of the rollout.
      microbatch: whole rows; segment ids are sequence ids.
      depth: d.
    """
    params = sharding.cast(params, config.dtype)  # as a rollout drafts with them
    segments, positions = microbatch.segment_ids, microbatch.positions
    features = narrow(microbatch.features, config)
    assert features is not None, "drafts are made from features"
    pairs = drafter.training_pairs(microbatch.tokens, features, segments)
    steps = drafter.packed_steps(
        params,
        config,
        pairs.features,
        policy.embed(target, pairs.next_tokens),
        positions,
        segments,
        jnp.zeros_like(positions[:, 0]),
        count=segments.shape[1],
        steps=depth,
    )
    noise = sampling.position_noise(
        key,
        segments.reshape(-1),
        positions.reshape(-1) + 2,
        count=1,
        vocab_size=config.vocab_size,
    ).reshape(*segments.shape, -1)
    drafted = jnp.roll(microbatch.tokens, -2, axis=1)  # pair t is asked for the token at t + 2
    within = (jnp.roll(segments, -2, axis=1) == segments).at[:, -2:].set(False)
    found = []
    for estimates, exists in steps:
        processed = sampling.process_logits(policy.logits(target, estimates), sampling_params)
        right = sampling.pick(processed, noise, sampling_params) == drafted
        found.append(jnp.roll(right & exists & within, 2, axis=1))
    return jnp.stack(found)


def count_rounds(hits: np.ndarray, prompt_length: int) -> Rounds:
    """Decodes one sequence over again, by chains.

    Args:
      hits: [d, L] bool, of the sequence alone, as of `hits`.
      prompt_length: the tokens that are there when the first round begins.
    """
    depth, length = hits.shape
    rounds, drafted, accepted = 0, np.zeros(depth, int), np.zeros(depth, int)
    done = prompt_length
    while done < length:
        within = min(depth, length - done)
        right = hits[np.arange(within), done + np.arange(within)]
        hit = within if right.all() else int(np.argmin(right))
        drafted[:within] += 1
        accepted[:hit] += 1
        rounds += 1
        done = min(done + hit + 1, length)
    return Rounds(rounds, length - prompt_length, drafted, accepted)


def replay(
    params: Any, config: PolicyConfig, sampling_params: SamplingParams, shown: Shown, *, depth: int
) -> Rounds:
    """What chains of `depth` by the drafter `params` would have come to in the rollout shown."""
    total = Rounds(0, 0, np.zeros(depth, int), np.zeros(depth, int))
    for batch in shown.batches:
        found, segments = sharding.to_host(
            (
                hits(params, shown.target, config, sampling_params, shown.key, batch, depth=depth),
                batch.segment_ids,
            )
        )
        for row, ids in enumerate(segments):
            for sequence in np.unique(ids[ids >= 0]):
                own = count_rounds(found[:, row, ids == sequence], shown.prompt_lengths[sequence])
                total = total.plus(own)
    return total
