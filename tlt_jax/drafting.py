"""Grows the draft tree of a round, level by level, with either drafter.

A row with n committed tokens x[0] .. x[n - 1] gets candidates for x[n] from what the drafter knows
at the pending token x[n - 1]; each further level comes from the best nodes of the level before.
What a drafter knows at a node, it finds from what it knew at the node's parent, and its token:

- the trained drafter an estimate of the target's feature. The row has target features of tokens
  0 .. n - 2; the drafter first catches up on the pairs that became known in the last round. Then it
  feeds each node with its parent's estimate, seeing the committed pairs and the node's ancestors;
- the n-gram drafter how far each position of the row's texts matches (`ngram`).

Axes as in `trees`, and S cache length, D width.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from tlt_jax import drafter, kv_cache, ngram, policy, sampling, trees
from tlt_jax.config import PolicyConfig
from tlt_jax.kv_cache import LayerCache
from tlt_jax.rejection import Proposal
from tlt_jax.trees import Candidates, Tree
from tlt_jax.types import SamplingParams, Strategy


@struct.dataclass
class Models:
    """What a round reads besides its rows."""

    target: Any
    draft: Any  # None when no trained drafter takes part
    texts: ngram.Texts | None = None  # other texts of each row, where the n-gram drafter takes part


@struct.dataclass
class DraftInputs:
    """What the drafters know of the rows."""

    tokens: jax.Array  # [B, S] int32
    features: jax.Array | None  # [B, S, F], target features of tokens 0 .. length - 2
    cache: LayerCache | None  # the trained drafter's
    cached: jax.Array  # [B] int32, pairs in `cache` that come from true features
    length: jax.Array  # [B] int32, committed tokens


@struct.dataclass
class Drafted:
    """What a round has drafted."""

    tree: Tree  # to verify; node 0 is the pending token
    cache: LayerCache | None  # the trained drafter's, written
    proposals: tuple[Proposal, ...]  # one for each depth, for rejection sampling; else empty


@struct.dataclass
class Level:
    """Nodes whose children come next; n = 1, then top-k."""

    tokens: jax.Array  # [B, n] int32
    known: jax.Array  # [B, n, ...], what the drafter knows at each node
    candidates: jax.Array  # [B, n] int32, its number among the candidates; -1 is the pending token
    scores: jax.Array  # [B, n] float32
    ancestors: jax.Array  # [B, n, nodes fed so far] bool, itself included


class Drafter(Protocol):
    """How a drafter takes part in growing a tree."""

    def begin(self) -> tuple[jax.Array, LayerCache | None]:
        """What it knows at the pending token, [B, 1, ...], and its cache."""

    def feed(
        self, nodes: Level, cache: LayerCache | None, depth: int
    ) -> tuple[jax.Array, LayerCache | None]:
        """What it knows at nodes of this depth that hold what is known at their parents."""

    def logits(self, known: jax.Array) -> jax.Array:
        """Logits of a node's next token on the target's scale, [B, n, V]."""


def draft_tree(
    models: Models,
    config: PolicyConfig,
    strategy: Strategy,
    params: SamplingParams,
    sharpness: jax.Array,
    noise: jax.Array,
    inputs: DraftInputs,
) -> Drafted:
    """Guesses what the target will take in the next `strategy.depth` positions.

    Args:
      models: target and drafter.
      config: the policy's shape.
      strategy: drafter, depth, top-k and verify tokens; not plain.
      params: sampling parameters; the drafter samples as the target will.
      sharpness: factor of noisy logits in the estimated acceptance at each depth, [d] float32.
      noise: [B, d, V], for positions `length + 0 .. d - 1`: the target's own, or for rejection
        sampling of another source.
      inputs: the rows.
    """
    drafter_ = _drafter(models, config, strategy, params, inputs)
    known, cache = drafter_.begin()
    batch = known.shape[0]
    pending = trees.take(inputs.tokens, inputs.length[:, None] - 1)
    level = Level(
        tokens=pending,
        known=known,
        candidates=jnp.full((batch, 1), -1, jnp.int32),
        scores=jnp.zeros((batch, 1), jnp.float32),
        ancestors=jnp.zeros((batch, 1, 0), bool),
    )
    levels: list[Candidates] = []
    proposals: list[Proposal] = []
    for depth in range(1, strategy.depth + 1):
        if depth > 1:
            level = _best_nodes(levels, level, strategy.top_k)
            known, cache = drafter_.feed(level, cache, depth - 1)
            level = dataclasses.replace(level, known=known)
        logits = drafter_.logits(level.known)
        if params.rejection:  # nodes of a whole tree are its candidates, after the pending token
            proposals.append(Proposal(level.candidates + 1, sampling.probs(logits, params)))
        noisy = sampling.noisy(logits, noise[:, depth - 1, None], params)
        levels.append(
            trees.children(
                noisy, sharpness[depth - 1], level.candidates, level.scores, top_k=strategy.top_k
            )
        )
    candidates = trees.join(levels)
    tree = trees.prune(
        pending[:, 0], candidates, depth=strategy.depth, verify_tokens=strategy.verify_tokens
    )
    return Drafted(tree, cache, tuple(proposals))


def _best_nodes(levels: list[Candidates], above: Level, top_k: int) -> Level:
    """The best `top_k` of the last level, with what is known at their parents, `above`."""
    found, before = levels[-1], sum(level.tokens.shape[1] for level in levels[:-1])
    own = jnp.broadcast_to(jnp.eye(top_k, dtype=bool), (found.tokens.shape[0], top_k, top_k))
    if found.tokens.shape[1] == top_k:  # children of one node, all of them
        return Level(
            tokens=found.tokens,
            known=jnp.repeat(above.known, top_k, axis=1),
            candidates=jnp.broadcast_to(before + jnp.arange(top_k), found.tokens.shape),
            scores=found.scores,
            ancestors=jnp.concatenate([jnp.repeat(above.ancestors, top_k, axis=1), own], axis=2),
        )
    chosen = trees.best(found.scores, top_k)
    parents = chosen // top_k  # children lie together, parent by parent
    return Level(
        tokens=trees.take(found.tokens, chosen),
        known=trees.take(above.known, parents),
        candidates=before + chosen,
        scores=trees.take(found.scores, chosen),
        ancestors=jnp.concatenate([trees.take(above.ancestors, parents), own], axis=2),
    )


def _drafter(
    models: Models,
    config: PolicyConfig,
    strategy: Strategy,
    params: SamplingParams,
    inputs: DraftInputs,
) -> Drafter:
    if strategy.ngram:
        assert models.texts is not None, "no texts for the n-gram drafter"
        texts = ngram.with_own(inputs.tokens, inputs.length, models.texts)
        return _Ngram(texts, inputs.length, params, config.vocab_size)
    return _Trained(models, config, strategy, params, inputs)


@dataclasses.dataclass(frozen=True)
class _Trained:
    """The drafter that was trained on the target's features."""

    models: Models
    config: PolicyConfig
    strategy: Strategy
    params: SamplingParams
    inputs: DraftInputs

    def begin(self) -> tuple[jax.Array, LayerCache | None]:
        """Feeds the pairs of the last round, at most as many as a round commits."""
        inputs, count = self.inputs, self.strategy.most_committed
        assert inputs.features is not None
        start = inputs.cached
        features = kv_cache.take_rows(inputs.features, start, count)
        estimates, cache = self._decode(
            drafter.read(self.models.draft, self.config, features),
            kv_cache.take_rows(inputs.tokens, start + 1, count),
            inputs.cache,
            start,
        )
        newest = jnp.clip(inputs.length - 2 - start, 0, count - 1)
        return trees.take(estimates, newest[:, None]), cache

    def feed(
        self, nodes: Level, cache: LayerCache | None, depth: int
    ) -> tuple[jax.Array, LayerCache | None]:
        """Nodes take the cache's slots from the pending token's on, `top_k` a level."""
        return self._decode(
            nodes.known,
            nodes.tokens,
            cache,
            self.inputs.length - 1,
            # A node of a chain sees all before it.
            draft_mask=None if self.strategy.is_chain else nodes.ancestors,
            first_node=self.strategy.top_k * (depth - 1),
            depth=depth - 1,
        )

    def logits(self, known: jax.Array) -> jax.Array:
        return sampling.process_logits(policy.logits(self.models.target, known), self.params)

    def _decode(
        self,
        features: jax.Array,
        tokens: jax.Array,
        cache: LayerCache | None,
        starts: jax.Array,
        **placing: Any,
    ) -> tuple[jax.Array, LayerCache]:
        assert cache is not None
        following = policy.embed(self.models.target, tokens)
        draft = self.models.draft
        return drafter.decode(draft, self.config, features, following, cache, starts, **placing)


@dataclasses.dataclass(frozen=True)
class _Ngram:
    """The drafter that looks up what came next before; it has no cache."""

    texts: ngram.Texts
    length: jax.Array  # [B] int32
    params: SamplingParams
    vocab_size: int

    def begin(self) -> tuple[jax.Array, LayerCache | None]:
        return ngram.match(self.texts, self.length), None

    def feed(
        self, nodes: Level, cache: LayerCache | None, depth: int
    ) -> tuple[jax.Array, LayerCache | None]:
        return ngram.extend(nodes.known, self.texts, nodes.tokens), cache

    def logits(self, known: jax.Array) -> jax.Array:
        """The texts were sampled at this temperature, so shares are probabilities at it already."""
        shares = ngram.log_shares(known, self.texts, vocab_size=self.vocab_size)
        return sampling.unscaled(shares, self.params)
