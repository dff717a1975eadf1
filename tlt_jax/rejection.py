"""Rejection verification: which drafts are kept so that tokens follow the target's distribution.

The alternative to `coupled` verification, for drafters that draw their guesses with noise of their
own (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). A node's children are drawn
from the drafter's distribution q without replacement and tried in the order of the draw: child x
is accepted with probability min(1, p(x) / q(x)), p being the target's distribution. After a
rejection p becomes its normed residual max(p - q, 0), and q is left without x (recursive rejection
sampling, Jeon et al., arXiv 2402.14160, section 3.2). Where no child is accepted, or there is none,
the token is drawn from what p has become. A chain is the case of a single child.

That a node is dropped because of what its siblings were drawn to be would bias the result, so whole
trees are verified. Draws of drafts, of acceptance and of the last token are independent of one
another.

Axes as in `trees`.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from tlt_jax import sampling, trees
from tlt_jax.trees import Tree


@struct.dataclass
class Proposal:
    """What the children of a level's nodes were drawn from."""

    nodes: jax.Array  # [B, n] int32, nodes of the tree that were given children
    probs: jax.Array  # [B, n, V] float32, q


@struct.dataclass
class Draws:
    """Randomness of a round, of which nobody else knows."""

    uniforms: jax.Array  # [B, d, k] float32 in [0, 1), one for each depth and sibling
    noise: jax.Array  # [B, d + 1, V] float32, Gumbel, one row for each place of the last token


@struct.dataclass
class Walk:
    """Where the walk down the tree has come to."""

    node: jax.Array  # [B] int32, the last accepted node
    accepted: jax.Array  # [B] int32, how many
    path: jax.Array  # [B, d + 1] int32, nodes, 0 beyond the last accepted
    taken: jax.Array  # [B, d + 1] int32, tokens: accepted ones, then the last, then meaningless
    going: jax.Array  # [B] bool, whether the last token is still to be drawn


def walk(tree: Tree, proposals: Sequence[Proposal], probs: jax.Array, draws: Draws) -> Walk:
    """Walks from the pending token down to the last accepted draft, and draws one token more.

    Args:
      tree: a whole tree, or a chain; siblings lie together in the order in which they were drawn.
      proposals: of depth 0, 1, ..., d - 1.
      probs: p after each node, [B, M, V] float32.
      draws: the randomness.
    """
    batch, depth = probs.shape[0], len(proposals)
    state = Walk(
        node=jnp.zeros((batch,), jnp.int32),
        accepted=jnp.zeros((batch,), jnp.int32),
        path=jnp.zeros((batch, depth + 1), jnp.int32),
        taken=jnp.zeros((batch, depth + 1), jnp.int32),
        going=jnp.ones((batch,), bool),
    )
    for level in range(depth + 1):
        here = trees.take(probs, state.node[:, None])[:, 0]
        child = jnp.full((batch,), -1, jnp.int32)
        if level < depth:
            chances = draws.uniforms[:, level]
            child, here = _try_children(tree, proposals[level], state.node, here, chances)
        drawn = sample(here, draws.noise[:, level])
        state = _step(state, tree, child, drawn, level)
    return state


def _try_children(
    tree: Tree, proposal: Proposal, node: jax.Array, probs: jax.Array, uniforms: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The accepted child [B], -1 for none, and what p has become [B, V]."""
    rows = jnp.arange(node.shape[0])
    given = proposal.nodes == node[:, None]  # [B, n]
    draft = jnp.sum(jnp.where(given[..., None], proposal.probs, 0.0), axis=1)  # 0 without children
    own = (tree.parents == node[:, None]) & (jnp.arange(tree.parents.shape[1]) > 0)
    first = jnp.argmax(own, axis=1).astype(jnp.int32)
    accepted = jnp.full_like(node, -1)
    for sibling in range(uniforms.shape[1]):
        child = jnp.minimum(first + sibling, tree.tokens.shape[1] - 1)
        token = tree.tokens[rows, child]
        offered = draft[rows, token]
        wins = (offered > 0) & (uniforms[:, sibling] * offered < probs[rows, token])
        here = wins & (accepted < 0) & own[rows, child]
        rejected = ~wins & (accepted < 0) & own[rows, child]
        accepted = jnp.where(here, child, accepted)
        probs = jnp.where(rejected[:, None], residual(probs, draft), probs)
        draft = without(draft, token)
    return accepted, probs


def residual(probs: jax.Array, draft: jax.Array) -> jax.Array:
    """max(p - q, 0), normed; p itself where nothing remains, as rounding may have it."""
    left = jnp.maximum(probs - draft, 0.0)
    return jnp.where(jnp.any(left > 0, axis=-1, keepdims=True), _normed(left), probs)


def without(draft: jax.Array, tokens: jax.Array) -> jax.Array:
    """q [B, V] given that it is not the token [B]."""
    return _normed(draft.at[jnp.arange(draft.shape[0]), tokens].set(0.0))


def _normed(weights: jax.Array) -> jax.Array:
    """Weights [..., V] that sum to one, or zeros."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.where(total > 0, weights / jnp.where(total > 0, total, 1.0), 0.0)


def sample(probs: jax.Array, noise: jax.Array) -> jax.Array:
    """A token of [..., V] probabilities by Gumbel noise: [...] int32."""
    logits = jnp.where(probs > 0, jnp.log(probs), sampling.MASKED)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def _step(state: Walk, tree: Tree, child: jax.Array, drawn: jax.Array, level: int) -> Walk:
    """Goes on to the accepted child, or ends with the drawn token."""
    descends = state.going & (child >= 0)
    node = jnp.where(descends, child, state.node)
    token = jnp.where(descends, trees.take(tree.tokens, node[:, None])[:, 0], drawn)
    path = state.path
    if level + 1 < path.shape[1]:
        path = path.at[:, level + 1].set(jnp.where(descends, node, 0))
    return dataclasses.replace(
        state,
        node=node,
        accepted=state.accepted + descends,
        path=path,
        taken=state.taken.at[:, level].set(token),
        going=descends,
    )
