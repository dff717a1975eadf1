"""Promise 1: tokens depend on target, prompt and key alone; near-ties are the one exception."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_engine

from tlt_jax.sampling import position_noise


def _check(programs, draft):
    """The rollout has the wanted tokens; returns its records."""
    params = toy_engine.random_policy()
    seed, asked, wanted = toy_engine.tailed()
    result = toy_engine.roll(programs, (params, draft), asked, seed=seed)
    got = toy_engine.tokens_of(result)
    assert not toy_engine.unexplained(got, wanted, params, programs.rollout, seed=seed)
    exact = sum(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert exact >= 6, "near-ties are rare: two of eight sequences are too many"
    return result.chunks


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "main",
        "one slice",
        "four slices",
        "tensor",
        "plain, then chains",
        "trees",
        "tree on tensor",
        "ngram",
        "ngram chain",
        "queue",
        "plain queue",
        "ngram queue on tensor",
        "fused",
    ],
)
def test_strategies_and_meshes_give_the_same_tokens(name):
    """Plain decoding, chains, trees, several in turn; meshes; fewer slots than sequences."""
    strategies = {
        "plain": {"plain"},
        "main": {"chain-2", "chain-4"},
        "one slice": {"chain-2"},
        "four slices": {"chain-4"},
        "tensor": {"chain-2"},
        "plain, then chains": {"plain", "chain-4"},
        "trees": {"tree-3-2-6", "tree-2-3-13"},
        "tree on tensor": {"tree-3-2-5"},
        "ngram": {"ngram-3-2-6", "chain-4"},
        "ngram chain": {"ngram-4"},
        "queue": {"chain-2"},
        "plain queue": {"plain"},
        "ngram queue on tensor": {"ngram-3-2-6"},
        "fused": {"chain-2"},
    }
    programs, draft = toy_engine.engine(name), toy_engine.random_drafter()
    chunks = _check(programs, toy_engine.fused(draft) if name == "fused" else draft)
    assert {record.strategy for record in chunks} == strategies[name]
    assert len(chunks[0].live) == programs.slices


@pytest.mark.parametrize("chunk_tokens", [5, 8, 31])
def test_the_length_of_a_chunk_changes_no_token(chunk_tokens):
    chunks = _check(
        toy_engine.engine("main").having(chunk_tokens=chunk_tokens), toy_engine.random_drafter()
    )
    assert max(record.rounds for record in chunks) <= chunk_tokens // 3


def test_switching_strategies_within_a_rollout_changes_no_token():
    """Plain decoding and both drafters in turn on the same rows: nothing is prefilled anew."""
    programs = toy_engine.engine("bandit").having(epsilon=1.0, chunk_tokens=5)
    chunks = _check(programs, toy_engine.random_drafter())
    assert {record.strategy for record in chunks} == {"plain", "ngram-3", "chain-4"}
    switches = sum(a.strategy != b.strategy for a, b in itertools.pairwise(chunks))
    assert switches >= 6 and {record.chosen for record in chunks} == {"explored"}


@pytest.mark.parametrize("name", ["main", "trees"])
def test_drafters_change_no_token_but_the_work(name):
    """Of another seed, of another policy, of huge numbers, of NaN."""
    drafters = [
        toy_engine.random_drafter(),
        toy_engine.random_drafter(seed=7),
        toy_engine.mirrored()[1],
        jax.tree.map(lambda x: 1e4 * x, toy_engine.random_drafter()),
        jax.tree.map(lambda x: jnp.nan * x, toy_engine.random_drafter()),
    ]
    work = [_check(toy_engine.engine(name), draft) for draft in drafters]
    rounds = [sum(sum(record.row_rounds) for record in chunks) for chunks in work]
    accepted = [sum(record.accepted[0] for record in chunks) for chunks in work]
    assert len(set(zip(rounds, accepted, strict=True))) >= 4


def test_another_policy_gives_other_tokens():
    """What stays the same under another drafter would say little if it never changed."""
    other = toy_engine.random_policy(seed=5)
    models = other, toy_engine.random_drafter()
    seed, asked, wanted = toy_engine.tailed()
    result = toy_engine.roll(toy_engine.engine("main"), models, asked, seed=seed)
    got = toy_engine.tokens_of(result)
    assert all(not np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize(
    "name", ["main", "plain, then chains", "four slices", "tensor", "trees", "ngram", "queue"]
)
def test_a_drafter_that_equals_the_target_is_never_wrong(name):
    """Every draft is accepted: after growth, compaction, a change of depth, after plain chunks and
    those of the other drafter.

    The drafter must not learn, or it would no longer be equal.
    """
    programs = toy_engine.engine(name)
    seed, asked, _ = toy_engine.tailed("mirrored")
    models = toy_engine.mirrored()
    result = toy_engine.roll(programs, models, asked, seed=seed, learn=False)
    assert {record.strategy for record in result.chunks} == set(programs.rollout.strategies)
    # Plain decoding drafts nothing, the n-gram drafter knows less, the small tree leaves nodes out.
    others = ("plain", "ngram-3-2-6", "tree-3-2-6")
    whole = [record for record in result.chunks if record.strategy not in others]
    assert whole
    for record in whole:
        assert record.accepted == [sum(record.row_rounds)] * len(record.accepted)


def _ranked(settings, tokens, first, sequence, seed):
    """Tokens by falling noisy logit after a prefix."""
    sampler = toy_engine.sampling_params(settings)
    padded = np.zeros((1, settings.length_buckets[-1]), np.int32)
    padded[0, :first] = tokens[:first]
    key, lengths = jax.random.key(seed), np.array([first])
    processed, _ = toy_engine._next(toy_engine.random_policy(), padded, lengths, key, sampler)
    ids = jnp.array([sequence])
    noise = position_noise(key, ids, lengths, count=1, vocab_size=processed.shape[1])
    noisy = np.asarray(processed + sampler.temperature * noise[:, 0])[0]
    return np.argsort(-noisy)


def test_a_wrong_token_is_never_explained():
    """Not even by the second best token, if it is far behind; nor by another end."""
    settings, params = toy_engine.ROLLOUT, toy_engine.random_policy()
    seed, _, wanted = toy_engine.tailed()
    longest = sorted(range(8), key=lambda sequence: -len(wanted[sequence]))[:3]
    for sequence, place in itertools.product(longest, (-1, -2)):
        first = len(wanted[sequence]) + place
        best = _ranked(settings, wanted[sequence], first, sequence, seed)
        assert best[0] == wanted[sequence][place]
        for wrong in (best[1], best[-1]):
            got = [tokens.copy() for tokens in wanted]
            got[sequence][place] = wrong
            found = toy_engine.unexplained(got, wanted, params, settings, seed=seed)
            assert found == [sequence]
    got = [*wanted[:6], wanted[6][:-1], wanted[7]]
    assert toy_engine.unexplained(got, wanted, params, settings, seed=seed) == [6]


def test_a_near_tie_is_explained():
    """Two tokens with nearly one logit, at temperature 0: either may win, no third one."""
    head = toy_engine.random_policy()["head"]
    params = toy_engine.random_policy() | {"head": jnp.zeros_like(head).at[:, 3:5].set(head[:, :1])}
    settings = toy_engine.engine("plain").having(temperature=0.0).rollout
    prompt = toy_engine.prompts(1)[0]
    got, wanted, third = ([np.append(prompt, token)] for token in (3, 4, 5))
    positive = toy_engine.unexplained(got, wanted, params, settings) == []
    flipped = params | {"head": -params["head"]}
    # With the opposite sign the two are the worst of all, and nothing is explained.
    assert positive != (toy_engine.unexplained(got, wanted, flipped, settings) == [])
    assert toy_engine.unexplained(got, third, params, settings) == [0]
    assert toy_engine.unexplained(got, third, flipped, settings) == [0]
