"""Grows the draft tree of a round with the drafter, level by level.

A row with n committed tokens x[0] .. x[n - 1] has target features of tokens 0 .. n - 2. The drafter
first catches up on the pairs that became known in the last round; its estimate of the feature of
n - 1 gives the candidates for x[n]. Each further level feeds the best nodes of the level before,
every one with its parent's estimated feature, and sees the committed pairs and its ancestors.

Axes as in `trees`, and S cache length, D width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tlt_jax import drafter, kv_cache, policy, sampling, trees
from tlt_jax.config import PolicyConfig
from tlt_jax.kv_cache import LayerCache
from tlt_jax.trees import Candidates, Tree
from tlt_jax.types import SamplingParams, Strategy


@struct.dataclass
class Models:
    """Weights that a round reads."""

    target: Any
    draft: Any  # None when no drafter takes part


@struct.dataclass
class DraftInputs:
    """What the drafter knows of the rows."""

    tokens: jax.Array  # [B, S] int32
    features: jax.Array  # [B, S, D], target features of tokens 0 .. length - 2
    cache: LayerCache  # the drafter's
    cached: jax.Array  # [B] int32, pairs in `cache` that come from true features
    length: jax.Array  # [B] int32, committed tokens


@struct.dataclass
class _Level:
    """Nodes whose children come next, in the drafter's own terms; n = 1, then top-k."""

    tokens: jax.Array  # [B, n] int32
    hidden: jax.Array  # [B, n, D], estimated feature of each node
    candidates: jax.Array  # [B, n] int32, its number among the candidates; -1 is the pending token
    scores: jax.Array  # [B, n] float32
    ancestors: jax.Array  # [B, n, nodes fed so far] bool, itself included


def draft_tree(
    models: Models,
    config: PolicyConfig,
    strategy: Strategy,
    params: SamplingParams,
    sharpness: jax.Array,
    noise: jax.Array,
    inputs: DraftInputs,
) -> tuple[Tree, LayerCache]:
    """Guesses what the target will take in the next `strategy.depth` positions.

    Args:
      models: target and drafter.
      config: the policy's shape.
      strategy: depth, top-k and verify tokens; not plain.
      params: sampling parameters; the drafter samples as the target will.
      sharpness: factor of noisy logits in the estimated acceptance at each depth, [d] float32.
      noise: [B, d, V], the target's own noise of positions `length + 0 .. d - 1`.
      inputs: the rows.

    Returns:
      The tree to verify, whose node 0 is the pending token, and the drafter's written cache.
    """
    hidden, cache = _catch_up(models, config, inputs, strategy.most_committed)
    batch = hidden.shape[0]
    pending = trees.take(inputs.tokens, inputs.length[:, None] - 1)
    level = _Level(
        tokens=pending,
        hidden=hidden,
        candidates=jnp.full((batch, 1), -1, jnp.int32),
        scores=jnp.zeros((batch, 1), jnp.float32),
        ancestors=jnp.zeros((batch, 1, 0), bool),
    )
    levels: list[Candidates] = []
    for depth in range(1, strategy.depth + 1):
        if depth > 1:
            level, cache = _feed(models, config, strategy, inputs, cache, level, levels, depth - 1)
        logits = policy.logits(models.target, level.hidden)
        noisy = sampling.noisy(
            sampling.process_logits(logits, params), noise[:, depth - 1, None], params
        )
        levels.append(
            trees.children(
                noisy, sharpness[depth - 1], level.candidates, level.scores, top_k=strategy.top_k
            )
        )
    candidates = trees.join(levels)
    tree = trees.prune(
        pending[:, 0], candidates, depth=strategy.depth, verify_tokens=strategy.verify_tokens
    )
    return tree, cache


def _catch_up(
    models: Models, config: PolicyConfig, inputs: DraftInputs, count: int
) -> tuple[jax.Array, LayerCache]:
    """Feeds the pairs of the last round, at most `count`.

    Returns the estimated feature of the pending token, [B, 1, D], and the written cache.
    """
    start = inputs.cached
    estimates, cache = drafter.decode(
        models.draft,
        config,
        kv_cache.take_rows(inputs.features, start, count),
        policy.embed(models.target, kv_cache.take_rows(inputs.tokens, start + 1, count)),
        inputs.cache,
        start,
    )
    newest = jnp.clip(inputs.length - 2 - start, 0, count - 1)
    return trees.take(estimates, newest[:, None]), cache


def _feed(
    models: Models,
    config: PolicyConfig,
    strategy: Strategy,
    inputs: DraftInputs,
    cache: LayerCache,
    above: _Level,
    levels: list[Candidates],
    depth: int,
) -> tuple[_Level, LayerCache]:
    """Feeds the best nodes of the last of `levels`, which have this depth.

    `above` is the level of their parents. Nodes fed take the cache's slots from the pending token's
    on, `top_k` a level.
    """
    top_k = strategy.top_k
    nodes = _best_nodes(levels[-1], above, top_k)
    own = jnp.broadcast_to(jnp.eye(top_k, dtype=bool), (nodes.hidden.shape[0], top_k, top_k))
    ancestors = jnp.concatenate([nodes.ancestors, own], axis=2)
    hidden, cache = drafter.decode(
        models.draft,
        config,
        nodes.hidden,
        policy.embed(models.target, nodes.tokens),
        cache,
        inputs.length - 1,
        draft_mask=None if strategy.is_chain else ancestors,  # a node of a chain sees all before it
        first_node=top_k * (depth - 1),
        depth=depth - 1,
    )
    before = sum(level.tokens.shape[1] for level in levels[:-1])
    fed = dataclasses.replace(
        nodes, hidden=hidden, candidates=before + nodes.candidates, ancestors=ancestors
    )
    return fed, cache


def _best_nodes(found: Candidates, above: _Level, top_k: int) -> _Level:
    """The best `top_k` of a level, with what their parents have: features and ancestors.

    Their candidate numbers are counted from the level's first.
    """
    if found.tokens.shape[1] == top_k:  # children of one node, all of them
        numbers = jnp.broadcast_to(jnp.arange(top_k, dtype=jnp.int32), found.tokens.shape)
        return _Level(
            tokens=found.tokens,
            hidden=jnp.repeat(above.hidden, top_k, axis=1),
            candidates=numbers,
            scores=found.scores,
            ancestors=jnp.repeat(above.ancestors, top_k, axis=1),
        )
    chosen = trees.best(found.scores, top_k)
    parents = chosen // top_k  # children lie together, parent by parent
    return _Level(
        tokens=trees.take(found.tokens, chosen),
        hidden=trees.take(above.hidden, parents),
        candidates=chosen,
        scores=trees.take(found.scores, chosen),
        ancestors=trees.take(above.ancestors, parents),
    )
