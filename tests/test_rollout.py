"""Rollouts of policies with known behaviour, and sampling exactly as plain decoding does it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_engine
from toy_engine import BOS, NEVER, SHAPE, STOP

from tlt_jax import learner, metrics, packing
from tlt_jax.controller import FRESH, calibrate
from tlt_jax.types import UserError

LENGTHS = (30, 3, 5, 2, 8, 12, 1, 7)  # even sequences on slice 0, odd ones on slice 1
CHAINS_AND_PLAIN = pytest.mark.parametrize("name", ["main", "plain"])


@CHAINS_AND_PLAIN
def test_counting_to_the_stop_token(name):
    """Through prefill, chunks, compaction to one row and growth of the caches."""
    asked = toy_engine.counting_prompts(*LENGTHS)
    result = toy_engine.roll(toy_engine.engine(name), toy_engine.counting(), asked)
    for response, prompt, count in zip(result.responses, asked, LENGTHS, strict=True):
        assert response.tokens.tolist() == toy_engine.counted(prompt, count)
        assert response.tokens[-1] == STOP and response.prompt_length == 2
    assert {(r.rows, r.length) for r in result.chunks} >= {(4, 24), (1, 48)}


@CHAINS_AND_PLAIN
def test_counting_to_the_limit(name):
    asked = toy_engine.counting_prompts(*LENGTHS)
    programs, models = toy_engine.engine(name), toy_engine.counting()
    result = toy_engine.roll(programs, models, asked, stop_tokens=(NEVER,))
    for response, prompt in zip(result.responses, asked, strict=True):
        assert response.tokens.tolist() == toy_engine.counted(prompt, 34)


@pytest.mark.parametrize("part", [0, 1])
def test_the_drafter_reads_the_hidden_state_it_wants(part):
    """Of two layers of a policy that counts; through prefill, rounds and refills.

    The drafter moves the token on by one as it reads, and nowhere else: what it has not read
    guesses nothing.
    """
    asked = toy_engine.counting_prompts(*LENGTHS)
    target, draft = toy_engine.counting()
    onward = draft["fuse"][0]
    draft = draft | {"fuse": jnp.stack([jnp.eye(SHAPE.width), jnp.zeros_like(onward)])}
    models = target, toy_engine.fused(draft, part=part, matrix=onward)
    result = toy_engine.roll(toy_engine.engine("fused"), models, asked, learn=False)
    for response, prompt, count in zip(result.responses, asked, LENGTHS, strict=True):
        assert response.tokens.tolist() == toy_engine.counted(prompt, count)
    drafted = [sum(record.row_rounds) for record in result.chunks]
    accepted = [record.accepted[0] for record in result.chunks]
    # A row's first guess is made from its prompt; its last round may end before the drafts do.
    assert sum(accepted) >= sum(drafted) - 2 * len(LENGTHS) > 0


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
    assert result.carry.buffer.segments.tolist() == [4, 4]
    for slice_, stored in enumerate(toy_engine.stored(result.carry.buffer)):
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
