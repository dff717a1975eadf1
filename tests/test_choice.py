"""What the next chunk runs: by the bandit, a log, a threshold, another process; broken drafters."""

import collections
import dataclasses
import functools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_engine

from tlt_jax import bandit as bandit_lib
from tlt_jax import choice, rollout
from tlt_jax.bandit import WINDOW
from tlt_jax.budget import NO_BLOCK, Block, Budget, RoundTimes
from tlt_jax.choice import Choice
from tlt_jax.controller import FRESH, Controller
from tlt_jax.program_pool import Recipe
from tlt_jax.types import Strategy, UserError


def _bandit_roll(**changes):
    programs = toy_engine.engine("bandit").having(chunk_tokens=5, **changes)
    seed, asked, _ = toy_engine.tailed()
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    return functools.partial(toy_engine.roll, programs, models, asked, seed=seed), programs


def test_the_bandit_learns_what_each_chunk_gave():
    """Tokens per second of the bucket, as if all its rows were live; the next rollout goes on."""
    roll, _ = _bandit_roll(epsilon=0.5)
    first = roll()
    known = {
        (arm.rows, arm.strategy): list(arm.rewards) for arm in first.carry.controller.bandit.arms
    }
    wanted = collections.defaultdict(list)
    for record in first.chunks:
        rounds = sum(record.row_rounds)
        speed = record.rows * max(record.rounds_run) / record.seconds
        wanted[record.rows, record.strategy].append(sum(record.committed) / rounds * speed)
    assert known == {arm: pytest.approx(rewards[-WINDOW:]) for arm, rewards in wanted.items()}
    assert first.carry.controller.bandit.choices == len(first.chunks)
    assert {record.chosen for record in first.chunks} == {"best", "explored"}
    second = roll(controller=first.carry.controller)
    assert second.carry.controller.bandit.choices == len(first.chunks) + len(second.chunks)


def test_times_of_chunks_beside_a_compiler_teach_nothing():
    roll, programs = _bandit_roll(epsilon=0.5)
    release = threading.Event()

    def slow():
        assert release.wait(60)
        return jax.jit(lambda x: x)

    programs.pool.order([Recipe("slow", slow, (jnp.zeros(3),))])
    try:
        bandit = roll().carry.controller.bandit
    finally:
        release.set()
        programs.pool.wait()
    assert bandit.choices > 0 and not any(arm.rewards for arm in bandit.arms)


def _log_of(result):
    return [
        Choice(Strategy.parse(record.strategy), record.chosen, record.give_up_below, record.block)
        for record in result.chunks
    ]


def test_a_log_of_choices_can_be_replayed():
    """The same programs in the same order, whatever the clocks say."""
    roll, programs = _bandit_roll(epsilon=0.5)
    first = roll()
    ran = list(programs.kinds)
    assert len(set(ran)) >= 3
    log = _log_of(first)
    programs.kinds.clear()
    again = roll(replay=log)
    assert programs.kinds == ran
    assert {record.chosen for record in again.chunks} == {"replayed"}
    with pytest.raises(UserError, match=f"has {len(log) - 1} chunks for this rollout, which needs"):
        roll(replay=log[:-1])
    with pytest.raises(
        UserError, match=r"chunk 0 to replay ran chain-4, but .* only 'plain chain-2'"
    ):
        roll(replay=[Choice(Strategy(4), "best")])


def test_a_log_of_choices_can_be_replayed_on_another_mesh():
    """Twice the devices: the same programs in the same order, and the same tokens."""
    seed, asked, _ = toy_engine.tailed()
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    ran, tokens, log = [], [], None
    for name in ("one bandit", "one bandit on tensor"):
        programs = toy_engine.engine(name).having(chunk_tokens=5, epsilon=0.5)
        result = toy_engine.roll(programs, models, asked, seed=seed, replay=log)
        log = _log_of(result)
        ran.append(list(programs.kinds))
        tokens.append(toy_engine.tokens_of(result))
    assert ran[0] == ran[1] and len(set(ran[0])) == 2
    settings, target = programs.rollout, toy_engine.random_policy()
    assert not toy_engine.unexplained(*tokens, target, settings, seed=seed)


@pytest.fixture
def steady_clock(monkeypatch):
    """A round of plain decoding takes a second, one of a chain 1.6, whatever the machine does."""
    now, chunk_program = [0.0], toy_engine.Engine.chunk_program

    def timed_program(self, kind, arguments):
        program = chunk_program(self, kind, arguments)

        def timed(*arguments):
            result = program(*arguments)
            now[0] += int(result[-1].stats.rounds.max()) * (1.0 if kind.strategy.is_plain else 1.6)
            return result

        return timed

    monkeypatch.setattr(toy_engine.Engine, "chunk_program", timed_program)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])


def test_a_broken_drafter_is_left_within_three_rounds_and_said_once(steady_clock, capsys):
    """And taken up again when it is whole; the tokens stay those of plain decoding."""
    programs = toy_engine.engine("bandit").having(temperature=0.0, epsilon=0.2, chunk_tokens=24)
    target, whole = toy_engine.counting()
    broken = jax.tree.map(lambda x: x * np.nan, whole)
    asked = toy_engine.counting_prompts(*[31] * 8)
    controller, told, speculative = FRESH, [], []
    for step, draft in enumerate([whole] * 3 + [broken] * 6 + [whole] * 12):
        result = toy_engine.roll(programs, (target, draft), asked, seed=step, controller=controller)
        for tokens, prompt in zip(toy_engine.tokens_of(result), asked, strict=True):
            assert tokens.tolist() == toy_engine.counted(prompt, 31)
        controller = result.carry.controller
        told.append(capsys.readouterr().out.splitlines())
        drafted = [record for record in result.chunks if record.strategy != "plain"]
        speculative.append(len(drafted) / len(result.chunks))
        assert draft is whole or {max(record.rounds_run) for record in drafted} <= {3}
    fallen = "trained drafter: hardly a draft is accepted; its strategies are left alone"
    assert told[:9] == [[], [], [], [fallen]] + [[]] * 5
    assert [line for lines in told[9:] for line in lines] == [
        "trained drafter: drafts are accepted again"
    ]
    assert controller.broken == () and np.mean(speculative[-3:]) > 0.6


def test_a_chunk_that_gave_up_gives_up_again_when_it_is_replayed(steady_clock):
    """When it ends follows from the log, too, and not from what the bandit knows by then."""
    programs = toy_engine.engine("bandit").having(temperature=0.0, epsilon=1.0, chunk_tokens=24)
    target, whole = toy_engine.counting()
    models = target, jax.tree.map(lambda x: x * np.nan, whole)
    asked = toy_engine.counting_prompts(*[31] * 8)
    first = toy_engine.roll(programs, models, asked)
    assert any(r.strategy == "chain-2" and max(r.rounds_run) == 3 < r.rounds for r in first.chunks)
    enthusiast = bandit_lib.update(FRESH.bandit, 4, Strategy(2), 1e6, accept_length=1e-3)
    for controller in (FRESH, Controller(bandit=enthusiast)):
        again = toy_engine.roll(
            programs, models, asked, replay=_log_of(first), controller=controller
        )
        assert [r.rounds_run for r in again.chunks] == [r.rounds_run for r in first.chunks]
        assert [r.strategy for r in again.chunks] == [r.strategy for r in first.chunks]


def _told_by_the_first_process(monkeypatch, *numbers):
    """Two processes, of which the other one says these numbers; gives the list of what is said."""
    told, said = np.array(numbers, np.float32), []
    monkeypatch.setattr(choice.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        choice.multihost_utils, "broadcast_one_to_all", lambda own: (said.append(own), told)[1]
    )
    return told, said


def test_the_first_process_decides(monkeypatch):
    """Which strategy, and when to give it up: what this process says itself does not count."""
    told, _ = _told_by_the_first_process(monkeypatch, 1, 1.75, 0, 0)
    programs = toy_engine.engine("bandit").having(epsilon=0.0)
    given = {"rows": 4, "live": 4, "trains": False, "replay": None, "chunk": 0}
    _, chosen = choice.choose(programs, FRESH, **given)
    assert (str(chosen.strategy), chosen.give_up_below) == ("chain-2", 1.75)
    told[0] = 0
    _, chosen = choice.choose(programs, FRESH, **given)
    assert str(chosen.strategy) == "plain"


def test_the_first_process_decides_what_idle_slices_train(monkeypatch):
    """With measured prices; of constants all processes know by themselves."""
    measured = toy_engine.measured("main")
    _, said = _told_by_the_first_process(monkeypatch, 0, 0.0, 3, 2)
    given = {"rows": 1, "live": 1, "replay": None, "chunk": 0}
    _, chosen = choice.choose(measured, KNOWING, trains=True, **given)
    assert chosen.block == Block(3, 2) and chosen.kind.training
    np.testing.assert_array_equal(said, [[0, 0.0, 2, 1]])  # what this process would have said
    for programs, trains in ((measured, False), (toy_engine.engine("main"), True)):
        _, chosen = choice.choose(programs, KNOWING, trains=trains, **given)
        assert chosen.block == (Block(1, 1) if trains else NO_BLOCK)
    credit = dataclasses.replace(KNOWING, idle_credit=5.5)
    rounds = [(1, "chain-4", 3)]
    after, chosen = choice.choose_between_steps(measured, credit, rounds, replay=None)
    assert chosen.block == Block(3, 2) and after.idle_credit == pytest.approx(3.5 + 0.03 * 3 / 1.6)
    np.testing.assert_array_equal(said[1:], [[0, 0.0, 1, 5]])


# A microbatch takes as long as 1.6 rounds in the bucket of one row.
KNOWING = Controller(budget=Budget(rounds=(RoundTimes(1, "chain-4", (0.5,)),), microbatches=(0.8,)))


@pytest.mark.parametrize(
    ("rounds", "live", "whole_again"), [(3, 4, False), (4, 4, True), (10, 1, False), (11, 1, True)]
)
def test_a_broken_drafter_is_taken_for_whole_on_evidence_alone(rounds, live, whole_again):
    """A chunk that ended before it could have given up says nothing, as of a single row."""
    programs = toy_engine.engine("bandit")
    target, draft = toy_engine.counting()
    ran = toy_engine.roll(programs, (target, draft), toy_engine.counting_prompts(*[31] * 8))
    record = next(record for record in ran.chunks if record.strategy == "chain-2")
    idle = [0] * (len(record.rounds_run) - 1)
    record = dataclasses.replace(
        record, rounds_run=[rounds, *idle], row_rounds=[rounds * live, *idle]
    )
    known = dataclasses.replace(FRESH, broken=("trained",))
    after = rollout.taught(programs, known, Strategy(2), record, gave_up=False, timed=False)
    assert after.broken == (() if whole_again else ("trained",))


@pytest.mark.parametrize("threshold", [1, 2])
def test_a_threshold_turns_speculation_on_for_the_tail(threshold):
    result = _bandit_roll(threshold=threshold)[0]()
    assert {record.chosen for record in result.chunks} == {"threshold"}
    assert {record.give_up_below for record in result.chunks} == {0.0}  # there is no other choice
    seen = set()
    for record in result.chunks:
        few = max(record.live) <= threshold
        assert record.strategy == ({4: "chain-2", 1: "ngram-3"}[record.rows] if few else "plain")
        seen.add(record.strategy)
    assert seen >= {"plain", "ngram-3"}
