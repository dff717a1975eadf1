"""One round by hand arithmetic, and what every round has to leave behind."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_engine
from toy_engine import NEVER, SHAPE, STOP

from tlt_jax import drafter, policy, sampling, trees
from tlt_jax.drafting import Models
from tlt_jax.speculation import (
    RolloutState,
    Sampler,
    count_committed,
    make_draft_cache,
    refresh_draft_cache,
    run_round,
    run_rounds,
    zero_stats,
)
from tlt_jax.types import Strategy

WIDTH, LENGTH = SHAPE.width, 64
DEPTH = 3


def _rows(length, limit, live=True):
    """Rows with lengths, limits and liveness alone."""
    fields = {field.name: None for field in dataclasses.fields(RolloutState)}
    fields |= {"length": jnp.array([length]), "limit": jnp.array([limit])}
    return RolloutState(**fields | {"live": jnp.array([live])})


def _chain(tokens):
    """The tree without branches of one row."""
    count = len(tokens)
    order = jnp.arange(count)
    return trees.Tree(
        tokens=jnp.array([tokens]),
        parents=jnp.maximum(order - 1, 0)[None],
        depths=order[None],
        log_probs=jnp.zeros((1, count)),
        mask=jnp.tril(jnp.ones((1, count, count), bool)),
    )


@pytest.mark.parametrize(
    ("drafts", "taken", "length", "limit", "committed", "live", "accepted"),
    [
        pytest.param([5, 6, 7], [5, 6, 7, 4], 10, 20, 4, True, 3, id="all and one more"),
        pytest.param([5, 6, 7], [1, 6, 7, 4], 10, 20, 1, True, 0, id="the target's own alone"),
        pytest.param([5, 6, 7], [5, 1, 7, 4], 10, 20, 2, True, 1, id="none after a wrong one"),
        pytest.param([5, 9, 7], [5, 9, 7, 4], 10, 20, 2, False, 3, id="an accepted stop"),
        pytest.param([5, 6, 7], [5, 9, 7, 4], 10, 20, 2, False, 1, id="the target's own stop"),
        pytest.param([5, 6, 7], [5, 6, 7, 9], 10, 20, 4, False, 3, id="the last one stops"),
        pytest.param([5, 6, 7], [5, 1, 9, 4], 10, 20, 2, True, 1, id="a stop that was not kept"),
        pytest.param([5, 8, 9], [5, 8, 9, 6], 10, 20, 2, False, 3, id="the first of two stops"),
        pytest.param([5, 6, 7], [5, 6, 7, 4], 18, 20, 2, False, 3, id="the limit cuts"),
        pytest.param([5, 6, 7], [5, 6, 7, 4], 16, 20, 4, False, 3, id="the limit is just met"),
        pytest.param([5, 6, 7], [5, 6, 7, 4], 15, 20, 4, True, 3, id="one short of the limit"),
        pytest.param([5, 6, 7], [5, 6, 9, 4], 18, 20, 2, False, 2, id="a stop past the limit"),
        pytest.param([], [5], 10, 20, 1, True, 0, id="plain"),
        pytest.param([], [9], 10, 20, 1, False, 0, id="plain stop"),
        pytest.param([], [5], 19, 20, 1, False, 0, id="plain limit"),
    ],
)
def test_committed_tokens_by_hand(drafts, taken, length, limit, committed, live, accepted):
    """Tokens 8 and 9 stop."""
    stops = jnp.array([8, 9])
    taken, tree = jnp.array([taken], jnp.int32), _chain([3, *drafts])
    nodes = trees.accepted_nodes(tree, taken)
    found, path = trees.accepted_path(tree, nodes, depth=len(drafts))
    assert found.tolist() == [accepted]
    assert trees.accepted_in_chain(tree.tokens, taken).tolist() == [accepted]
    assert path.tolist() == [[*range(accepted + 1), *[0] * (len(drafts) - accepted)]]
    got = count_committed(found, taken, _rows(length, limit), stops)
    assert [x.tolist() for x in got] == [[committed], [live]]

    got = count_committed(found, taken, _rows(length, limit, live=False), stops)
    assert [x.tolist() for x in got] == [[0], [False]]


@functools.partial(jax.jit, static_argnames="strategy")
def _run(models, strategy, sampler, state, rounds, sharpness=1.0, give_up_below=0.0):
    state = refresh_draft_cache(models, SHAPE, strategy, state)
    sharpness, stats = jnp.full(DEPTH, sharpness), zero_stats(strategy)
    step = functools.partial(run_round, models, SHAPE, strategy, sampler, sharpness)
    return run_rounds(step, state, stats, rounds, give_up_below)


@jax.jit
def _decode(params, tokens):
    """Features and caches of whole rows."""
    rows, length = tokens.shape
    cache = policy.empty_cache(SHAPE, rows, length)
    hidden, _, cache = policy.decode(params, SHAPE, tokens, cache, jnp.zeros((rows,), jnp.int32))
    return hidden, cache


@jax.jit
def _draft_cache(models, features, tokens):
    """The drafter's cache from true pairs of whole rows."""
    rows, length = tokens.shape
    cache = drafter.empty_cache(SHAPE, rows, length)
    following = policy.embed(models.target, jnp.roll(tokens, -1, axis=1))
    start = jnp.zeros((rows,), jnp.int32)
    return drafter.decode(models.draft, SHAPE, features, following, cache, start)[1]


def _prefilled(models, prompts, limits):
    """Rows after the prompt, as `row_programs.prefill_program` makes them."""
    rows = len(prompts)
    tokens = np.zeros((rows, LENGTH), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
    features, cache = _decode(models.target, tokens)
    return RolloutState(
        tokens=jnp.asarray(tokens),
        log_probs=jnp.zeros((rows, LENGTH)),
        cache=cache,
        features=features,
        draft_cache=drafter.empty_cache(SHAPE, rows, LENGTH),
        length=lengths,
        draft_length=jnp.full((rows,), -LENGTH, jnp.int32),
        limit=lengths + jnp.array(limits, jnp.int32),
        live=jnp.ones((rows,), bool),
        stored=jnp.zeros((rows,), bool),
        sequence_ids=jnp.arange(rows, dtype=jnp.int32),
        prompt_ids=jnp.arange(rows, dtype=jnp.int32),
    )


def _sampler(*, stop=NEVER, temperature=1.0, seed=0):
    params = sampling.make_params(temperature, 0, 1.0, filtered=False)
    return Sampler(key=jax.random.key(seed), params=params, stop_tokens=jnp.array([stop]))


@pytest.fixture(scope="module", params=["chain-3", "tree-3-2-7"])
def strategy(request):
    """A chain, and a tree that keeps the better part of its nodes."""
    return Strategy.parse(request.param)


@pytest.fixture(scope="module")
def random_models():
    return Models(target=toy_engine.random_policy(), draft=toy_engine.random_drafter())


@pytest.fixture(scope="module")
def after_rounds(random_models, strategy):
    """(rows before, rows after, statistics) of five rounds; the last row reaches its limit."""
    before = _prefilled(random_models, toy_engine.prompts(4), [30, 30, 30, 3])
    after, stats = _run(random_models, strategy, _sampler(), before, jnp.int32(5))
    assert after.live.tolist() == [True, True, True, False]
    return before, after, stats


def test_some_drafts_are_wrong_and_some_are_right(after_rounds):
    """Otherwise the tests below would see no rejection, or nothing else."""
    _, _, stats = after_rounds
    assert 0 < int(stats.accepted[0]) < int(stats.row_rounds)


def test_statistics_count_rounds_rows_and_tokens(after_rounds):
    before, after, stats = after_rounds
    gained = np.asarray(after.length - before.length)
    assert int(stats.rounds) == 5
    assert int(stats.committed) == gained.sum()
    assert gained[3] == 3 and 3 * 5 + 1 <= int(stats.row_rounds) <= 3 * 5 + 3
    falling = np.asarray(stats.accepted)
    assert falling.shape == (DEPTH,) and np.all(np.diff(falling) <= 0)


def test_features_and_caches_are_those_of_the_committed_tokens(after_rounds, random_models):
    """What rejected drafts left behind is overwritten before anybody reads it."""
    _, state, _ = after_rounds
    features, cache = _decode(random_models.target, state.tokens)
    draft_cache = _draft_cache(random_models, features, state.tokens)
    for row in range(4):
        known, drafted = int(state.length[row]) - 1, int(state.draft_length[row])
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        close(state.features[row, :known], features[row, :known])
        for got, wanted in zip(state.cache, cache, strict=True):
            close(got.k[row, :, :known], wanted.k[row, :, :known])
            close(got.v[row, :, :known], wanted.v[row, :, :known])
        if state.live[row]:
            assert known - drafted <= DEPTH + 1 and drafted > 0
            close(state.draft_cache.k[row, :, :drafted], draft_cache.k[row, :, :drafted])
            close(state.draft_cache.v[row, :, :drafted], draft_cache.v[row, :, :drafted])


def test_prompts_and_ended_rows_stay_as_they_are(after_rounds, random_models, strategy):
    before, after, _ = after_rounds
    for row, length in enumerate(before.length.tolist()):
        np.testing.assert_array_equal(after.tokens[row, :length], before.tokens[row, :length])
    further, _ = _run(random_models, strategy, _sampler(), after, jnp.int32(2))
    end = int(after.length[3])
    assert int(further.length[3]) == end
    np.testing.assert_array_equal(further.tokens[3, :end], after.tokens[3, :end])
    np.testing.assert_array_equal(further.log_probs[3, :end], after.log_probs[3, :end])


def test_no_round_is_run_without_need(random_models, after_rounds, strategy):
    """None of zero rounds, none without a live row, and no more than it takes to end all rows."""
    before, after, _ = after_rounds
    same, stats = _run(random_models, strategy, _sampler(), before, jnp.int32(0))
    np.testing.assert_array_equal(same.length, before.length)
    assert int(stats.rounds) == int(stats.row_rounds) == int(stats.committed) == 0
    ended = after.replace(live=jnp.zeros((4,), bool))
    assert int(_run(random_models, strategy, _sampler(), ended, jnp.int32(9))[1].rounds) == 0
    short = before.replace(limit=before.length + 2)
    done, stats = _run(random_models, strategy, _sampler(), short, jnp.int32(9))
    assert not np.any(done.live) and 1 <= int(stats.rounds) <= 2
    np.testing.assert_array_equal(done.length, short.limit)


def test_a_drafter_that_equals_the_target_is_never_wrong(strategy):
    """Depth + 1 tokens a round, until the limit cuts: through attention, caches and shared noise.

    The drafter's history holds accepted drafts, so a stale slot or a wrong position would show. It
    may be sure of itself: a tree then keeps its best path.
    """
    sure = functools.partial(_run, sharpness=1e3)
    models = Models(*toy_engine.mirrored())
    state = _prefilled(models, toy_engine.prompts(4), [30] * 4)
    for _ in range(2):  # two chunks of three rounds: the cache is kept between them
        before = state.length
        state, stats = sure(models, strategy, _sampler(), state, jnp.int32(3))
        np.testing.assert_array_equal(state.length - before, 3 * (DEPTH + 1))
        assert stats.accepted.tolist() == [12] * DEPTH
    greedy = _sampler(temperature=0.0)
    state = _prefilled(models, toy_engine.prompts(4, seed=1), [30] * 4)
    _, stats = sure(models, strategy, greedy, state, jnp.int32(5))
    assert stats.accepted.tolist() == [20] * DEPTH


def test_the_drafters_cache_is_made_of_what_it_reads(random_models):
    """Of two hidden states it reads the last, and is then the drafter that knows no other."""
    state = _prefilled(random_models, toy_engine.prompts(4, seed=1), [30] * 4)
    wide = state.replace(features=jnp.concatenate([state.features + 1, state.features], axis=-1))
    reading = random_models.replace(draft=toy_engine.fused(random_models.draft))
    make = jax.jit(make_draft_cache, static_argnums=1)
    made, expected = make(reading, toy_engine.FUSED, wide), make(random_models, SHAPE, state)
    np.testing.assert_array_equal(made.draft_length, expected.draft_length)
    for row, length in enumerate(expected.draft_length):
        for found, wanted in zip(
            (made.draft_cache.k, made.draft_cache.v),
            (expected.draft_cache.k, expected.draft_cache.v),
            strict=True,
        ):
            got = found[row, :, :length], wanted[row, :, :length]
            np.testing.assert_allclose(*got, rtol=1e-3, atol=1e-4)


def test_the_drafter_reads_the_feature_of_its_pair(strategy):
    """`counting` drafts from features alone: a feature of another position guesses nothing."""
    models = Models(*toy_engine.counting())
    prompts = [np.array(p) for p in ([4, 5], [20, 21, 22], [9, 3, 7], [11, 10, 9, 8])]
    state = _prefilled(models, prompts, [30] * 4)
    state, stats = _run(models, strategy, _sampler(temperature=0.0), state, jnp.int32(4))
    # In the last two rows the first guess goes by 3 -> 4 and 9 -> 10, and is wrong once.
    assert (state.length - jnp.array([2, 3, 3, 4])).tolist() == [16, 16, 13, 13]
    assert stats.accepted.tolist() == [14] * DEPTH
    for row, prompt in enumerate(prompts):
        count = int(state.length[row]) - len(prompt)
        wanted = (prompt[-1] + 1 + np.arange(count)) % SHAPE.vocab_size
        np.testing.assert_array_equal(state.tokens[row, len(prompt) : state.length[row]], wanted)


def test_a_row_stops_at_its_stop_token(strategy):
    models = Models(*toy_engine.counting())
    prompts = toy_engine.counting_prompts(1, 2, 5, 8)
    state = _prefilled(models, prompts, [30] * 4)
    state, _ = _run(models, strategy, _sampler(stop=STOP), state, jnp.int32(9))
    assert (state.length - 2).tolist() == [1, 2, 5, 8] and not np.any(state.live)
    np.testing.assert_array_equal(state.tokens[jnp.arange(4), state.length - 1], STOP)


def test_a_broken_drafter_changes_no_token(random_models, after_rounds, strategy):
    before, good, _ = after_rounds
    broken = random_models.replace(draft=jax.tree.map(lambda x: x * jnp.nan, random_models.draft))
    state, stats = _run(broken, strategy, _sampler(), before, jnp.int32(5))
    for row in range(4):
        both = min(int(state.length[row]), int(good.length[row]))
        np.testing.assert_array_equal(state.tokens[row, :both], good.tokens[row, :both])
    assert np.all(np.isfinite(state.features)) and int(stats.committed) >= 4


@pytest.mark.parametrize(("give_up_below", "rounds"), [(0.0, 9), (1.0, 9), (2.0, 3), (9.0, 3)])
def test_rounds_end_early_where_hardly_a_draft_is_accepted(random_models, give_up_below, rounds):
    """Not before the third; a drafter that is always right goes on until more is asked for."""
    strategy, state = Strategy(DEPTH), _prefilled(random_models, toy_engine.prompts(4), [50] * 4)
    broken = random_models.replace(draft=jax.tree.map(lambda x: x * jnp.nan, random_models.draft))
    run = functools.partial(_run, give_up_below=give_up_below)
    after, stats = run(broken, strategy, _sampler(), state, jnp.int32(9))
    assert int(stats.rounds) == rounds and np.all(after.live)
    models = Models(*toy_engine.mirrored())
    state = _prefilled(models, toy_engine.prompts(4), [50] * 4)
    _, stats = run(models, strategy, _sampler(), state, jnp.int32(9))
    assert int(stats.rounds) == (3 if give_up_below > DEPTH + 1 else 9)


@pytest.mark.parametrize(("live", "rounds"), [(1, 10), (2, 5), (3, 4), (4, 3)])
def test_few_rows_go_on_until_there_is_evidence(random_models, live, rounds):
    """Three wrong guesses of a single row are bad luck; ten of all live ones are not."""
    broken = random_models.replace(draft=jax.tree.map(lambda x: x * jnp.nan, random_models.draft))
    state = _prefilled(random_models, toy_engine.prompts(4), [50] * 4)
    state = state.replace(live=jnp.arange(4) < live)
    _, stats = _run(
        broken, Strategy(DEPTH), _sampler(), state, jnp.int32(20), give_up_below=float(DEPTH + 1)
    )
    assert int(stats.rounds) == rounds


def test_zero_statistics_have_one_entry_per_draft():
    assert zero_stats(Strategy(0)).accepted.shape == (0,)
    assert zero_stats(Strategy(4)).accepted.shape == (4,)


def test_rows_that_ended_add_nothing_to_the_statistics():
    """A tree that is sure of itself and right counts one expected draft for each live row."""
    models = Models(*toy_engine.mirrored())
    state = _prefilled(models, toy_engine.prompts(4), [30] * 4)
    state = state.replace(live=jnp.array([False, True, False, False]))
    strategy = Strategy.parse("tree-2-2-7")
    _, stats = _run(models, strategy, _sampler(), state, jnp.int32(1), sharpness=1e3)
    assert stats.row_rounds == 1 and stats.accepted.tolist() == [1, 1]
    np.testing.assert_allclose(stats.expected, [1.0, 1.0], atol=1e-3)
