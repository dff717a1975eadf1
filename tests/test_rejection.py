"""Rejection verification as a distribution: enumerated for a small vocabulary, tested for a larger.

Each check is also made of versions that are wrong in the ways such code is wrong in practice, and
has to notice.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy_engine
from toy_engine import NEVER, SHAPE

from tlt_jax import drafter, ngram, policy, rejection, sampling, trees
from tlt_jax.drafting import Models
from tlt_jax.rejection import Draws, Proposal
from tlt_jax.speculation import (
    RolloutState,
    Sampler,
    refresh_draft_cache,
    run_round,
    run_rounds,
    zero_stats,
)
from tlt_jax.types import Strategy

TRIALS = 60_000
LIKELY = 1e-3
"""A right distribution falls below it in one of a thousand seeds, a wrong one always."""


def _p_value(counts, expected):
    """Of Pearson's test; what is expected less than five times is counted together."""
    rare = expected < 5
    counts, expected = (
        np.append(x[~rare], x[rare].sum()) for x in (np.asarray(counts, float), expected)
    )
    kept = expected > 0
    assert not counts[~kept].any()
    return scipy.stats.chisquare(
        counts[kept], expected[kept] * counts.sum() / expected.sum()
    ).pvalue


# A language of four words: p of the first token, of the second after each first, of the third.

WORDS = 4


def _language(seed, sharpness):
    rng = np.random.default_rng(seed)
    shapes = (WORDS,), (WORDS,) * 2, (WORDS,) * 3
    return [jax.nn.softmax(sharpness * jnp.array(rng.standard_normal(s))) for s in shapes]


TARGET, DRAFT = _language(0, 1.5), _language(1, 1.5)


@functools.partial(jax.jit, static_argnames=("top_k", "shared"))
def _sentences(key, *, top_k, shared):
    """Three tokens a trial: a tree of depth 2 is verified, and what it leaves open is drawn.

    With `shared` noise the last token is drawn with that of the drafts.
    """
    keys = jax.random.split(key, 4)
    draft_noise = jax.random.gumbel(keys[0], (TRIALS, 3, WORDS))
    noise = draft_noise if shared else jax.random.gumbel(keys[1], (TRIALS, 3, WORDS))
    uniforms = jax.random.uniform(keys[2], (TRIALS, 2, top_k))
    first = DRAFT[0][None, None]
    root = jnp.full((TRIALS, 1), -1, jnp.int32)
    zeros = jnp.zeros((TRIALS, top_k))

    def children(probs, level, parents):
        noisy = jnp.log(probs) + draft_noise[:, None, level]
        scores = zeros[:, : parents.shape[1]]
        return trees.children(noisy, jnp.float32(1), parents, scores, top_k=top_k)

    one = children(jnp.broadcast_to(first, (TRIALS, 1, WORDS)), 0, root)
    numbers = jnp.broadcast_to(jnp.arange(top_k, dtype=jnp.int32), (TRIALS, top_k))
    second = DRAFT[1][one.tokens]
    two = children(second, 1, numbers)
    tree = trees.prune(
        jnp.zeros(TRIALS, jnp.int32),
        trees.join([one, two]),
        depth=2,
        verify_tokens=1 + top_k + top_k**2,
    )
    grandparents = jnp.repeat(one.tokens, top_k, axis=1)
    probs = jnp.concatenate(
        [
            jnp.broadcast_to(TARGET[0], (TRIALS, 1, WORDS)),
            TARGET[1][one.tokens],
            TARGET[2][grandparents, two.tokens],
        ],
        axis=1,
    )
    proposals = [Proposal(root + 1, jnp.broadcast_to(first, (TRIALS, 1, WORDS)))]
    proposals.append(Proposal(numbers + 1, second))
    walk = rejection.walk(tree, proposals, probs, Draws(uniforms, noise))
    rest = jax.random.gumbel(keys[3], (TRIALS, 2, WORDS))
    x1 = walk.taken[:, 0]
    x2 = jnp.where(
        walk.accepted >= 1, walk.taken[:, 1], rejection.sample(TARGET[1][x1], rest[:, 0])
    )
    drawn = rejection.sample(TARGET[2][x1, x2], rest[:, 1])
    x3 = jnp.where(walk.accepted >= 2, walk.taken[:, 2], drawn)
    return (x1 * WORDS + x2) * WORDS + x3, walk.accepted


def _language_p_value(*, top_k, shared=False, seed=0):
    sentences, accepted = _sentences(jax.random.key(seed), top_k=top_k, shared=shared)
    assert len(set(accepted.tolist())) == 3  # none, one and two drafts are accepted
    joint = TARGET[0][:, None, None] * TARGET[1][:, :, None] * TARGET[2]
    counts = np.bincount(np.asarray(sentences), minlength=WORDS**3)
    return _p_value(counts, TRIALS * np.asarray(joint, float).ravel())


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_sentences_of_a_small_language_are_as_likely_as_they_should_be(top_k):
    assert _language_p_value(top_k=top_k) > LIKELY


@pytest.mark.parametrize("top_k", [1, 2])
def test_without_the_residual_it_is_noticed(top_k, monkeypatch):
    monkeypatch.setattr(rejection, "residual", lambda probs, draft: probs)
    _sentences.clear_cache()
    assert _language_p_value(top_k=top_k) < 1e-9
    monkeypatch.undo()
    _sentences.clear_cache()


@pytest.mark.parametrize("top_k", [1, 2])
def test_noise_shared_with_the_drafts_is_noticed(top_k):
    assert _language_p_value(top_k=top_k, shared=True) < 1e-9


def test_siblings_drawn_as_if_with_replacement_are_noticed(monkeypatch):
    """Where the drafter's distribution is not left without a rejected sibling."""
    monkeypatch.setattr(rejection, "without", lambda draft, token: draft)
    _sentences.clear_cache()
    assert _language_p_value(top_k=2) < 1e-9
    monkeypatch.undo()
    _sentences.clear_cache()


def test_a_second_guess_is_worth_something():
    """With two children a node more drafts are accepted than with one, with three still more."""
    accepted = [
        float(jnp.mean(_sentences(jax.random.key(5), top_k=k, shared=False)[1])) for k in (1, 2, 3)
    ]
    assert accepted[0] + 0.3 < accepted[1] < accepted[2] - 0.05


# The same in whole rounds of a policy of 32 words, whose first two tokens are looked at.

ROWS, LENGTH, DEPTH = 4096, 24, 2
PROMPT = toy_engine.prompts(1)[0]


@functools.partial(jax.jit, static_argnames="strategy")
def _two_tokens(models, sampler, strategy):
    """The first two tokens of every row, and the statistics of the rounds."""
    texts = ngram.Texts(jnp.zeros((ROWS, 1, LENGTH), jnp.int32), jnp.zeros((ROWS, 1), jnp.int32))
    models = dataclasses.replace(models, texts=texts if strategy.ngram else None)
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32).at[:, : len(PROMPT)].set(PROMPT)
    start = jnp.zeros((ROWS,), jnp.int32)
    cache = policy.empty_cache(SHAPE, ROWS, LENGTH)
    features, _, cache = policy.decode(models.target, SHAPE, tokens, cache, start)
    state = RolloutState(
        tokens=tokens,
        log_probs=jnp.zeros((ROWS, LENGTH)),
        cache=cache,
        features=features,
        draft_cache=drafter.empty_cache(SHAPE, ROWS, LENGTH),
        length=start + len(PROMPT),
        draft_length=start - LENGTH,
        limit=start + len(PROMPT) + 2,
        live=start == 0,
        stored=start != 0,
        sequence_ids=jnp.arange(ROWS, dtype=jnp.int32),
        prompt_ids=start,
    )
    state = refresh_draft_cache(models, SHAPE, strategy, state)
    sharpness, stats = jnp.ones(DEPTH), zero_stats(strategy)
    step = functools.partial(run_round, models, SHAPE, strategy, sampler, sharpness)
    state, stats = run_rounds(step, state, stats, jnp.int32(2))
    end = len(PROMPT) + 2
    return state.tokens[:, len(PROMPT) : end], state.log_probs[:, len(PROMPT) : end], stats


def _exact(params, sampler):
    """p of the first token [V], and of the second after each first [V, V]."""
    size = SHAPE.vocab_size
    after = np.tile(np.append(PROMPT, 0), (size, 1))
    after[:, -1] = np.arange(size)
    positions = jnp.broadcast_to(jnp.arange(after.shape[1]), after.shape)
    hidden, _ = policy.packed_forward(
        params, SHAPE, jnp.array(after), positions, jnp.zeros_like(positions)
    )
    probs = sampling.probs(sampling.process_logits(policy.logits(params, hidden), sampler), sampler)
    return np.asarray(probs[0, -2], float), np.asarray(probs[:, -1], float)


SETTINGS = {"plainly sampled": (1.0, 0, 1.0, False), "filtered": (0.7, 6, 0.9, True)}


@pytest.mark.parametrize(
    ("strategy", "setting"),
    [
        ("plain", "filtered"),
        ("chain-2", "plainly sampled"),
        ("tree-2-2-7", "filtered"),
        ("tree-2-2-7", "plainly sampled"),
        ("ngram-2", "plainly sampled"),
    ],
)
def test_tokens_of_a_policy_are_as_likely_as_they_should_be(strategy, setting):
    temperature, top_k, top_p, filtered = SETTINGS[setting]
    params = sampling.make_params(temperature, top_k, top_p, filtered=filtered, rejection=True)
    sampler = Sampler(key=jax.random.key(2), params=params, stop_tokens=jnp.array([NEVER]))
    target = toy_engine.random_policy()
    models = Models(target=target, draft=toy_engine.random_drafter())
    tokens, log_probs, stats = jax.device_get(
        _two_tokens(models, sampler, Strategy.parse(strategy))
    )
    first, second = _exact(target, params)
    assert _p_value(np.bincount(tokens[:, 0], minlength=len(first)), ROWS * first) > LIKELY
    pairs = np.bincount(tokens[:, 0] * len(first) + tokens[:, 1], minlength=len(first) ** 2)
    assert _p_value(pairs, ROWS * (first[:, None] * second).ravel()) > LIKELY
    np.testing.assert_allclose(log_probs[:, 0], np.log(first[tokens[:, 0]]), atol=1e-4)
    wanted = np.log(second[tokens[:, 0], tokens[:, 1]])
    np.testing.assert_allclose(log_probs[:, 1], wanted, atol=1e-4)
    if strategy != "plain":
        assert 0.02 * ROWS < stats.accepted[0] < 0.98 * ROWS
