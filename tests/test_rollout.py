"""Rollouts of policies with known behaviour, and sampling exactly as plain decoding does it."""

import collections
import functools

import jax
import numpy as np
import pytest
import toy_engine
from toy_engine import BOS, NEVER, SHAPE, STOP

from tlt_jax import bandit as bandit_lib
from tlt_jax import choice, learner, metrics, packing
from tlt_jax.bandit import WINDOW
from tlt_jax.choice import Choice
from tlt_jax.controller import FRESH, Controller, calibrate
from tlt_jax.types import Strategy, UserError

LENGTHS = (30, 3, 5, 2, 8, 12, 1, 7)  # even sequences on slice 0, odd ones on slice 1
CHAINS_AND_PLAIN = pytest.mark.parametrize("name", ["main", "plain"])


def _counted(prompt, count):
    """The prompt and `count` further tokens of `counting`."""
    return [*prompt, *((prompt[-1] + 1 + np.arange(count)) % SHAPE.vocab_size)]


@CHAINS_AND_PLAIN
def test_counting_to_the_stop_token(name):
    """Through prefill, chunks, compaction to one row and growth of the caches."""
    asked = toy_engine.counting_prompts(*LENGTHS)
    result = toy_engine.roll(toy_engine.engine(name), toy_engine.counting(), asked)
    for response, prompt, count in zip(result.responses, asked, LENGTHS, strict=True):
        assert response.tokens.tolist() == _counted(prompt, count)
        assert response.tokens[-1] == STOP and response.prompt_length == 2
    assert {(r.rows, r.length) for r in result.chunks} >= {(4, 24), (1, 48)}


@CHAINS_AND_PLAIN
def test_counting_to_the_limit(name):
    asked = toy_engine.counting_prompts(*LENGTHS)
    programs, models = toy_engine.engine(name), toy_engine.counting()
    result = toy_engine.roll(programs, models, asked, stop_tokens=(NEVER,))
    for response, prompt in zip(result.responses, asked, strict=True):
        assert response.tokens.tolist() == _counted(prompt, 34)


@pytest.fixture(scope="module")
def random_rollout():
    """Responses in the order in which they were handed out, and the result; there is a tail."""
    handed = []
    seed, asked, _ = toy_engine.tailed()
    result = toy_engine.roll(
        toy_engine.engine("main"),
        (toy_engine.random_policy(), toy_engine.random_drafter()),
        asked,
        seed=seed,
        on_finished=handed.append,
    )
    return handed, result


def test_each_response_is_handed_out_once_and_as_it_ends(random_rollout):
    handed, result = random_rollout
    assert sorted(r.sequence for r in handed) == list(range(8))
    assert [r.sequence for r in result.responses] == list(range(8))
    lengths = [len(r.response) for r in handed]
    assert lengths[0] < lengths[-1] == max(lengths)
    for response in handed:
        assert response is result.responses[response.sequence]


def test_a_response_begins_with_its_prompt_and_ends_where_it_may(random_rollout):
    _, result = random_rollout
    for response, prompt in zip(result.responses, toy_engine.tailed()[1], strict=True):
        assert response.prompt_length == len(prompt)
        np.testing.assert_array_equal(response.tokens[: len(prompt)], prompt)
        assert np.all(response.log_probs[: len(prompt)] == 0)
        assert np.all(response.log_probs[len(prompt) :] < 0)
        assert response.response[-1] == STOP or len(response.response) == 34
        assert STOP not in response.response[:-1]


def test_records_add_up(random_rollout):
    _, result = random_rollout
    chunks = result.chunks
    assert [r.chunk for r in chunks] == list(range(len(chunks)))
    assert sum(sum(r.committed) for r in chunks) == sum(len(r.response) for r in result.responses)
    assert chunks[0].live == [4, 4]
    for record in chunks:
        assert max(record.rounds_run) <= record.rounds and record.seconds > 0
        for slice_, live in enumerate(record.live):
            assert record.rounds_run[slice_] <= record.row_rounds[slice_] or live == 0
            assert record.row_rounds[slice_] <= live * record.rounds_run[slice_]
            depth = len(record.accepted)
            assert record.committed[slice_] <= (depth + 1) * record.row_rounds[slice_]
    assert {r.strategy for r in chunks} == {"chain-2", "chain-4"}


def test_no_row_outgrows_its_cache_and_no_chunk_its_token_budget():
    """Rows of every chunk fit into its length bucket; a chunk of depth d has few enough rounds."""
    for chunk_tokens in (5, 12, 24):
        programs = toy_engine.engine("main").having(chunk_tokens=chunk_tokens)
        asked = toy_engine.counting_prompts(*LENGTHS)
        result = toy_engine.roll(programs, toy_engine.counting(), asked, stop_tokens=(NEVER,))
        for record in result.chunks:
            assert 1 <= record.rounds <= chunk_tokens // (len(record.accepted) + 1)
        assert all(len(r.response) == 34 for r in result.responses)


def test_trees_are_calibrated_from_chunk_to_chunk_and_rollout_to_rollout():
    """The estimate of a drafter that guesses badly comes down to what is accepted."""
    programs = toy_engine.engine("trees")
    models, errors = (toy_engine.random_policy(), toy_engine.random_drafter()), []
    controller = FRESH
    for step in range(8):
        asked = toy_engine.prompts(8, seed=step)
        result = toy_engine.roll(programs, models, asked, seed=step, controller=controller)
        expected = controller
        for record in result.chunks:
            assert len(record.expected) == len(record.accepted) <= 3
            rounds = sum(record.row_rounds)
            expected = calibrate(expected, rounds, record.accepted, record.expected)
        assert result.carry.controller.log_sharpness == expected.log_sharpness
        assert expected.log_sharpness != controller.log_sharpness
        controller = expected
        estimate = sum(record.expected[0] for record in result.chunks)
        accepted = sum(record.accepted[0] for record in result.chunks)
        errors.append((estimate - accepted) / sum(sum(r.row_rounds) for r in result.chunks))
    assert np.mean(errors[:2]) > 0.15 and abs(np.mean(errors[-4:])) < 0.1, errors


def test_the_ngram_drafter_knows_the_responses_of_the_rollout_before():
    """Greedy answers to the same prompts are the same: with them at hand nearly all is accepted."""
    programs = toy_engine.engine("ngram chain").having(temperature=0.0)
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    asked = toy_engine.prompts(8)
    first = toy_engine.roll(programs, models, asked, stop_tokens=(NEVER,))
    assert first.carry.library.added == 8
    library = jax.device_get(first.carry.library)
    pairs = zip(library.tokens, library.lengths, strict=True)
    stored = {tuple(tokens[:length]) for tokens, length in pairs if length}
    assert stored == {tuple(tokens) for tokens in toy_engine.tokens_of(first)}
    second = toy_engine.roll(
        programs, models, asked, stop_tokens=(NEVER,), library=first.carry.library
    )
    lengths = [metrics.accept_length(result.chunks) for result in (first, second)]
    assert lengths[0] < 4 < lengths[1], lengths


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


def _log_of(result):
    return [
        Choice(Strategy.parse(record.strategy), record.chosen, record.give_up_below)
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


@pytest.mark.parametrize("deal_by_length", [True, False])
def test_prompts_are_dealt_by_the_lengths_of_the_epoch_before(deal_by_length):
    """In turn, slice 0 gets all long ones; in the second epoch each slice gets two of them."""
    programs = toy_engine.engine("plain").having(temperature=0.0, deal_by_length=deal_by_length)
    lengths = [28, 3, 27, 4, 26, 5, 25, 6]
    asked = toy_engine.counting_prompts(*lengths)
    models, controller, rounds = toy_engine.counting(), FRESH, []
    for _ in range(2):
        result = toy_engine.roll(programs, models, asked, controller=controller)
        assert [len(response.response) for response in result.responses] == lengths
        controller = result.carry.controller
        by_slice = np.sum([record.committed for record in result.chunks], axis=0)
        rounds.append(by_slice.tolist())
    assert rounds[0] == [28 + 27 + 26 + 25, 3 + 4 + 5 + 6]
    assert (max(rounds[1]) < 70) == deal_by_length, rounds


def test_each_sequence_of_a_queue_is_stored_once():
    """A slot that was given to another sequence stores that one, too."""
    programs = toy_engine.engine("queue").having(temperature=0.0)
    asked = toy_engine.counting_prompts(*[3, 4, 5, 6] * 4)
    result = toy_engine.roll(programs, toy_engine.counting(), asked)
    buffer = jax.device_get(result.carry.buffer)
    stored = []
    for tokens, ids in zip(buffer.tokens, buffer.segment_ids, strict=True):
        for row, segments in zip(tokens, ids, strict=True):
            found = sorted(set(segments.tolist()) - {-1})
            stored += [row[segments == segment].tolist() for segment in found]
    assert sorted(stored) == sorted(r.tokens[:-1].tolist() for r in result.responses)


@pytest.mark.parametrize("refill", [True, False])
def test_those_who_wait_get_slots_as_they_fall_free(refill):
    """Sixteen sequences on twice two slots; without `refill` four at a time."""
    programs = toy_engine.engine("queue").having(refill=refill, chunk_tokens=6, temperature=0.0)
    lengths = [30, 3, 5, 2, 8, 12, 1, 7, 4, 4, 9, 20, 2, 6, 11, 3]
    handed = []
    result = toy_engine.roll(
        programs,
        toy_engine.counting(),
        toy_engine.counting_prompts(*lengths),
        on_finished=handed.append,
    )
    assert [len(response.response) for response in result.responses] == lengths
    assert sorted(response.sequence for response in handed) == list(range(16))
    full = [record for record in result.chunks if record.live == [2, 2]]
    if refill:
        assert len(full) >= len(result.chunks) - 5
        assert 0 not in [response.sequence for response in handed[:8]]
        last = max(i for i, record in enumerate(result.chunks) if record.live == [2, 2])
        assert {record.rows for record in result.chunks[: last + 1]} == {2}
    else:
        waves = [{response.sequence for response in handed[i : i + 4]} for i in range(0, 16, 4)]
        assert waves == [set(range(i, i + 4)) for i in range(0, 16, 4)]


def test_the_long_ones_do_not_wait():
    """Last in the first epoch, they come first in the second, which is over sooner."""
    programs = toy_engine.engine("queue").having(temperature=0.0, chunk_tokens=9)
    lengths = [9, 9, 9, 9, 9, 9, 30, 30]
    asked, models = toy_engine.counting_prompts(*lengths), toy_engine.counting()
    first = toy_engine.roll(programs, models, asked)
    second = toy_engine.roll(programs, models, asked, controller=first.carry.controller)
    rounds = [sum(max(r.rounds_run) for r in result.chunks) for result in (first, second)]
    assert rounds[1] < rounds[0], rounds


@pytest.fixture
def steady_clock(monkeypatch):
    """A round of plain decoding takes a second, one of a chain 1.6, whatever the machine does."""
    now, chunk = [0.0], toy_engine.Engine.chunk

    def timed(self, kind, *arguments):
        result = chunk(self, kind, *arguments)
        now[0] += int(result[-1].stats.rounds.max()) * (1.0 if kind.strategy.is_plain else 1.6)
        return result

    monkeypatch.setattr(toy_engine.Engine, "chunk", timed)
    monkeypatch.setattr(toy_engine.rollout.time, "monotonic", lambda: now[0])


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
            assert tokens.tolist() == _counted(prompt, 31)
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


def test_the_first_process_decides(monkeypatch):
    """Which strategy, and when to give it up: what this process says itself does not count."""
    told = np.array([1, 1.75], np.float32)
    monkeypatch.setattr(choice.jax, "process_count", lambda: 2)
    monkeypatch.setattr(choice.multihost_utils, "broadcast_one_to_all", lambda said: told)
    programs = toy_engine.engine("bandit").having(epsilon=0.0)
    _, chosen = choice.choose(programs, FRESH, rows=4, live=4, replay=None, chunk=0)
    assert (str(chosen.strategy), chosen.give_up_below) == ("chain-2", 1.75)
    told[0] = 0
    _, chosen = choice.choose(programs, FRESH, rows=4, live=4, replay=None, chunk=0)
    assert str(chosen.strategy) == "plain"


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


@pytest.mark.parametrize("length", [0, 7])
def test_a_prompt_that_does_not_fit_is_named(length):
    asked = toy_engine.prompts(8)
    asked[5] = np.full(length, BOS, np.int32)
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    with pytest.raises(UserError, match=rf"prompt 5 has {length} tokens.*max_prompt_length"):
        toy_engine.roll(toy_engine.engine("main"), models, asked)


def test_fewer_prompts_than_slots(random_rollout):
    """Padding rows are never answered, trained on, or in anybody's way."""
    _, full = random_rollout
    seed, asked, _ = toy_engine.tailed()
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    result = toy_engine.roll(toy_engine.engine("main"), models, asked[:5], seed=seed)
    wanted = toy_engine.tokens_of(full)[:5]
    got = toy_engine.tokens_of(result)
    assert not toy_engine.unexplained(
        got, wanted, toy_engine.random_policy(), toy_engine.ROLLOUT, seed=seed
    )
    assert result.carry.buffer.segments.tolist() == [3, 2]
    assert result.chunks[0].live == [3, 2]


def test_finished_sequences_are_stored_once_with_their_features(random_rollout):
    """Each slice's buffer holds its own responses less the last token, as the policy sees them."""
    _, result = random_rollout
    buffer = jax.device_get(result.carry.buffer)
    assert buffer.segments.tolist() == [4, 4]
    for slice_ in range(2):
        stored = []
        for row in range(buffer.tokens.shape[1]):
            segments = buffer.segment_ids[slice_, row]
            for segment in sorted(set(segments.tolist()) - {-1}):
                stored.append(buffer.tokens[slice_, row][segments == segment].tolist())
        own = [r.tokens[:-1].tolist() for r in result.responses[slice_::2]]
        assert sorted(stored) == sorted(own)


def test_the_same_prompt_is_answered_differently_by_sequence_and_key():
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    asked = [toy_engine.prompts(1)[0]] * 8
    rolls = [toy_engine.roll(toy_engine.engine("main"), models, asked, seed=s) for s in (0, 0, 1)]
    first, again, other = [[t.tolist() for t in toy_engine.tokens_of(r)] for r in rolls]
    assert first == again
    assert len({tuple(tokens) for tokens in first}) >= 6
    assert sum(a != b for a, b in zip(first, other, strict=True)) >= 6


def _check_against_one_by_one(programs, *, seed=0, stop_tokens=(STOP,)):
    """Tokens and behaviour log-probabilities are those of plain decoding; returns the result."""
    params, asked = toy_engine.random_policy(), toy_engine.prompts(8, seed=seed)
    models = params, toy_engine.random_drafter()
    result = toy_engine.roll(programs, models, asked, seed=seed, stop_tokens=stop_tokens)
    plain = toy_engine.one_by_one(
        params, programs.rollout, asked, seed=seed, stop_tokens=stop_tokens
    )
    got, wanted = toy_engine.tokens_of(result), [tokens for tokens, _ in plain]
    assert not toy_engine.unexplained(got, wanted, params, programs.rollout, seed=seed)
    same = 0
    for response, (tokens, log_probs) in zip(result.responses, plain, strict=True):
        if np.array_equal(response.tokens, tokens):
            np.testing.assert_allclose(response.log_probs, log_probs, rtol=0, atol=1e-4)
            same += 1
    assert same >= 6
    return result


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_temperature_acts_as_in_plain_decoding(temperature):
    programs = toy_engine.engine("main")
    compiled = programs.pool.compiled
    _check_against_one_by_one(programs.having(temperature=temperature), seed=3)
    assert programs.pool.compiled == compiled


@pytest.fixture(scope="module", params=["filtered", "filtered tree"])
def filtered(request):
    """A filtering engine after its first rollout."""
    programs = toy_engine.engine(request.param)
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    toy_engine.roll(programs, models, toy_engine.prompts(8), stop_tokens=(STOP, NEVER))
    return programs


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 6, 0.9), (1.3, 3, 1.0), (1.0, 0, 0.6), (0.0, 5, 0.8)]
)
def test_filters_act_as_in_plain_decoding(filtered, temperature, top_k, top_p):
    """Values of the filters are data; a top-k of 3 allows three tokens and no fourth."""
    compiled = filtered.pool.compiled
    programs = filtered.having(temperature=temperature, top_k=top_k, top_p=top_p)
    result = _check_against_one_by_one(programs, stop_tokens=(STOP, NEVER))
    assert filtered.pool.compiled == compiled
    if temperature:
        unfiltered = toy_engine.one_by_one(
            toy_engine.random_policy(),
            toy_engine.engine("plain").having(temperature=temperature).rollout,
            toy_engine.prompts(8),
        )
        differ = [
            not np.array_equal(r.tokens, tokens)
            for r, (tokens, _) in zip(result.responses, unfiltered, strict=True)
        ]
        assert any(differ)


def test_any_of_several_stop_tokens_ends_a_response(filtered):
    programs = filtered.having(temperature=1.0, top_k=20, top_p=1.0)
    result = _check_against_one_by_one(programs, stop_tokens=(STOP, NEVER))
    bodies = np.concatenate([r.response[:-1] for r in result.responses])
    common = int(np.argmax(np.bincount(bodies)))
    result = _check_against_one_by_one(programs, stop_tokens=(STOP, common))
    assert common in {int(r.response[-1]) for r in result.responses}
    for response in result.responses:
        assert not {STOP, common} & set(response.response[:-1].tolist())


@pytest.mark.parametrize("top_k", [0, 6])
def test_the_trainer_agrees_on_behaviour_log_probabilities(filtered, top_k):
    """Within 1e-4 nats; temperature and filters belong to the distribution on both sides."""
    programs = filtered.having(temperature=0.7, top_k=top_k, top_p=0.9)
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    asked = toy_engine.prompts(8, seed=5)
    responses = toy_engine.roll(programs, models, asked, stop_tokens=(STOP, NEVER)).responses
    batch = packing.pack(
        [r.tokens for r in responses],
        [r.prompt_length for r in responses],
        [r.log_probs for r in responses],
        [1.0] * 8,
        aggregation="token",
        row_length=64,
        rows=2,
    )
    recompute = jax.jit(learner.token_log_probs, static_argnames="config")
    sampler = toy_engine.sampling_params(programs.rollout)
    for index in range(len(batch.tokens)):
        one = packing.PackedBatch(*(x[index] for x in batch))
        again = np.asarray(recompute(models[0], SHAPE, sampler, one))
        counted = one.weights > 0
        np.testing.assert_allclose(again[counted], one.behaviour[counted], rtol=0, atol=1e-4)
        assert np.any(one.behaviour[counted] < -1)
