"""The n-gram drafter: by hand, against plain loops, and its library of finished texts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import ngram
from tlt_jax.ngram import FLOOR, LONGEST, VOTE_BASE, VOTES, Texts
from tlt_jax.types import INVALID

VOCAB = 7


def _texts(*rows, length=None):
    """Texts of one row each list, padded with a token that would match if it counted."""
    count = length or max(len(text) for texts in rows for text in texts)
    tokens = [[text + [3] * (count - len(text)) for text in texts] for texts in rows]
    return Texts(jnp.array(tokens), jnp.array([[len(text) for text in texts] for texts in rows]))


@functools.partial(jax.jit, static_argnames="extra")
def _shares(texts, further=None, *, extra=0):
    """Shares of the next token after the own text, and after `extra` further tokens [B, extra]."""
    matches = ngram.match(texts, texts.lengths[:, 0])
    for index in range(extra):
        matches = ngram.extend(matches, texts, further[:, index, None])
    return jnp.exp(ngram.log_shares(matches, texts, vocab_size=VOCAB))[:, 0] - FLOOR


def test_what_came_before_is_expected_again():
    """After 5 6 came 1, once; after 6 alone came 1 and 2."""
    shares = _shares(_texts([[5, 6, 1, 0, 6, 2, 5, 6]]))[0]
    votes = np.array([0, VOTE_BASE**2, VOTE_BASE, 0, 0, 0, 0])
    np.testing.assert_allclose(shares, votes / votes.sum(), atol=1e-6)


def test_a_text_that_says_nothing_has_no_votes():
    np.testing.assert_allclose(_shares(_texts([[1, 2, 4, 5]])), 0, atol=1e-6)


def test_other_texts_vote_too_and_end_where_they_end():
    """The second text has 4 after 1 2; after its end nothing counts, nor does padding."""
    shares = _shares(_texts([[1, 2], [0, 1, 2, 4, 1, 2], []]))[0]
    np.testing.assert_allclose(shares, np.eye(VOCAB)[4], atol=1e-6)


def _naive_shares(texts, lengths):
    """The same by plain loops: the last VOTES of the longest matches vote, own text first."""
    own, found = texts[0][: lengths[0]], []
    for number, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        for end in range(length - 1):
            match = 0
            while match < min(LONGEST, end + 1, len(own)) and text[end - match] == own[-1 - match]:
                match += 1
            if match:
                found.append((-match, number, -end, text[end + 1]))
    votes = np.zeros(VOCAB)
    for match, _, _, token in sorted(found)[:VOTES]:
        votes[token] += VOTE_BASE**-match
    return votes / max(votes.sum(), 1)


def test_against_plain_loops():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (20, 3, 40))
    lengths = rng.integers(LONGEST, 41, (20, 3))
    lengths[:5, 2] = 0
    got = _shares(Texts(jnp.array(tokens), jnp.array(lengths)))
    for row in range(20):
        np.testing.assert_allclose(got[row], _naive_shares(tokens[row], lengths[row]), atol=1e-5)


def test_a_further_node_is_matched_as_if_it_had_been_committed():
    """Extending matches by a guess gives the votes of the text with the guess at its end."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 3, (8, 2, 24))
    further = rng.integers(0, 3, (8, 2))
    lengths = np.full((8, 2), 20)
    guessed = _shares(Texts(jnp.array(tokens), jnp.array(lengths)), jnp.array(further), extra=2)
    for row in range(8):
        text = [*tokens[row, 0, :20], *further[row]]
        wanted = np.zeros(VOCAB)
        found = []
        for number, known in enumerate((tokens[row, 0, :20], tokens[row, 1, :20])):
            for end in range(19):
                match = 0
                while match < min(LONGEST, end + 1) and known[end - match] == text[-1 - match]:
                    match += 1
                if match:
                    found.append((-match, number, -end, known[end + 1]))
        for match, _, _, token in sorted(found)[:VOTES]:
            wanted[token] += VOTE_BASE**-match
        np.testing.assert_allclose(guessed[row], wanted / max(wanted.sum(), 1), atol=1e-5)


def test_what_lies_behind_a_text_changes_nothing():
    rng = np.random.default_rng(2)
    tokens, other = rng.integers(0, 3, (2, 6, 2, 24))
    lengths = jnp.full((6, 2), 15)
    other[:, :, :15] = tokens[:, :, :15]
    np.testing.assert_array_equal(
        _shares(Texts(jnp.array(tokens), lengths)), _shares(Texts(jnp.array(other), lengths))
    )


def _add(library, texts, prompt_ids, wanted):
    width = max(map(len, texts))
    tokens = jnp.array([text + [9] * (width - len(text)) for text in texts])
    lengths = jnp.array([len(text) for text in texts])
    return ngram.add(library, tokens, lengths, jnp.array(prompt_ids), jnp.array(wanted))


def _found(library, prompt_id, count=2, others=()):
    """Texts for a row that answers `prompt_id`, beside `others`: (text, prompt, live) each."""
    rows = [([7], prompt_id, True), *others]
    width = max(len(text) for text, _, _ in rows)
    texts = ngram.references(
        library,
        jnp.array([text + [9] * (width - len(text)) for text, _, _ in rows]),
        jnp.array([len(text) for text, _, _ in rows]),
        jnp.array([prompt for _, prompt, _ in rows]),
        jnp.array([live for _, _, live in rows]),
        count=count,
    )
    pairs = zip(texts.tokens[0].tolist(), texts.lengths[0].tolist(), strict=True)
    return [tokens[:length] for tokens, length in pairs if length]


def test_the_library_gives_the_newest_texts_of_a_prompt():
    library = ngram.empty_library(3, 4)
    assert _found(library, 5) == [] and _found(library, INVALID) == []
    library = _add(library, [[1], [2, 2], [3]], [5, 5, 6], [True, True, False])
    assert _found(library, 5) == [[2, 2], [1]] and _found(library, 6) == []
    library = _add(library, [[4, 4, 4], [5]], [6, 5], [True, True])  # the oldest gives way
    assert _found(library, 5) == [[5], [2, 2]] and _found(library, 6) == [[4, 4, 4]]
    assert _found(library, 5, count=1) == [[5]]


def test_siblings_still_being_written_come_after_finished_ones():
    """The longest first; not the row itself, nor ended rows, nor other prompts."""
    others = [
        ([1, 1], 5, True),
        ([2, 2, 2], 5, True),
        ([3, 3], 6, True),
        ([4, 4], 5, False),
        ([6, 6], INVALID, True),
    ]
    library = ngram.empty_library(3, 4)
    assert _found(library, 5, count=4, others=others) == [[2, 2, 2], [1, 1]]
    assert _found(library, INVALID, count=4, others=others) == []
    library = _add(library, [[4, 4], [8]], [5, 6], [True, True])
    assert _found(library, 5, count=4, others=others) == [[4, 4], [2, 2, 2], [1, 1]]
    assert _found(library, 5, count=2, others=others) == [[4, 4], [2, 2, 2]]


@pytest.mark.parametrize("width", [2, 6])
def test_the_library_holds_texts_of_any_bucket(width):
    """Shorter and longer arrays than its own; the text itself must fit."""
    library = ngram.empty_library(2, 4)
    library = ngram.add(
        library, jnp.ones((1, width), int), jnp.array([2]), jnp.array([5]), jnp.array([True])
    )
    assert _found(library, 5) == [[1, 1]]
