"""Which sequence sits in which row: dealt by length, waiting for slots, stored when it ended."""

import numpy as np
import pytest
import toy_engine

from tlt_jax.controller import FRESH


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
    programs = toy_engine.engine("queue").having(temperature=0.0, chunk_tokens=6)
    asked = toy_engine.counting_prompts(*[3, 20, 5, 12] * 4)
    result = toy_engine.roll(programs, toy_engine.counting(), asked)
    stored = [tokens for slice_ in toy_engine.stored(result.carry.buffer) for tokens in slice_]
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
