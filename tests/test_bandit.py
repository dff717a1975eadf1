"""The bandit on simulated arms, and its cost model."""

import functools
import random

import pytest

from tlt_jax import bandit as bandit_lib
from tlt_jax.bandit import WINDOW, Bandit, CostModel
from tlt_jax.types import Strategy

PLAIN, SHORT, LONG, NGRAM = map(Strategy.parse, ("plain", "chain-2", "chain-8", "ngram-4"))
ARMS = (PLAIN, SHORT, LONG, NGRAM)
MODEL = CostModel(layers=32, free_tokens=64)


def _play(speeds, *, choices, epsilon=0.1, bandit=None, seed=0, rows=4):
    """Choices one after another, rewarded by `speeds(number)` by arm with a tenth of noise."""
    rng, bandit, taken = random.Random(seed), bandit or Bandit(), []
    for number in range(choices):
        bandit, arm, _ = bandit_lib.select(bandit, rows, ARMS, model=MODEL, epsilon=epsilon)
        reward = speeds(number)[arm] * rng.uniform(0.9, 1.1)
        bandit = bandit_lib.update(bandit, rows, arm, reward, accept_length=1.0)
        taken.append(arm)
    return bandit, taken


@pytest.mark.parametrize("best", ARMS)
def test_it_finds_the_best_arm(best):
    """Whatever the cost model thinks; of the later choices few are for anything else."""
    speeds = {arm: 200.0 if arm == best else 100.0 for arm in ARMS}
    _, taken = _play(lambda _: speeds, choices=100)
    assert taken[20:].count(best) >= 70


def test_it_follows_a_change():
    """The window forgets: when the best arm slows down, it is left, and taken up again later."""
    fast = {PLAIN: 100.0, SHORT: 150.0, LONG: 200.0, NGRAM: 90.0}
    slow = fast | {LONG: 50.0}
    _, taken = _play(lambda n: slow if 60 <= n < 120 else fast, choices=260)
    assert taken[30:60].count(LONG) >= 24
    assert taken[80:120].count(SHORT) >= 30
    assert taken[220:].count(LONG) >= 30


def test_without_exploration_nothing_is_explored():
    speeds = {PLAIN: 100.0, SHORT: 150.0, LONG: 200.0, NGRAM: 90.0}
    for epsilon, least, most in ((0.0, 0, 0), (0.25, 40, 60), (1.0, 200, 200)):
        bandit, explored = Bandit(), 0
        for _ in range(200):
            bandit, arm, why = bandit_lib.select(bandit, 4, ARMS, model=MODEL, epsilon=epsilon)
            bandit = bandit_lib.update(bandit, 4, arm, speeds[arm], accept_length=1.0)
            explored += why == "explored"
        assert least <= explored <= most


def test_what_is_new_and_may_be_good_is_tried_at_once():
    """In the order of the cost model, and not at all without exploration."""
    _, taken = _play(lambda _: dict.fromkeys(ARMS, 1.0), choices=3, epsilon=1e-9)
    rates = {arm: MODEL.rate(4, arm) for arm in ARMS}
    wanted = sorted(ARMS, key=lambda arm: -rates[arm])[:3]
    assert rates[wanted[-1]] >= rates[wanted[0]] / 2 and taken == wanted
    hopeless = CostModel(layers=32, free_tokens=1e-3)
    bandit = bandit_lib.update(Bandit(), 4, PLAIN, 1.0, accept_length=1.0)
    select = functools.partial(bandit_lib.select, bandit, 4, (PLAIN, LONG), epsilon=1e-9)
    assert select(model=hopeless)[1:] == (PLAIN, "best")
    assert select(model=MODEL)[2] == "explored"
    assert select(model=MODEL, broken=("trained", "n-gram"))[1:] == (PLAIN, "best")


def test_what_is_new_in_a_bucket_is_rated_by_the_nearest_one():
    """In proportion to what both know; the farther bucket says the opposite."""
    bandit = Bandit()
    given = [(8, PLAIN, 10.0), (8, LONG, 30.0), (1, PLAIN, 1.0), (1, LONG, 0.5), (4, PLAIN, 8.0)]
    for rows, arm, reward in given:
        bandit = bandit_lib.update(bandit, rows, arm, reward, accept_length=1.0)
    rated = bandit_lib.ratings(bandit, 4, ARMS, MODEL)
    assert (rated[PLAIN], rated[LONG]) == (8.0, 24.0)
    assert rated[SHORT] == pytest.approx(8.0 * MODEL.rate(4, SHORT) / MODEL.rate(4, PLAIN))


def test_a_broken_drafter_is_only_explored():
    bandit, _ = _play(lambda _: {PLAIN: 1.0, SHORT: 2.0, LONG: 9.0, NGRAM: 1.5}, choices=60)
    select = functools.partial(bandit_lib.select, bandit, 4, ARMS, model=MODEL)
    assert select(epsilon=0.0)[1] == LONG
    assert select(epsilon=0.0, broken=("trained",))[1] == NGRAM
    assert select(epsilon=0.0, broken=("trained", "n-gram"))[1] == PLAIN
    drafting = (SHORT, LONG)
    _, arm, _ = bandit_lib.select(
        bandit, 4, drafting, model=MODEL, epsilon=0.0, broken=("trained",)
    )
    assert arm == LONG


def test_exploration_takes_the_arm_that_was_not_tried_for_longest():
    _, taken = _play(lambda _: dict.fromkeys(ARMS, 1.0), choices=40, epsilon=1.0)
    for first in range(0, 40, 4):
        assert set(taken[first : first + 4]) == set(ARMS)


def test_one_outlier_changes_no_choice():
    """The median: a chunk that a neighbour slowed down says little."""
    bandit, _ = _play(lambda _: {PLAIN: 1.0, SHORT: 2.0, LONG: 1.5, NGRAM: 1.0}, choices=60)
    bandit = bandit_lib.update(bandit, 4, SHORT, 0.001, accept_length=1.0)
    _, arm, why = bandit_lib.select(bandit, 4, ARMS, model=MODEL, epsilon=0.0)
    assert (arm, why) == (SHORT, "best")


def test_buckets_know_nothing_of_one_another():
    bandit, _ = _play(lambda _: {PLAIN: 9.0, SHORT: 1.0, LONG: 1.0, NGRAM: 1.0}, choices=40)
    assert bandit.known(4, PLAIN).rewards and not bandit.known(1, PLAIN).rewards
    select = {"model": MODEL, "epsilon": 0.0}
    assert bandit_lib.select(bandit, 4, ARMS, **select)[1] == PLAIN
    assert bandit_lib.select(bandit, 1, ARMS, **select)[1] == LONG


def test_rewards_beyond_the_window_are_forgotten():
    bandit = Bandit()
    for reward in range(WINDOW + 3):
        bandit = bandit_lib.update(bandit, 4, SHORT, float(reward), accept_length=1.0)
    assert bandit.known(4, SHORT).rewards == tuple(map(float, range(3, WINDOW + 3)))


def test_an_arm_that_was_never_tried_is_rated_on_the_scale_of_the_others():
    """Where chain-2 gave 30 times its rate by the model, chain-8 is expected to do so too."""
    bandit = bandit_lib.update(Bandit(), 4, SHORT, 30 * MODEL.rate(4, SHORT), accept_length=2.0)
    rated = bandit_lib.ratings(bandit, 4, (SHORT, LONG), MODEL)
    assert rated == pytest.approx({arm: 30 * MODEL.rate(4, arm) for arm in (SHORT, LONG)})


def test_the_model_by_hand():
    """Chain of 2 at acceptance 0.8 on 4 rows; 12 tokens verified, 16 fed to the drafter."""
    model = CostModel(layers=10, free_tokens=16)
    cost = 1 + 12 / 16 + (2 + 4 * (3 + 1) / 16) / 10
    assert model.rate(4, SHORT) == pytest.approx(4 * (1 + 0.8 + 0.64) / cost)
    assert model.rate(4, PLAIN) == pytest.approx(4 / (1 + 4 / 16))


@pytest.mark.parametrize(
    ("free_tokens", "rows", "best"), [(4, 64, PLAIN), (4, 1, SHORT), (512, 1, LONG), (512, 8, LONG)]
)
def test_the_model_knows_many_rows_from_few(free_tokens, rows, best):
    """Many rows on a slow machine decode plainly; few on a fast one draft deep."""
    model = CostModel(layers=32, free_tokens=free_tokens)
    assert max((PLAIN, SHORT, LONG), key=lambda arm: model.rate(rows, arm)) == best


def test_a_strategy_that_gave_up_is_left_at_once():
    """What it gave while its drafter was whole counts no more; later it is tried again."""
    speeds = {PLAIN: 100.0, SHORT: 150.0, LONG: 200.0, NGRAM: 90.0}
    bandit, _ = _play(lambda _: speeds, choices=60)
    update = {"accept_length": 1.0, "gave_up": True}
    broken = bandit_lib.update(bandit, 4, LONG, 20.0, **update)
    assert broken.known(4, LONG).rewards == (20.0,)
    assert bandit_lib.select(broken, 4, ARMS, model=MODEL, epsilon=0.0)[1] == SHORT
    _, taken = _play(lambda _: speeds, choices=150, bandit=broken)
    assert taken[100:].count(LONG) >= 40


def test_a_chunk_gives_up_between_nothing_and_the_break_even():
    """chain-8 gives 200 at 6 tokens a round, plain decoding 100: at 3 they would be equal."""
    known = {PLAIN: (100.0, 1.0), LONG: (200.0, 6.0)}
    bandit = Bandit()
    for arm, (reward, length) in known.items():
        bandit = bandit_lib.update(bandit, 4, arm, reward, accept_length=length)
    below = functools.partial(bandit_lib.give_up_below, bandit, 4)
    assert below(LONG, (PLAIN, LONG), MODEL) == pytest.approx((1 + 3) / 2)
    assert below(PLAIN, (PLAIN, LONG), MODEL) == 0.0
    assert below(LONG, (LONG,), MODEL) == 0.0


def test_a_slower_strategy_may_be_explored():
    """Plain decoding is far ahead, still a chunk of chain-8 as usual runs to its end."""
    bandit = bandit_lib.update(Bandit(), 4, PLAIN, 900.0, accept_length=1.0)
    bandit = bandit_lib.update(bandit, 4, LONG, 100.0, accept_length=5.0)
    below = bandit_lib.give_up_below(bandit, 4, LONG, (PLAIN, LONG), MODEL)
    assert below < 0.7 * 5.0


def test_a_record_gives_the_same_state():
    bandit, _ = _play(lambda _: dict.fromkeys(ARMS, 1.0), choices=10)
    assert Bandit.from_record(bandit.to_record()) == bandit
