"""One round of speculative decoding: draft, verify, commit. Plain decoding is depth 0.

A row with n committed tokens x[0] .. x[n - 1] holds target keys, values and features of tokens
0 .. n - 2; x[n - 1] is pending. A round of depth d

1. *drafts*: a drafter grows a tree of guesses at x[n] .. x[n + d - 1] under the very noise that
   the target will be sampled with;
2. *verifies*: one target pass over the pending token and the drafts gives what the target takes
   after each of them, the log-probabilities, and the features;
3. *commits*: the path of drafts that equal the target's tokens, and the target's own next token.
   Of a tree the path's keys and values are moved to where they belong; of a chain they lie there.

What a round writes beyond the committed tokens is overwritten by the next one. This is `coupled`
verification: tokens depend on target, prompt and key alone. With `rejection` verification (see
`rejection`) the drafter draws its guesses with noise of its own, and what is kept of them follows
the target's distribution.

Axes: B rows, S cache length, F feature width, d draft depth, M verified tokens, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from tlt_jax import drafter, drafting, kv_cache, policy, rejection, sampling, trees
from tlt_jax.config import PolicyConfig
from tlt_jax.drafting import Drafted, DraftInputs, Models
from tlt_jax.kv_cache import LayerCache
from tlt_jax.rejection import Draws
from tlt_jax.trees import Tree
from tlt_jax.types import SamplingParams, Strategy

# Folded into the step's key for `rejection`; sequence ids, folded in for tokens, stay below.
DRAFT_STREAM, CHANCE_STREAM = 2**31 - 2, 2**31 - 3

PROVING_ROUNDS = 3
"""A chunk runs at least so many rounds before it may end for want of accepted drafts."""
PROVING_GUESSES = 10
"""And a slice drafts in it at least so often: of a single row three hard places prove nothing."""


@struct.dataclass
class RolloutState:
    """Rows in flight. `features` and `draft_cache` are None when no drafter takes part."""

    tokens: jax.Array  # [B, S] int32
    log_probs: jax.Array  # [B, S] float32, behaviour log-probability of the token at a position
    cache: tuple[LayerCache, ...]  # one per layer
    features: jax.Array | None  # [B, S, F], target features of tokens 0 .. length - 2
    draft_cache: LayerCache | None
    length: jax.Array  # [B] int32, committed tokens, the pending one included
    draft_length: jax.Array  # [B] int32, pairs in `draft_cache` that come from true features
    limit: jax.Array  # [B] int32, a row ends at this length
    live: jax.Array  # [B] bool
    stored: jax.Array  # [B] bool, already in the drafter's data buffer
    sequence_ids: jax.Array  # [B] int32, INVALID for padding rows
    prompt_ids: jax.Array  # [B] int32, equal for rows that answer the same prompt


@struct.dataclass
class RoundStats:
    """Sums over the rounds of a chunk, for one slice."""

    rounds: jax.Array  # [] int32
    row_rounds: jax.Array  # [] int32, live rows summed over rounds
    committed: jax.Array  # [] int32, tokens
    accepted: jax.Array  # [d] int32, rows whose first j + 1 drafts were accepted
    expected: jax.Array  # [d] float32, the same as the drafter estimated it; 0 for chains


@struct.dataclass
class Sampler:
    """What decides the tokens besides weights and prompt; all of it data."""

    key: jax.Array  # the step's key
    params: SamplingParams
    stop_tokens: jax.Array  # [number of stop tokens] int32
    draft_noise: jax.Array | float = 1.0  # [] float32, share of the noise that the drafter sees


def zero_stats(strategy: Strategy) -> RoundStats:
    zero = jnp.int32(0)
    return RoundStats(
        rounds=zero,
        row_rounds=zero,
        committed=zero,
        accepted=jnp.zeros((strategy.depth,), jnp.int32),
        expected=jnp.zeros((strategy.depth,), jnp.float32),
    )


def _put(whole: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    """Writes [B, count, ...] into [B, S, ...] at `starts` [B]."""

    return kv_cache.put_rows(whole, new.astype(whole.dtype), starts, axis=1)


def _draft_inputs(state: RolloutState) -> DraftInputs:
    return DraftInputs(
        tokens=state.tokens,
        features=state.features,
        cache=state.draft_cache,
        cached=state.draft_length,
        length=state.length,
    )


def refresh_draft_cache(
    models: Models, config: PolicyConfig, strategy: Strategy, state: RolloutState
) -> RolloutState:
    """Makes the drafter's cache from stored features where it lags by more than a round.

    That is so after prefill and when drafting begins after plain decoding; the drafter is one
    layer, and no target pass is needed.
    """
    if not strategy.uses_drafter:
        return state
    lag = state.length - 1 - state.draft_length
    stale = jnp.any(state.live & (lag > strategy.most_committed))
    make = functools.partial(make_draft_cache, models, config)
    return jax.lax.cond(stale, make, lambda s: s, state)


def make_draft_cache(models: Models, config: PolicyConfig, state: RolloutState) -> RolloutState:
    """Makes the drafter's whole cache from stored features."""
    features, cache = state.features, state.draft_cache
    assert features is not None and cache is not None, "these rows cannot be drafted for"
    following = jnp.roll(state.tokens, -1, axis=1)
    _, written = drafter.decode(
        models.draft,
        config,
        drafter.read(models.draft, config, features),
        policy.embed(models.target, following),
        cache,
        jnp.zeros_like(state.length),
    )
    known = jnp.maximum(state.length - 2, 0)
    return dataclasses.replace(state, draft_cache=written, draft_length=known)


def count_committed(
    accepted: jax.Array, taken: jax.Array, state: RolloutState, stop_tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """How much of a verified path is kept.

    Args:
      accepted: [B] int32, accepted drafts as if nothing stopped.
      taken: the target's own tokens along the path and one further, [B, d + 1] int32.
      state: the rows before the round.
      stop_tokens: any of these ends a row.

    Returns:
      Committed tokens [B] int32 (0 where not live), and whether the row is still live [B].
    """
    index = jnp.arange(taken.shape[1])
    stops = jnp.any(taken[..., None] == stop_tokens, axis=-1)
    first_stop = jnp.min(jnp.where(stops, index, taken.shape[1]), axis=1)
    count = jnp.minimum(jnp.minimum(accepted, first_stop) + 1, state.limit - state.length)
    stopped = first_stop < count
    live = state.live & ~stopped & (state.length + count < state.limit)
    return jnp.where(state.live, count, 0), live


@struct.dataclass
class _Verified:
    """What the target says of a round's tokens, the path of accepted drafts first.

    Of a tree the entries are those of the path and after it meaningless; of a chain they are those
    of all its tokens.
    """

    taken: jax.Array  # [B, d + 1] int32
    log_probs: jax.Array  # [B, d + 1] float32
    features: jax.Array  # [B, d + 1, F]
    accepted: jax.Array  # [B] int32, drafts
    expected: jax.Array  # [B, d] float32, estimated acceptance


def run_round(
    models: Models,
    config: PolicyConfig,
    strategy: Strategy,
    sampler: Sampler,
    sharpness: jax.Array,
    state: RolloutState,
    stats: RoundStats,
) -> tuple[RolloutState, RoundStats]:
    """One round on all rows of a slice; rows that are not live are computed but not changed."""
    with jax.named_scope("noise"):
        draft_noise, draws = _draw(config, strategy, sampler, state)
    if strategy.is_plain:
        pending = kv_cache.take_rows(state.tokens, state.length - 1, 1)[:, 0]
        tree = trees.prune(pending, trees.no_candidates(pending), depth=0, verify_tokens=1)
        drafted = Drafted(tree, state.draft_cache, ())
    else:
        with jax.named_scope("draft"):
            drafted = drafting.draft_tree(
                models,
                config,
                strategy,
                sampler.params,
                sharpness,
                draft_noise,
                _draft_inputs(state),
            )
        if strategy.uses_drafter:
            known = state.length - 1
            state = dataclasses.replace(state, draft_cache=drafted.cache, draft_length=known)
    cache, verified = _verify(models, config, strategy, sampler.params, draws, drafted, state)
    with jax.named_scope("commit"):
        state = dataclasses.replace(state, cache=cache)
        return _commit(state, stats, verified, sampler.stop_tokens)


def _draw(
    config: PolicyConfig, strategy: Strategy, sampler: Sampler, state: RolloutState
) -> tuple[jax.Array, Draws]:
    """Noise of the drafts [B, d, V], and what verification draws.

    `coupled` verification has one noise for both. For `rejection` the three are independent: shared
    noise between drafts and recovered tokens would bias these.
    """
    where = state.sequence_ids, state.length
    noise = sampling.position_noise(
        sampler.key, *where, count=strategy.most_committed, vocab_size=config.vocab_size
    )
    if not sampler.params.rejection:
        return sampler.draft_noise * noise[:, :-1], Draws(jnp.zeros((noise.shape[0], 0, 0)), noise)
    of_drafts, of_chances = (
        jax.random.fold_in(sampler.key, stream) for stream in (DRAFT_STREAM, CHANCE_STREAM)
    )
    uniforms = sampling.position_uniforms(
        of_chances, *where, count=strategy.depth, width=strategy.top_k
    )
    draft_noise = sampling.position_noise(
        of_drafts, *where, count=strategy.depth, vocab_size=config.vocab_size
    )
    return draft_noise, Draws(uniforms, noise)


def _verify(
    models: Models,
    config: PolicyConfig,
    strategy: Strategy,
    params: SamplingParams,
    draws: Draws,
    drafted: Drafted,
    state: RolloutState,
) -> tuple[tuple[LayerCache, ...], _Verified]:
    """One target pass over the tree, and the path that it accepts."""
    pending, tree = state.length - 1, drafted.tree
    branches = not strategy.is_chain
    with jax.named_scope("verify"):
        hidden, features, cache = policy.decode(
            models.target,
            config,
            tree.tokens,
            state.cache,
            pending,
            draft_mask=tree.mask if branches else None,
            depths=tree.depths if branches else None,
        )
    with jax.named_scope("head"):
        processed = sampling.process_logits(policy.logits(models.target, hidden), params)
        if params.rejection:
            probs = sampling.probs(processed, params)
            walk = rejection.walk(tree, drafted.proposals, probs, draws)
            taken, accepted, path = walk.taken, walk.accepted, walk.path
        else:
            taken, accepted, path = _by_coupling(strategy, params, draws.noise, tree, processed)
    with jax.named_scope("commit"):
        expected = jnp.zeros((taken.shape[0], strategy.depth), jnp.float32)
        if branches:
            found = jnp.any(path[:, :, None] == jnp.arange(strategy.verify_tokens), axis=1)
            expected = trees.expected_acceptance(tree, found, depth=strategy.depth)
            processed, features = trees.take(processed, path), trees.take(features, path)
            cache = tuple(kv_cache.move(layer, pending, path) for layer in cache)
    with jax.named_scope("head"):
        log_probs = sampling.log_probs(processed, taken, params)
    return cache, _Verified(taken, log_probs, features, accepted, expected)


def _by_coupling(
    strategy: Strategy,
    params: SamplingParams,
    noise: jax.Array,
    tree: Tree,
    processed: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Accepts a draft iff it is the token that the target takes under its noise [B, d + 1, V].

    `processed` are the target's logits after each node, [B, M, V]. Returns the tokens along the
    path [B, d + 1], how many drafts were accepted [B], and the path's nodes [B, d + 1].
    """
    if strategy.is_chain:
        taken = sampling.pick(processed, noise, params)
        return taken, trees.accepted_in_chain(tree.tokens, taken), tree.depths
    taken = sampling.pick(processed, trees.take(noise, tree.depths), params)
    found = trees.accepted_nodes(tree, taken)
    accepted, path = trees.accepted_path(tree, found, depth=strategy.depth)
    return trees.take(taken, path), accepted, path


def _commit(
    state: RolloutState, stats: RoundStats, verified: _Verified, stop_tokens: jax.Array
) -> tuple[RolloutState, RoundStats]:
    """Keeps what was verified and accepted, as far as no stop or limit comes before."""
    count, live = count_committed(verified.accepted, verified.taken, state, stop_tokens)
    depth = verified.expected.shape[1]
    reached = verified.accepted[:, None] > jnp.arange(depth)
    stats = RoundStats(
        rounds=stats.rounds + 1,
        row_rounds=stats.row_rounds + jnp.sum(state.live),
        committed=stats.committed + jnp.sum(count),
        accepted=stats.accepted + jnp.sum(state.live[:, None] & reached, axis=0),
        expected=stats.expected + jnp.sum(state.live[:, None] * verified.expected, axis=0),
    )
    features = state.features
    if features is not None:
        features = _put(features, verified.features, state.length - 1)
    state = dataclasses.replace(
        state,
        tokens=_put(state.tokens, verified.taken, state.length),
        log_probs=_put(state.log_probs, verified.log_probs, state.length),
        features=features,
        length=state.length + count,
        live=live,
    )
    return state, stats


def run_rounds(
    step: Callable[[RolloutState, RoundStats], tuple[RolloutState, RoundStats]],
    state: RolloutState,
    stats: RoundStats,
    rounds: jax.Array,
    give_up_below: jax.Array | float = 0.0,
) -> tuple[RolloutState, RoundStats]:
    """Rounds until `stats` counts `rounds` of them, no row is live, or drafting is of no use.

    Args:
      step: one round, `run_round` with all arguments but the last two.
      state: the rows of a slice. The drafter's cache must not lag: see `refresh_draft_cache`.
      stats: what to add to.
      rounds: [] int32.
      give_up_below: [] float32; from `PROVING_ROUNDS` rounds and `PROVING_GUESSES` trees drafted on
        the accept length must not be less.
    """

    def more(carry: tuple[RolloutState, RoundStats]) -> jax.Array:
        state, stats = carry
        worth_it = stats.committed >= give_up_below * stats.row_rounds
        proving = (stats.rounds < PROVING_ROUNDS) | (stats.row_rounds < PROVING_GUESSES)
        return (stats.rounds < rounds) & jnp.any(state.live) & (worth_it | proving)

    return jax.lax.while_loop(more, lambda carry: step(*carry), (state, stats))
