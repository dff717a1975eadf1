"""Draft trees on arrays: which candidates are verified, who sees whom, which path is accepted.

A tree is grown level by level (EAGLE-2, arXiv 2406.16858): of each level the `top_k` best nodes
get `top_k` children. The score of a node is the estimated log-probability that it is accepted, the
sum of its own and its ancestors'. Since a child never scores above its parent, the best nodes of
the whole tree form a tree again, and those are verified.

For `coupled` verification a child is accepted iff it is the token that the target takes under its
noise, and the drafter knows that noise. So its candidates are ranked by noisy logits, and their
estimate is a softmax of noisy logits: the nearer the runners-up, the likelier that the target's own
logits reverse the order. How sharp that softmax is, is a number for each draft depth.

Axes: B rows, C candidates, M nodes verified (the pending token is node 0), d depth, k top-k, V
vocabulary. Nodes and candidates are ordered by depth, so parents come first.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

WORST = -1e9
"""Log-probability of what a broken drafter scores with NaN."""


@struct.dataclass
class Tree:
    """What is verified in a round, the pending token included."""

    tokens: jax.Array  # [B, M] int32
    parents: jax.Array  # [B, M] int32, nodes; the pending token is its own parent
    depths: jax.Array  # [B, M] int32, 0 for the pending token
    log_probs: jax.Array  # [B, M] float32, estimated, of acceptance once the parent is accepted
    mask: jax.Array  # [B, M, M] bool, true where a node meets itself or an ancestor


@struct.dataclass
class Candidates:
    """Nodes of one or more levels that may be verified."""

    tokens: jax.Array  # [B, C] int32
    parents: jax.Array  # [B, C] int32, candidates; -1 is the pending token
    log_probs: jax.Array  # [B, C] float32, estimated, of acceptance once the parent is accepted
    scores: jax.Array  # [B, C] float32, the same summed over the path


def children(
    noisy: jax.Array, sharpness: jax.Array, parents: jax.Array, scores: jax.Array, *, top_k: int
) -> Candidates:
    """The best `top_k` children of n nodes, [B, n * top_k] candidates.

    Args:
      noisy: logits plus noise of each node's next token, [B, n, V].
      sharpness: [] float32, factor of the noisy logits in the estimate.
      parents: candidate index of each node, [B, n] int32.
      scores: score of each node, [B, n] float32.
      top_k: children of each node.
    """
    if top_k == 1:
        tokens = jnp.argmax(noisy, axis=-1, keepdims=True).astype(jnp.int32)
    else:
        tokens = jax.lax.top_k(noisy, top_k)[1].astype(jnp.int32)
    estimate = jax.nn.log_softmax(sharpness * noisy, axis=-1)
    log_probs = jnp.take_along_axis(estimate, tokens, axis=-1)
    log_probs = jnp.where(jnp.isnan(log_probs), WORST, jnp.clip(log_probs, WORST, 0.0))

    def flat(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, log_probs.shape).reshape(x.shape[0], -1)

    return Candidates(
        tokens=flat(tokens),
        parents=flat(parents[..., None]),
        log_probs=flat(log_probs),
        scores=flat(scores[..., None] + log_probs),
    )


def no_candidates(pending: jax.Array) -> Candidates:
    """What plain decoding drafts for the pending tokens [B]."""
    none = jnp.zeros((pending.shape[0], 0), jnp.int32)
    return Candidates(
        tokens=none,
        parents=none,
        log_probs=none.astype(jnp.float32),
        scores=none.astype(jnp.float32),
    )


def best(scores: jax.Array, count: int) -> jax.Array:
    """Indices of the `count` greatest of [B, C] scores, rising: [B, count] int32."""
    return jnp.sort(jax.lax.top_k(scores, count)[1], axis=1).astype(jnp.int32)


def take(values: jax.Array, indices: jax.Array) -> jax.Array:
    """Entries of [B, n, ...] at `indices` [B, m]: [B, m, ...]."""
    indices = indices.reshape(indices.shape + (1,) * (values.ndim - 2))
    return jnp.take_along_axis(values, indices, axis=1)


def join(levels: list[Candidates]) -> Candidates:
    """All levels as one."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *levels)


def prune(pending: jax.Array, candidates: Candidates, *, depth: int, verify_tokens: int) -> Tree:
    """The tree of the pending token and the best candidates.

    Args:
      pending: [B] int32, token of node 0.
      candidates: all levels, joined.
      depth: greatest depth of a candidate.
      verify_tokens: M.
    """
    if verify_tokens - 1 < candidates.tokens.shape[1]:
        candidates = _keep(candidates, best(candidates.scores, verify_tokens - 1))
    parents = jnp.pad(candidates.parents + 1, [(0, 0), (1, 0)])
    depths, mask = _ancestry(parents, depth)
    return Tree(
        tokens=jnp.concatenate([pending[:, None], candidates.tokens], axis=1),
        parents=parents,
        depths=depths,
        log_probs=jnp.pad(candidates.log_probs, [(0, 0), (1, 0)]),
        mask=mask,
    )


def _keep(candidates: Candidates, kept: jax.Array) -> Candidates:
    """The candidates numbered `kept` [B, n], rising; their parents must be among them."""
    found: Candidates = jax.tree.map(lambda x: take(x, kept), candidates)
    # A parent's number is now how many kept candidates come before it.
    before = jnp.sum(kept[:, None, :] < found.parents[:, :, None], axis=2, dtype=jnp.int32)
    return dataclasses.replace(found, parents=jnp.where(found.parents < 0, -1, before))


def _ancestry(parents: jax.Array, depth: int) -> tuple[jax.Array, jax.Array]:
    """Depths [B, M] and mask [B, M, M] of nodes with these parents."""
    own = jnp.eye(parents.shape[1], dtype=bool)[None]
    mask = jnp.broadcast_to(own, (*parents.shape, parents.shape[1]))
    for _ in range(depth):
        mask = own | take(mask, parents)
    return jnp.sum(mask, axis=2, dtype=jnp.int32) - 1, mask


def accepted_in_chain(tokens: jax.Array, taken: jax.Array) -> jax.Array:
    """Accepted drafts of a chain, [B] int32; arguments as of `accepted_nodes`."""
    matches = (tokens[:, 1:] == taken[:, :-1]).astype(jnp.int32)
    return jnp.sum(jnp.cumprod(matches, axis=1), axis=1)


def accepted_nodes(tree: Tree, taken: jax.Array) -> jax.Array:
    """Which nodes are the target's tokens, their ancestors too: [B, M] bool.

    `taken` [B, M] is what the target takes after each node. Siblings differ, so of each depth at
    most one node is accepted.
    """
    matches = tree.tokens == take(taken, tree.parents)
    matches = matches.at[:, 0].set(True)
    return jnp.all(~tree.mask | matches[:, None, :], axis=2)


def accepted_path(tree: Tree, accepted: jax.Array, *, depth: int) -> tuple[jax.Array, jax.Array]:
    """The accepted drafts' number [B] int32, and the nodes of their path, [B, d + 1] int32.

    Beyond the last accepted node the path holds node 0.
    """
    at_depth = tree.depths[:, None, :] == jnp.arange(depth + 1)[:, None]  # [B, d + 1, M]
    path = jnp.argmax(accepted[:, None, :] & at_depth, axis=2).astype(jnp.int32)
    return jnp.max(jnp.where(accepted, tree.depths, 0), axis=1), path


def expected_acceptance(tree: Tree, accepted: jax.Array, *, depth: int) -> jax.Array:
    """Estimated probability that a draft of depth 1 .. d is accepted, [B, d] float32.

    That is the sum over the verified children of the accepted node before, and 0 where there is no
    such node; to be compared with what was accepted.
    """
    chance = jnp.where(take(accepted, tree.parents), jnp.exp(tree.log_probs), 0.0)
    at_depth = tree.depths[:, None, :] == jnp.arange(1, depth + 1)[:, None]
    return jnp.sum(jnp.where(at_depth, chance[:, None, :], 0.0), axis=2)
