"""Drafts replayed on a rollout's sequences: rounds by hand, and those of real rollouts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_engine

from tlt_jax import draft_replay, setup
from tlt_jax.config import RunConfig, WarmStartConfig

CONFIG = RunConfig(policy=toy_engine.SHAPE, warm_start=WarmStartConfig(row_length=96, batch_rows=4))


def test_rounds_by_hand():
    """Prompt of 2, response of 7, two drafts a round; 1 where a draft is right.

    Round one drafts tokens 2 and 3, both right, and takes 4 as well. Round two drafts 5, wrong,
    and takes the target's. Round three drafts 6, right, and 7, wrong, and takes the target's 7.
    Round four has one token left, which is drafted and right: there is no further one to take.
    """
    first = [0, 0, 1, 0, 0, 0, 1, 0, 1]
    second = [1, 1, 0, 1, 1, 1, 1, 0, 1]
    found = draft_replay.count_rounds(np.array([first, second], bool), 2)
    assert (found.rounds, found.committed) == (4, 7)
    assert found.drafted.tolist() == [4, 3] and found.accepted.tolist() == [3, 1]
    assert found.accept_length == 7 / 4
    assert found.accept_by_position == [3 / 4, 1 / 3]


def _replayed(programs, target, draft, responses, seed, *, depth):
    shown = draft_replay.show(CONFIG, programs.mesh, target, jax.random.key(seed), responses)
    sampler = toy_engine.sampling_params(programs.rollout)
    return draft_replay.replay(draft, programs.policy, sampler, shown, depth=depth)


@pytest.mark.parametrize(("name", "depth"), [("one slice", 2), ("four slices", 4)])
@pytest.mark.parametrize("drafter", ["random", "mirrored"])
def test_a_replay_has_the_rounds_of_the_rollout(name, depth, drafter):
    """Sequences of plain decoding tell what a rollout with the drafter needs rounds for."""
    programs = toy_engine.engine(name)
    models = toy_engine.mirrored() if drafter == "mirrored" else (
        toy_engine.random_policy(), toy_engine.random_drafter(),
    )  # fmt: skip
    seed, asked, _ = toy_engine.tailed(drafter)
    rolled = toy_engine.roll(programs, models, asked, seed=seed, learn=False)
    target = toy_engine.place(programs, models[0])
    plain = toy_engine.roll(toy_engine.engine("plain"), models, asked, seed=seed)
    found = _replayed(programs, target, models[1], plain.responses, seed, depth=depth)
    records = rolled.chunks
    assert found.committed == sum(sum(record.committed) for record in records)
    assert found.rounds == sum(sum(record.row_rounds) for record in records)
    hits = sum(np.array(record.accepted) for record in records)
    assert found.accepted[0] <= hits[0] <= found.accepted[0] + len(asked)  # ends may be guessed
    if drafter == "mirrored":
        np.testing.assert_array_equal(found.accepted, found.drafted)


def test_other_noise_gives_other_rounds():
    programs, models = (
        toy_engine.engine("one slice"),
        (toy_engine.random_policy(), toy_engine.random_drafter()),
    )
    seed, asked, _ = toy_engine.tailed()
    target = toy_engine.place(programs, models[0])
    responses = toy_engine.roll(toy_engine.engine("plain"), models, asked, seed=seed).responses
    own, other = (
        _replayed(programs, target, models[1], responses, s, depth=2) for s in (seed, seed + 1)
    )
    assert own.rounds < other.rounds


def test_a_drafter_that_reads_more_is_judged_by_what_it_reads(tmp_path):
    """Widened, a drafter gives the same drafts, with the features of one more layer."""
    programs, draft = toy_engine.engine("one slice"), toy_engine.random_drafter()
    seed, asked, _ = toy_engine.tailed()
    target = toy_engine.place(programs, toy_engine.random_policy())
    responses = toy_engine.roll(
        toy_engine.engine("plain"), (toy_engine.random_policy(), draft), asked, seed=seed
    ).responses
    narrow = _replayed(programs, target, draft, responses, seed, depth=2)
    wide = dataclasses.replace(CONFIG, policy=toy_engine.FUSED)
    shown = draft_replay.show(wide, programs.mesh, target, jax.random.key(seed), responses)
    assert shown.batches[0].features.shape[-1] == 2 * toy_engine.SHAPE.width
    sampler = toy_engine.sampling_params(programs.rollout)
    widened = setup.drafter.widened(draft, toy_engine.FUSED)
    for params, policy in ((draft, toy_engine.SHAPE), (widened, toy_engine.FUSED)):
        found = draft_replay.replay(params, policy, sampler, shown, depth=2)
        jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(narrow))
    spoiled = widened | {"read": jnp.flip(widened["read"], axis=0)}
    assert draft_replay.replay(
        spoiled, toy_engine.FUSED, sampler, shown, depth=2
    ).rounds != narrow.rounds  # fmt: skip
