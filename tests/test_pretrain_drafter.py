"""A drafter made from a policy's own responses: it gets better, by a figure that can be checked."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_run

from tlt_jax import (
    drafter,
    offline_training,
    policy,
    pretrain_drafter,
    rl_step,
    sampling,
    setup,
    sharding,
    weights,
)
from tlt_jax.drafting import Models
from tlt_jax.types import INVALID, UserError

CONFIG = toy_run.changed(
    toy_run.CONFIG,
    drafter={"objective": "hass", "train_depth": 2},
    warm_start={
        "responses": 20,
        "drafter_steps": 60,
        "batch_rows": 4,
        "row_length": 72,
        "drafter_learning_rate": 1e-2,
    },
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """With a policy, in a folder that holds no drafter."""
    folder = tmp_path_factory.mktemp("policy")
    params = policy.init(CONFIG.policy, jax.random.key(3))
    weights.save(folder / "policy.safetensors", params)
    task = {"data_dir": str(tmp_path_factory.mktemp("data"))}
    return toy_run.changed(CONFIG, warm_start_dir=str(folder), task=task)


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """The folder of a drafter that was made for that policy."""
    folder = tmp_path_factory.mktemp("made")
    pretrain_drafter.pretrain(config, folder)
    return folder


def test_drafts_are_accepted_more_often_afterwards(made):
    report = json.loads((made / "pretrain_drafter.json").read_text())
    before, after = np.array(report["acceptance_before"]), np.array(report["acceptance"])
    assert before.shape == after.shape == (4,) and np.all((before > 0) & (after <= 1))
    assert after[0] > before[0] + 0.02 and np.mean(after) > np.mean(before)
    assert report["responses"] == 20 and report["tokens"] > 20


def test_the_folder_is_one_to_train_from(made, config):
    began = toy_run.changed(config, warm_start_dir=str(made))
    held, given = setup.initial_policy(began), setup.initial_policy(config)
    jax.tree.map(np.testing.assert_array_equal, held, given)
    draft, random = setup.initial_drafter(began), setup.initial_drafter(config)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), draft, random)
    assert min(jax.tree.leaves(moved)) > 0


def test_responses_are_the_policys_own_and_each_is_packed_once(config):
    mesh = sharding.make_mesh(config.mesh)
    target = rl_step.rollout_layout(mesh, config)(setup.initial_policy(config))
    responses = pretrain_drafter.sample(config, mesh, target)
    assert len(responses) == 20 and len({r.tokens.tobytes() for r in responses}) == 20
    rows = offline_training.packed(config, responses)
    found = []
    for row, segments in enumerate(rows["segment_ids"]):
        for segment in set(segments.tolist()) - {INVALID}:
            here = segments == segment
            np.testing.assert_array_equal(rows["positions"][row, here], np.arange(here.sum()))
            found.append(rows["tokens"][row, here].tolist())
    assert sorted(found) == sorted(r.tokens.tolist() for r in responses)


def test_the_acceptance_is_that_of_every_row_once(config):
    """Three rows in batches of four are as good as one by one: what fills up counts for nothing."""
    mesh = sharding.make_mesh(config.mesh)
    params = setup.initial_policy(config)
    models = Models(params, setup.initial_drafter(config))
    rng = np.random.default_rng(0)
    rows = {
        "tokens": rng.integers(3, 60, (3, 72)).astype(np.int32),
        "positions": np.tile(np.arange(72, dtype=np.int32), (3, 1)),
        "segment_ids": np.repeat(np.array([[0], [1], [2]], np.int32), 72, axis=1),
    }
    found = pretrain_drafter.acceptance(config, mesh, rows, models)
    _, features = policy.packed_forward(params, config.policy, *map(jnp.asarray, rows.values()))
    embedded = policy.embed(params, jnp.roll(rows["tokens"], -1, axis=1))
    estimates = drafter.packed_steps(
        models.draft,
        config.policy,
        features,
        embedded,
        rows["positions"],
        rows["segment_ids"],
        jnp.zeros(3, jnp.int32),
        count=72,
        steps=1,
    )[0][0]
    p, q = (
        sampling.probs(policy.logits(params, x), sampling.params_of(config.rollout))
        for x in (features[:, 1:], estimates[:, :-1])
    )
    pairs = jnp.maximum(p[..., None, :] / p[..., None], q[..., None, :] / q[..., None])
    exact = np.mean(np.sum(1 / np.sum(pairs, axis=-1), axis=-1))
    np.testing.assert_allclose(found[0], exact, atol=2e-4)


def test_a_single_row_is_not_enough(config, tmp_path):
    few = toy_run.changed(config, warm_start={"responses": 1})
    with pytest.raises(UserError, match=r"config\.warm_start\.responses is 1; so few"):
        pretrain_drafter.pretrain(few, tmp_path)
    assert not list(tmp_path.iterdir())


def test_rows_in_order_come_once(config):
    rows = {"tokens": np.arange(10)[:, None], "segment_ids": np.zeros((10, 1), np.int64)}
    mesh = sharding.make_mesh(config.mesh)
    batches = list(offline_training.in_order(rows, config, mesh))
    assert [batch["tokens"].shape for batch in batches] == [(4, 1)] * 3
    filled = np.concatenate([batch["segment_ids"] for batch in batches])[:, 0]
    np.testing.assert_array_equal(filled, [0] * 10 + [INVALID] * 2)
    tokens = np.concatenate([batch["tokens"] for batch in batches])[:10, 0]
    np.testing.assert_array_equal(tokens, np.arange(10))
