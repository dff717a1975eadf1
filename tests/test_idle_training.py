"""Promise 4: idle slices train the drafter to the end of the tail, and all of them get the same."""

import dataclasses
import time

import jax
import numpy as np
import pytest
import toy_engine
from toy_engine import NEVER

from tlt_jax import rollout
from tlt_jax.budget import NO_BLOCK, UNTIMED, Block, Budget, RoundTimes
from tlt_jax.choice import Choice
from tlt_jax.controller import Controller
from tlt_jax.types import Strategy

# Counting at temperature 0 with a drafter that knows nothing: about one token a round.
MODELS = toy_engine.counting()[0], toy_engine.random_drafter()


def _lengths(by_slice):
    """Response lengths in the order of sequences, which are dealt to the slices in turn."""
    return [length for lengths in zip(*by_slice, strict=True) for length in lengths]


def _microbatches(record, slice_):
    """What some slice with live rows leaves time for, in blocks that it began."""
    found, block = 0, record.block
    for start in range(0, max(record.rounds_run), block.rounds or record.rounds):
        left = start + block.rounds - max(record.rounds_run[slice_], start)
        if left > 0 and start + block.rounds <= record.rounds:
            found += left * block.microbatches // block.rounds
    return found


@pytest.mark.parametrize(
    ("name", "by_slice"),
    [
        ("main", [[3, 2, 1, 4], [30, 4, 4, 3]]),
        ("four slices", [[2, 1], [9, 3], [17, 4], [30, 2]]),
        ("four slices", [[30, 2], [2, 1], [2, 2], [1, 1]]),
    ],
)
def test_idle_slices_train_to_the_end_of_the_tail(name, by_slice):
    """Late joiners included: in blocks that others run it trains, in every chunk, and no longer."""
    programs = toy_engine.engine(name).having(temperature=0.0, chunk_tokens=24)
    asked = toy_engine.counting_prompts(*_lengths(by_slice))
    result = toy_engine.roll(programs, MODELS, asked)
    assert [len(r.response) for r in result.responses] == _lengths(by_slice)

    version, trained = 0, 0
    for record, kind in zip(result.chunks, programs.kinds, strict=True):
        idle = [count == 0 for count in record.live]
        # With few live rows a slice may fall idle within the chunk.
        assert kind.training == (min(record.live) <= rollout.NEARLY_IDLE_ROWS)
        assert record.roles == ["TRAIN" if none else "ROLLOUT" for none in idle]
        assert record.drafter_version == version
        for slice_, none in enumerate(idle):
            wanted = _microbatches(record, slice_)
            if none:
                assert record.rounds_run[slice_] == 0 and record.microbatches[slice_] == wanted > 0
            else:
                assert record.microbatches[slice_] == wanted
        assert (record.draft_loss is not None) == any(record.microbatches)
        version += any(record.microbatches)
        trained += any(record.microbatches)
    assert trained >= 3, "the tail is too short to say anything"
    assert int(result.carry.drafter.version) == version
    toy_engine.assert_same_on_all_devices(result.carry.drafter)

    # Slices joined in the order in which their longest sequences ended.
    first = [
        next((r.chunk for r in result.chunks if not r.live[s]), len(result.chunks))
        for s in range(programs.slices)
    ]
    longest = [max(lengths) for lengths in by_slice]
    order = np.argsort(longest, kind="stable")
    assert [first[s] for s in order] == sorted(first)
    assert first[order[-1]] == len(result.chunks)


def test_a_slice_that_falls_idle_inside_a_training_chunk_trains_for_the_rest_of_it():
    programs = toy_engine.engine("four slices").having(temperature=0.0, chunk_tokens=40)
    asked = toy_engine.counting_prompts(*_lengths([[1, 1], [9, 10], [30, 2], [28, 3]]))
    result = toy_engine.roll(programs, MODELS, asked)
    late = [
        record.microbatches[slice_]
        for record in result.chunks
        for slice_ in range(4)
        if record.roles[slice_] == "ROLLOUT" and "TRAIN" in record.roles
    ]
    assert max(late) > 0


TAIL = _lengths([[18, 1, 1, 1], [30, 30, 1, 1]])
FAST = Controller(budget=Budget(rounds=(RoundTimes(4, "chain-2", (1.0,)),), microbatches=(0.3,)))


def _measured_roll(**options):
    programs = toy_engine.measured("main").having(temperature=0.0, chunk_tokens=24)
    asked = toy_engine.counting_prompts(*TAIL)
    return programs, lambda: toy_engine.roll(programs, MODELS, asked, **options)


def _log_of(result):
    return [
        Choice(Strategy.parse(r.strategy), r.chosen, r.give_up_below, r.block)
        for r in result.chunks
    ]


@pytest.fixture
def steady_clock(monkeypatch):
    """A round takes a second, whatever the machine does and whoever trains beside it."""
    now, chunk_program = [0.0], toy_engine.Engine.chunk_program

    def timed_program(self, kind, arguments):
        program = chunk_program(self, kind, arguments)

        def timed(*arguments):
            result = program(*arguments)
            now[0] += float(result[-1].stats.rounds.max())
            return result

        return timed

    monkeypatch.setattr(toy_engine.Engine, "chunk_program", timed_program)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])


def test_measured_prices_fill_blocks_and_compile_nothing(steady_clock):
    """Three microbatches a round at a price of 0.3; one in a chunk as long as no price is known."""
    programs, roll = _measured_roll(controller=FAST)
    compiled = programs.pool.compiled
    known, unknown = roll(), _measured_roll()[1]()
    assert programs.pool.compiled == compiled
    for result, expected in ((known, {Block(1, 3)}), (unknown, {Block(8, 1), Block(4, 1)})):
        trained = [record for record in result.chunks if record.block != NO_BLOCK]
        assert {record.block for record in trained} <= expected and len(trained) >= 3
        for record in result.chunks:
            assert record.microbatches == [_microbatches(record, slice_) for slice_ in (0, 1)]
        assert int(result.carry.drafter.version) > 0
        toy_engine.assert_same_on_all_devices(result.carry.drafter)
    taken = [sum(sum(r.microbatches) for r in result.chunks) for result in (known, unknown)]
    assert taken[0] > 5 * taken[1] > 0
    for one, other in zip(known.responses, unknown.responses, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_a_rollout_times_its_rounds_where_prices_are_measured(steady_clock):
    """A second each; while three microbatches of 0.3 s are taken in it, nothing can be told."""
    first = _measured_roll()[1]().carry.controller.budget
    assert {times.rows for times in first.rounds} == {4} and first.microbatches == ()
    assert {each for times in first.rounds for each in times.seconds} == {1.0}
    budget = _measured_roll(controller=FAST)[1]().carry.controller.budget
    assert max(times.unclear for times in budget.rounds) > 0
    constant = toy_engine.engine("main").having(temperature=0.0, chunk_tokens=24)
    result = toy_engine.roll(constant, MODELS, toy_engine.counting_prompts(*TAIL))
    assert result.carry.controller.budget == UNTIMED  # else a resumed run would have other bits


def test_measured_blocks_can_be_replayed():
    """What idle slices trained, to the bit, whatever the clocks say now."""
    first = _measured_roll(controller=FAST)[1]()
    log = _log_of(first)
    assert len({choice.block for choice in log}) >= 2
    again = _measured_roll(replay=log)[1]()
    assert [record.block for record in again.chunks] == [record.block for record in first.chunks]
    assert {record.chosen for record in again.chunks} == {"replayed"}
    jax.tree.map(np.testing.assert_array_equal, again.carry.drafter, first.carry.drafter)


def test_one_of_four_slices_that_falls_idle_late_still_trains():
    """The first is idle from early on; the third joins in a chunk that it began with live rows."""
    programs = toy_engine.measured("four slices").having(temperature=0.0, chunk_tokens=40)
    asked = toy_engine.counting_prompts(*_lengths([[1, 1], [30, 28], [12, 2], [29, 30]]))
    rounds = RoundTimes(2, "chain-4", (1.0,))
    controller = Controller(budget=Budget(rounds=(rounds,), microbatches=(0.6,)))
    result = toy_engine.roll(programs, MODELS, asked, controller=controller)
    joined = next(r for r in result.chunks if r.live[2] and r.microbatches[2])
    assert joined.block == Block(2, 3) and 0 < joined.microbatches[2] < joined.microbatches[0]
    after = result.chunks[joined.chunk + 1]
    assert after.roles[2] == "TRAIN" and after.microbatches[2] == after.microbatches[0] > 0
    for record in result.chunks:
        assert record.microbatches == [_microbatches(record, slice_) for slice_ in range(4)]


def test_a_slice_trains_in_the_chunk_in_which_it_falls_idle_first():
    """It had one live row when the chunk began, so the program with the training branch ran."""
    programs = toy_engine.engine("main").having(temperature=0.0, chunk_tokens=24)
    asked = toy_engine.counting_prompts(*_lengths([[18, 1, 1, 1], [30, 30, 1, 1]]))
    result = toy_engine.roll(programs, MODELS, asked)
    first = next(record for record in result.chunks if any(record.microbatches))
    assert first.roles == ["ROLLOUT", "ROLLOUT"] and first.microbatches[0] > 0


def test_nothing_is_trained_while_every_slice_is_busy():
    """Equal slices end in the same chunk: the program without a training branch runs throughout."""
    programs = toy_engine.engine("main").having(temperature=0.0)
    asked = toy_engine.counting_prompts(*[20] * 8)
    result = toy_engine.roll(programs, MODELS, asked)
    assert not any(kind.training for kind in programs.kinds)
    before = toy_engine.drafter_state(programs, MODELS[1])
    jax.tree.map(np.testing.assert_array_equal, result.carry.drafter, before)
    assert all(record.roles == ["ROLLOUT"] * 2 for record in result.chunks)
    assert result.carry.buffer.segments.tolist() == [4, 4]


def test_idle_slices_rest_where_training_is_off():
    programs = toy_engine.engine("plain, then chains").having(temperature=0.0)
    asked = toy_engine.counting_prompts(*_lengths([[3, 2, 1, 4], [30, 4, 4, 3]]))
    result = toy_engine.roll(programs, MODELS, asked)
    assert {role for record in result.chunks for role in record.roles} == {"ROLLOUT", "IDLE"}
    assert result.carry.buffer is None and int(result.carry.drafter.version) == 0


def test_the_next_rollout_goes_on_with_drafter_and_buffer():
    """One-step-off: the buffer of one step is what the next one's early tail learns from."""
    programs = toy_engine.engine("main").having(temperature=0.0, chunk_tokens=24)
    asked = toy_engine.counting_prompts(*_lengths([[3, 2, 1, 4], [30, 4, 4, 3]]))
    first = toy_engine.roll(programs, MODELS, asked)
    version = int(first.carry.drafter.version)
    second = toy_engine.rollout.run(
        programs,
        toy_engine.place(programs, MODELS[0]),
        first.carry,
        asked,
        jax.random.key(1),
        stop_tokens=(toy_engine.STOP,),
    )
    assert second.chunks[0].drafter_version == version > 0
    assert int(second.carry.drafter.version) > version
    assert second.carry.buffer.segments.tolist() == [8, 8]


def test_a_drafter_that_learns_is_accepted_more():
    """Counting is easy to learn: twelve rollouts of short tails do."""
    programs = toy_engine.engine("main").having(temperature=0.0, chunk_tokens=24)
    carry, target = toy_engine.carry(programs, MODELS[1]), toy_engine.place(programs, MODELS[0])
    rates = []
    for step in range(12):
        lengths = _lengths([[3, 2, 1, 4], [30 - step, 24, 20, 28]])
        asked = toy_engine.counting_prompts(*lengths)
        result = toy_engine.rollout.run(
            programs, target, carry, asked, jax.random.key(step), stop_tokens=(NEVER,)
        )
        result = toy_engine.rollout.run(
            programs,
            target,
            result.carry,
            asked,
            jax.random.key(step),
            stop_tokens=(toy_engine.STOP,),
        )
        carry = result.carry
        hits = sum(record.accepted[0] for record in result.chunks)
        rates.append(hits / sum(sum(record.row_rounds) for record in result.chunks))
    assert rates[0] < 0.3 and rates[-1] > 0.6, rates


@pytest.mark.parametrize("share", [0.5, 0.11, 0.03])
def test_one_slice_trains_between_steps_within_its_budget(share):
    """What a share of the rounds run is worth is saved up, and whole microbatches are bought."""
    programs = toy_engine.engine("one slice")
    budget = dataclasses.replace(programs.drafter, between_steps_budget=share)
    programs = programs.having(drafter=budget)
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    credit, versions = 0.0, 0
    price = programs.price(8)
    for step in range(3):
        result = toy_engine.roll(
            programs,
            models,
            toy_engine.prompts(8, seed=step),
            seed=step,
            controller=Controller(idle_credit=credit),
        )
        *chunks, last = result.chunks
        bought = last.roles == ["TRAIN"]
        chunks = chunks if bought else result.chunks
        assert all(record.roles == ["ROLLOUT"] for record in chunks)
        assert all(record.microbatches == [0] for record in chunks)
        credit += share * sum(record.rounds_run[0] for record in chunks) / price
        microbatches = int(credit)
        assert bought == (microbatches > 0)
        if bought:
            assert last.microbatches == [microbatches] and last.committed == [0]
            assert last.rounds_run == [0] and last.draft_loss is not None
            versions += 1
        credit -= microbatches
        left = result.carry.controller.idle_credit
        assert left == pytest.approx(credit) and 0 <= left < 1
        assert int(result.carry.drafter.version) == bought
    if share == 0.5:
        assert versions >= 2


def test_what_one_slice_trains_between_steps_can_be_measured_and_replayed(steady_clock):
    """A microbatch is as long as half a round, so all rounds at a share of 0.5 buy one each."""
    programs = toy_engine.measured("one slice")
    budget = dataclasses.replace(programs.drafter, between_steps_budget=0.5)
    programs = programs.having(drafter=budget)
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    rounds = RoundTimes(8, "chain-2", (1.0,))
    known = Controller(budget=Budget(rounds=(rounds,), microbatches=(0.5,)))
    asked = toy_engine.prompts(8)
    first = toy_engine.roll(programs, models, asked, controller=known)
    *chunks, last = first.chunks
    count = sum(record.rounds_run[0] for record in chunks)
    assert last.block == Block(1, count) and last.microbatches == [count]
    assert first.carry.controller.idle_credit == 0
    again = toy_engine.roll(programs, models, asked, replay=_log_of(first))
    assert [record.block for record in again.chunks] == [record.block for record in first.chunks]
    jax.tree.map(np.testing.assert_array_equal, again.carry.drafter, first.carry.drafter)
    untimed = toy_engine.roll(programs, models, asked)
    assert [record.block for record in untimed.chunks] == [NO_BLOCK] * len(chunks)
