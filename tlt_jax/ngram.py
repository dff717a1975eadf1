"""The model-free drafter: guesses from texts in which the same tokens came before.

A row's texts are its own and those of other responses to the same prompt: finished ones, and
those that other rows are still writing. A position of a text
*matches* a node as far as the tokens up to it equal the node's and those before it. What follows
the longest matches are votes for the node's next token, and the logarithm of their shares serves as
logits: under the target's own noise they are ranked as those of the trained drafter are, so this
drafter, too, guesses the *sample* (see `sampling`).

Axes: B rows, R texts of a row, S text length, n nodes, V vocabulary, N texts of the library.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tlt_jax.types import INVALID

LONGEST = 4
"""Longer matches count no more."""
VOTES = 32
"""Positions that vote: of the longest matches the last ones."""
VOTE_BASE = 8.0
"""A match longer by one token has so many times the votes."""
FLOOR = 1e-3
"""Share of a token that nobody votes for."""


@struct.dataclass
class Texts:
    """What each row's guesses are taken from, the row's own text first."""

    tokens: jax.Array  # [B, R, S] int32
    lengths: jax.Array  # [B, R] int32, 0 where there is no text


@struct.dataclass
class Library:
    """The last finished responses, prompts included: a frozen ring."""

    tokens: jax.Array  # [N, S] int32
    lengths: jax.Array  # [N] int32
    prompt_ids: jax.Array  # [N] int32, INVALID where empty
    added: jax.Array  # [] int32, texts ever added


def empty_library(texts: int, length: int) -> Library:
    """A library for `texts` texts of at most `length` tokens that holds none."""
    return Library(
        tokens=jnp.zeros((texts, length), jnp.int32),
        lengths=jnp.zeros((texts,), jnp.int32),
        prompt_ids=jnp.full((texts,), INVALID, jnp.int32),
        added=jnp.int32(0),
    )


def add(
    library: Library,
    tokens: jax.Array,
    lengths: jax.Array,
    prompt_ids: jax.Array,
    wanted: jax.Array,
) -> Library:
    """Adds the wanted ones of B texts, in place of the oldest.

    Args:
      library: the ring.
      tokens: [B, S'] int32; what lies beyond S is left out, if S' > S.
      lengths: [B] int32, at most S.
      prompt_ids: [B] int32, equal for responses to the same prompt.
      wanted: [B] bool, at most N of them.
    """
    capacity, length = library.tokens.shape
    before = jnp.cumsum(wanted, dtype=jnp.int32) - wanted
    places = jnp.where(wanted, (library.added + before) % capacity, capacity)  # beyond: dropped
    return Library(
        tokens=library.tokens.at[places].set(_fitted(tokens, length), mode="drop"),
        lengths=library.lengths.at[places].set(lengths, mode="drop"),
        prompt_ids=library.prompt_ids.at[places].set(prompt_ids, mode="drop"),
        added=library.added + jnp.sum(wanted, dtype=jnp.int32),
    )


def references(
    library: Library,
    tokens: jax.Array,
    lengths: jax.Array,
    prompt_ids: jax.Array,
    live: jax.Array,
    *,
    count: int,
) -> Texts:
    """For each of B rows up to `count` other texts that answer its prompt.

    First those of the library, the newest first; then what other live rows have so far, the longest
    first.

    Args:
      library: finished responses.
      tokens: [B, S'] int32, the rows' own texts.
      lengths: [B] int32, of these.
      prompt_ids: [B] int32, INVALID for rows without a prompt, which are given no texts.
      live: [B] bool, whether a row's text is not in the library yet.
      count: most texts of a row.
    """
    capacity, length = library.tokens.shape
    asked = prompt_ids[:, None]
    age = (library.added - 1 - jnp.arange(capacity, dtype=jnp.int32)) % capacity  # newest is 0
    finished = jnp.where(library.prompt_ids == asked, length + capacity - age, 0)
    others = live & (prompt_ids == asked) & ~jnp.eye(len(live), dtype=bool)
    rank = jnp.concatenate([finished, jnp.where(others, lengths, 0)], axis=1)
    rank, chosen = jax.lax.top_k(jnp.where(asked == INVALID, 0, rank), min(count, rank.shape[1]))
    texts = jnp.concatenate([library.tokens, _fitted(tokens, length)])
    held = jnp.concatenate([library.lengths, lengths])
    return Texts(tokens=texts[chosen], lengths=jnp.where(rank > 0, held[chosen], 0))


def _fitted(tokens: jax.Array, length: int) -> jax.Array:
    """Texts [B, S'] in arrays of `length`, cut or padded."""
    short = tokens[:, :length]
    return jnp.pad(short, [(0, 0), (0, length - short.shape[1])])


def with_own(own: jax.Array, length: jax.Array, others: Texts) -> Texts:
    """Each row's own text [B, S'] of `length` [B] tokens, then the others of S tokens."""
    longest = max(own.shape[1], others.tokens.shape[2])

    def widen(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, longest - x.shape[-1])])

    return Texts(
        tokens=jnp.concatenate([widen(own)[:, None], widen(others.tokens)], axis=1),
        lengths=jnp.concatenate([length[:, None], others.lengths], axis=1),
    )


def match(texts: Texts, length: jax.Array) -> jax.Array:
    """How far each position matches the end of the row's own text: [B, 1, R, S] int32."""
    positions = length[:, None] + jnp.arange(-LONGEST, 0)
    last = jnp.take_along_axis(texts.tokens[:, 0], jnp.maximum(positions, 0), axis=1)
    ends = jnp.where(positions >= 0, last, INVALID)  # which equals no token
    matches = jnp.zeros((texts.tokens.shape[0], 1, *texts.tokens.shape[1:]), jnp.int32)
    for index in range(LONGEST):
        matches = extend(matches, texts, ends[:, index, None])
    return matches


def extend(matches: jax.Array, texts: Texts, tokens: jax.Array) -> jax.Array:
    """Matches [B, n, R, S] of nodes with `tokens` [B, n], from those of their parents."""
    before = jnp.pad(matches[..., :-1], [(0, 0)] * 3 + [(1, 0)])
    equal = texts.tokens[:, None] == tokens[:, :, None, None]
    return jnp.where(equal, jnp.minimum(before + 1, LONGEST), 0)


def log_shares(matches: jax.Array, texts: Texts, *, vocab_size: int) -> jax.Array:
    """Logarithm of each token's share of the votes for coming next, [B, n, V] float32."""
    batch, nodes, count, length = matches.shape
    position = jnp.arange(length)
    known = position + 1 < texts.lengths[..., None]  # [B, R, S], whether the next token is there
    found = jnp.where(known[:, None], matches, 0)
    recent = (position + 1) / (length * count + 1) - jnp.arange(count)[:, None] / count
    ranked = jnp.where(found > 0, found + 0.5 * recent, -1.0).reshape(batch, nodes, -1)
    voters = jax.lax.top_k(ranked, min(VOTES, count * length))[1]  # [B, n, VOTES]
    following = jnp.roll(texts.tokens, -1, axis=2).reshape(batch, 1, -1)
    tokens = jnp.take_along_axis(jnp.broadcast_to(following, ranked.shape), voters, axis=2)
    lengths = jnp.take_along_axis(found.reshape(ranked.shape), voters, axis=2)
    votes = jnp.where(lengths > 0, VOTE_BASE ** lengths.astype(jnp.float32), 0.0)
    rows, node = jnp.arange(batch)[:, None, None], jnp.arange(nodes)[None, :, None]
    total = jnp.zeros((batch, nodes, vocab_size)).at[rows, node, tokens].add(votes)
    share = total / jnp.maximum(jnp.sum(total, axis=2, keepdims=True), 1.0)
    return jnp.log(share + FLOOR)
