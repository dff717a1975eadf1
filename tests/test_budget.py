"""The budget: prices by hand, blocks that they fill, and a machine on which nobody is delayed."""

import dataclasses
import json

import numpy as np
import pytest

from tlt_jax import budget
from tlt_jax.budget import CLEAR, MARGIN, NO_BLOCK, STALE, UNTIMED, WINDOW, Block
from tlt_jax.types import Strategy

CHAIN = Strategy(4)


def _timed(state, seconds, *, rounds_run=(10, 10), microbatches=(0, 0), rows=4):
    return budget.time_rounds(
        state, rows, CHAIN, seconds, rounds_run=rounds_run, microbatches=microbatches
    )


def test_a_price_by_hand():
    """A microbatch takes 7 ms, rounds 4, 5 and 9 ms: 7 / 5 rounds, in this bucket alone."""
    state = UNTIMED
    assert budget.price(state, 4, CHAIN) is None
    for seconds in (0.04, 0.09, 0.05):
        state = _timed(state, seconds)
    assert budget.price(state, 4, CHAIN) is None  # what a microbatch takes is not known yet
    for seconds in (0.008, 0.0, 0.006, 0.007):
        state = budget.time_microbatch(state, seconds)
    assert state.microbatches == (0.008, 0.006, 0.007)  # 0 says nothing
    assert budget.price(state, 4, CHAIN) == budget.price(state, 4, "chain-4") == pytest.approx(1.4)
    assert budget.price(state, 4, Strategy(2)) is None and budget.price(state, 2, CHAIN) is None


@pytest.mark.parametrize(
    ("price", "most_rounds", "expected"),
    [
        (0.2, 24, Block(1, 5)),
        (1.0, 24, Block(1, 1)),
        (1.3, 24, Block(3, 2)),  # 2.6 of 3 rounds
        (1.25, 24, Block(4, 3)),  # 3.75 of 4; 2.5 of 3 are 83 %
        (1.1, 24, Block(4, 3)),  # the best of up to 4 rounds, though only 82 %
        (1.7, 24, Block(2, 1)),
        (2.0, 24, Block(2, 1)),
        (3.4, 24, Block(4, 1)),
        (3.4, 3, NO_BLOCK),  # longer than a chunk
        (1.1, 2, Block(2, 1)),
    ],
)
def test_blocks_by_hand(price, most_rounds, expected):
    assert budget.fitted(price, most_rounds) == expected


def test_a_block_never_holds_more_than_it_is_long():
    for price in np.geomspace(0.01, 30, 400):
        block = budget.fitted(price, 24)
        assert block.microbatches * price <= block.rounds * (1 + 1e-9) and block.rounds <= 24
        assert (block == NO_BLOCK) == (price > 24)


def test_before_anything_is_known_a_chunk_has_one_microbatch():
    state = budget.time_microbatch(UNTIMED, 0.007)
    assert budget.block(state, 4, CHAIN, 24) == Block(24, 1)
    state = _timed(state, 0.05)
    assert budget.block(state, 4, CHAIN, 24) == budget.fitted(MARGIN * 1.4, 24) == Block(3, 2)
    assert budget.block(state, 2, CHAIN, 24) == Block(24, 1)


def test_chunks_that_may_have_waited_for_microbatches_are_not_timed():
    """Slice 1 was idle for 7 of 10 rounds, 0.07 of 0.1 s: room for 7 microbatches of 0.01 s."""
    state = budget.time_microbatch(UNTIMED, 0.01)
    few, many = int(CLEAR * 7), int(CLEAR * 7) + 1
    timed = _timed(state, 0.1, rounds_run=(10, 3), microbatches=(0, few))
    assert timed.known(4, "chain-4").seconds == pytest.approx((0.01,))
    unclear = _timed(timed, 0.2, rounds_run=(10, 3), microbatches=(0, 2 * many))
    assert unclear.known(4, "chain-4") == dataclasses.replace(timed.known(4, "chain-4"), unclear=1)
    # Without the time of a microbatch no chunk with one is clear.
    assert _timed(UNTIMED, 0.1, rounds_run=(10, 0), microbatches=(0, 1)).rounds[0].seconds == ()


def test_after_many_chunks_that_were_not_clear_one_is_made_so():
    state, usual = _timed(budget.time_microbatch(UNTIMED, 0.01), 0.1), Block(4, 3)
    for _ in range(STALE):
        assert budget.block(state, 4, CHAIN, 24) == usual
        state = _timed(state, 0.1, rounds_run=(10, 0), microbatches=(0, 10))
    assert budget.block(state, 4, CHAIN, 24) == Block(24, 1)
    state = _timed(state, 0.24, rounds_run=(24, 0), microbatches=(0, 1))
    assert budget.block(state, 4, CHAIN, 24) == usual


def test_old_times_are_forgotten():
    state = budget.time_microbatch(UNTIMED, 0.01)
    for seconds in [0.1] * WINDOW + [0.2] * WINDOW:
        state = _timed(state, seconds)
        state = budget.time_microbatch(state, seconds / 10)
    assert state.known(4, "chain-4").seconds == pytest.approx([0.02] * WINDOW)
    assert state.microbatches == pytest.approx([0.02] * WINDOW)


def test_a_record_is_json_and_comes_back():
    state = _timed(_timed(budget.time_microbatch(UNTIMED, 0.01), 0.1), 0.2, rows=2)
    assert budget.Budget.from_record(json.loads(json.dumps(state.to_record()))) == state


def _chunk(block, rounds, each, microbatch):
    """Seconds of a chunk in which slice 1 is idle, and its microbatches."""
    blocks = rounds // block.rounds if block.rounds else 0
    longest = max(block.rounds * each, block.microbatches * microbatch)
    left = rounds - blocks * block.rounds
    return blocks * longest + left * each, blocks * block.microbatches


@pytest.mark.parametrize("price", [0.13, 0.45, 0.8, 1.04, 1.36, 2.2, 3.5, 7.1])
def test_on_a_machine_of_any_price_nobody_waits_and_little_is_left(price):
    """Promise 4, the budget: chunks take as long as without training, to 2 %.

    Times are noisy. More than 70 % of the idle time is used at any price, and 80 to 85 % at most.
    """
    rng, each, state = np.random.default_rng(0), 0.01, UNTIMED
    seconds, without, used = 0.0, 0.0, []
    for chunk in range(300):
        if chunk % 50 == 1:  # each start of the run
            noise = rng.uniform(0.95, 1.05)
            state = budget.time_microbatch(state, noise * price * each)
        block = budget.block(state, 4, CHAIN, 24)
        noisy = each * rng.uniform(0.9, 1.1)
        took, taken = _chunk(block, 24, noisy, price * each)
        state = _timed(state, took, rounds_run=(24, 0), microbatches=(0, taken))
        seconds, without = seconds + took, without + 24 * noisy
        used.append(taken * price * each / took)
    assert seconds < 1.02 * without
    assert np.mean(used[5:]) > 0.7, np.mean(used[5:])


def test_a_price_that_was_too_low_is_found_out():
    """Rounds have become twice as fast: blocks then wait for microbatches, but not for ever."""
    state = budget.time_microbatch(UNTIMED, 0.01)
    for _ in range(WINDOW):
        state = _timed(state, 0.24, rounds_run=(24, 24))
    assert budget.price(state, 4, CHAIN) == pytest.approx(1.0)
    for _ in range((STALE + 1) * (WINDOW // 2 + 1)):
        took, taken = _chunk(budget.block(state, 4, CHAIN, 24), 24, 0.005, 0.01)
        state = _timed(state, took, rounds_run=(24, 0), microbatches=(0, taken))
    assert budget.price(state, 4, CHAIN) > 1.5


def test_chunks_of_few_rounds_are_not_timed():
    """What a chunk takes besides its rounds would make these look slow, and microbatches cheap."""
    state = _timed(UNTIMED, 0.04)
    short = _timed(state, 0.03, rounds_run=(3, 0))
    assert short.known(4, str(CHAIN)).seconds == state.known(4, str(CHAIN)).seconds
    assert short.known(4, str(CHAIN)).unclear == 1
    long = _timed(state, 0.03, rounds_run=(budget.LEAST_ROUNDS, 0))
    assert len(long.known(4, str(CHAIN)).seconds) == 2
