"""One round of speculative decoding: draft, verify, commit. Plain decoding is depth 0.

A row with n committed tokens x[0] .. x[n - 1] holds target keys, values and features of tokens
0 .. n - 2; x[n - 1] is pending. A round of depth d

1. *drafts*: the drafter catches up on the pairs that became known in the last round, then guesses
   x[n] .. x[n + d - 1] under the very noise that the target will be sampled with;
2. *verifies*: one target pass over the pending token and the d drafts gives the tokens the target
   takes at n .. n + d, their log-probabilities, and the features of n - 1 .. n - 1 + d;
3. *commits*: the drafts that equal the target's tokens, and the target's own next token.

What a round writes beyond the committed tokens is overwritten by the next one. Verification is
`coupled` (design: drafter invariance): tokens depend on target, prompt and key alone.

Axes: B rows, S cache length, D width, d draft depth, V vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tlt_jax import drafter, kv_cache, policy, sampling
from tlt_jax.config import PolicyConfig
from tlt_jax.kv_cache import LayerCache
from tlt_jax.types import SamplingParams, Strategy


@struct.dataclass
class RolloutState:
    """Rows in flight. `features` and `draft_cache` are None when no drafter takes part."""

    tokens: jax.Array  # [B, S] int32
    log_probs: jax.Array  # [B, S] float32, behaviour log-probability of the token at a position
    cache: tuple[LayerCache, ...]  # one per layer
    features: jax.Array | None  # [B, S, D], target features of tokens 0 .. length - 2
    draft_cache: LayerCache | None
    length: jax.Array  # [B] int32, committed tokens, the pending one included
    draft_length: jax.Array  # [B] int32, pairs in `draft_cache` that come from true features
    limit: jax.Array  # [B] int32, a row ends at this length
    live: jax.Array  # [B] bool
    stored: jax.Array  # [B] bool, already in the drafter's data buffer
    sequence_ids: jax.Array  # [B] int32, INVALID for padding rows


@struct.dataclass
class RoundStats:
    """Sums over the rounds of a chunk, for one slice."""

    rounds: jax.Array  # [] int32
    row_rounds: jax.Array  # [] int32, live rows summed over rounds
    committed: jax.Array  # [] int32, tokens
    accepted: jax.Array  # [d] int32, rows whose first j + 1 drafts were accepted


@struct.dataclass
class Models:
    """Weights that a round reads."""

    target: Any
    draft: Any  # None when no drafter takes part


@struct.dataclass
class Sampler:
    """What decides the tokens besides weights and prompt; all of it data."""

    key: jax.Array  # the step's key
    params: SamplingParams
    stop_tokens: jax.Array  # [number of stop tokens] int32


def zero_stats(strategy: Strategy) -> RoundStats:
    zero = jnp.int32(0)
    return RoundStats(
        rounds=zero,
        row_rounds=zero,
        committed=zero,
        accepted=jnp.zeros((strategy.depth,), jnp.int32),
    )


def _put(whole: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    """Writes [B, count, ...] into [B, S, ...] at `starts` [B]."""

    return kv_cache.put_rows(whole, new.astype(whole.dtype), starts, axis=1)


def _draft_rows(state: RolloutState) -> tuple[jax.Array, LayerCache]:
    """Features and drafter cache of rows that a drafter takes part in."""
    assert state.features is not None and state.draft_cache is not None
    return state.features, state.draft_cache


def refresh_draft_cache(
    models: Models, config: PolicyConfig, strategy: Strategy, state: RolloutState
) -> RolloutState:
    """Makes the drafter's cache from stored features where it lags by more than a round.

    That is so after prefill and when drafting begins after plain decoding; the drafter is one
    layer, and no target pass is needed.
    """
    if strategy.is_plain:
        return state
    features, draft_cache = _draft_rows(state)
    lag = state.length - 1 - state.draft_length
    stale = jnp.any(state.live & (lag > strategy.verify_tokens))

    def refresh(state: RolloutState) -> RolloutState:
        following = jnp.roll(state.tokens, -1, axis=1)
        _, cache = drafter.decode(
            models.draft,
            config,
            features,
            policy.embed(models.target, following),
            draft_cache,
            jnp.zeros_like(state.length),
        )
        known = jnp.maximum(state.length - 2, 0)
        return dataclasses.replace(state, draft_cache=cache, draft_length=known)

    return jax.lax.cond(stale, refresh, lambda s: s, state)


def draft_chain(
    models: Models,
    config: PolicyConfig,
    params: SamplingParams,
    noise: jax.Array,
    state: RolloutState,
) -> tuple[jax.Array, LayerCache]:
    """Guesses d tokens per row.

    Args:
      models: target and drafter.
      config: the policy's shape.
      params: sampling parameters; the drafter samples as the target will.
      noise: [B, d, V], the target's own noise of positions `length + 0 .. d - 1`.
      state: the rows.

    Returns:
      Drafts [B, d] int32 and the drafter's written cache.
    """
    depth = noise.shape[1]
    features, cache = _draft_rows(state)
    start = state.draft_length
    estimates, cache = drafter.decode(
        models.draft,
        config,
        kv_cache.take_rows(features, start, depth + 1),
        policy.embed(models.target, kv_cache.take_rows(state.tokens, start + 1, depth + 1)),
        cache,
        start,
    )
    newest = jnp.clip(state.length - 2 - start, 0, depth)
    hidden = jnp.take_along_axis(estimates, newest[:, None, None], axis=1)  # [B, 1, D]
    drafts = []
    for index in range(depth):
        logits = policy.logits(models.target, hidden[:, 0])
        drafts.append(
            sampling.pick(sampling.process_logits(logits, params), noise[:, index], params)
        )
        if index + 1 < depth:
            embedded = policy.embed(models.target, drafts[-1][:, None])
            slot = state.length - 1 + index
            hidden, cache = drafter.decode(models.draft, config, hidden, embedded, cache, slot)
    return jnp.stack(drafts, axis=1), cache


def count_committed(
    drafts: jax.Array, taken: jax.Array, state: RolloutState, stop_tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How much of a verified chain is kept.

    Args:
      drafts: [B, d] int32.
      taken: the target's own tokens at the drafts' positions and one further, [B, d + 1].
      state: the rows before the round.
      stop_tokens: any of these ends a row.

    Returns:
      Committed tokens [B] int32 (0 where not live), whether the row is still live [B], and
      accepted drafts [B] int32 as if nothing stopped.
    """
    same = (drafts == taken[:, :-1]).astype(jnp.int32)
    accepted = jnp.sum(jnp.cumprod(same, axis=1), axis=1)
    index = jnp.arange(taken.shape[1])
    stops = jnp.any(taken[..., None] == stop_tokens, axis=-1)
    first_stop = jnp.min(jnp.where(stops, index, taken.shape[1]), axis=1)
    count = jnp.minimum(jnp.minimum(accepted, first_stop) + 1, state.limit - state.length)
    stopped = first_stop < count
    live = state.live & ~stopped & (state.length + count < state.limit)
    return jnp.where(state.live, count, 0), live, accepted


def run_round(
    models: Models,
    config: PolicyConfig,
    strategy: Strategy,
    sampler: Sampler,
    state: RolloutState,
    stats: RoundStats,
) -> tuple[RolloutState, RoundStats]:
    """One round on all rows of a slice; rows that are not live are computed but not changed."""
    with jax.named_scope("noise"):
        noise = sampling.position_noise(
            sampler.key,
            state.sequence_ids,
            state.length,
            count=strategy.verify_tokens,
            vocab_size=config.vocab_size,
        )
    pending = state.length - 1
    query = kv_cache.take_rows(state.tokens, pending, 1)
    drafts = jnp.zeros((query.shape[0], 0), jnp.int32)
    if not strategy.is_plain:
        with jax.named_scope("draft"):
            drafts, draft_cache = draft_chain(models, config, sampler.params, noise[:, :-1], state)
        query = jnp.concatenate([query, drafts], axis=1)
        state = dataclasses.replace(state, draft_cache=draft_cache, draft_length=pending)

    with jax.named_scope("verify"):
        hidden, _, cache = policy.decode(models.target, config, query, state.cache, pending)
    with jax.named_scope("head"):
        processed = sampling.process_logits(policy.logits(models.target, hidden), sampler.params)
        taken = sampling.pick(processed, noise, sampler.params)
        log_probs = sampling.log_probs(processed, taken, sampler.params)

    with jax.named_scope("commit"):
        state = dataclasses.replace(state, cache=cache)
        return _commit(state, stats, drafts, taken, log_probs, hidden, sampler.stop_tokens)


def _commit(
    state: RolloutState,
    stats: RoundStats,
    drafts: jax.Array,
    taken: jax.Array,
    log_probs: jax.Array,
    hidden: jax.Array,
    stop_tokens: jax.Array,
) -> tuple[RolloutState, RoundStats]:
    """Keeps what was verified: tokens, log-probabilities [B, d + 1] and features [B, d + 1, D]."""
    count, live, accepted = count_committed(drafts, taken, state, stop_tokens)
    reached = accepted[:, None] > jnp.arange(drafts.shape[1])
    stats = RoundStats(
        rounds=stats.rounds + 1,
        row_rounds=stats.row_rounds + jnp.sum(state.live),
        committed=stats.committed + jnp.sum(count),
        accepted=stats.accepted + jnp.sum(state.live[:, None] & reached, axis=0),
    )
    features = state.features
    if features is not None:
        features = _put(features, hidden, state.length - 1)
    state = dataclasses.replace(
        state,
        tokens=_put(state.tokens, taken, state.length),
        log_probs=_put(state.log_probs, log_probs, state.length),
        features=features,
        length=state.length + count,
        live=live,
    )
    return state, stats


def run_rounds(
    models: Models,
    config: PolicyConfig,
    strategy: Strategy,
    sampler: Sampler,
    state: RolloutState,
    stats: RoundStats,
    rounds: jax.Array,
) -> tuple[RolloutState, RoundStats]:
    """Rounds until `stats` counts `rounds` ([] int32) of them or no row of the slice is live.

    The drafter's cache must not lag: see `refresh_draft_cache`.
    """

    def more(carry: tuple[RolloutState, RoundStats]) -> jax.Array:
        state, stats = carry
        return (stats.rounds < rounds) & jnp.any(state.live)

    def body(carry: tuple[RolloutState, RoundStats]) -> tuple[RolloutState, RoundStats]:
        return run_round(models, config, strategy, sampler, *carry)

    return jax.lax.while_loop(more, body, (state, stats))
