"""The policy update: its gradient by definition, on any mesh and packing; metrics by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_engine
from toy_engine import SHAPE

from tlt_jax import learner, packing, policy, sampling, sharding
from tlt_jax.config import LearnerConfig, MeshConfig

CONFIG = LearnerConfig(kl_coef=0.0, row_length=24, microbatch_rows=2)
SAMPLER = sampling.make_params(0.8, 0, 1.0, filtered=False)
LENGTHS = (20, 12, 9, 14, 5, 22, 7)
PROMPTS = (4, 2, 3, 5, 2, 6, 1)
ADVANTAGES = (1.0, -0.5, 2.0, -1.5, 0.5, -1.0, 0.25)
CLOSE = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-5)


@functools.cache
def _tokens():
    rng = np.random.default_rng(0)
    return [rng.integers(0, SHAPE.vocab_size, n).astype(np.int32) for n in LENGTHS]


def _batch(*, row_length=24, rows=2, aggregation="token", behaviour=-1.0):
    return packing.pack(
        _tokens(),
        PROMPTS,
        [np.full(n, behaviour, np.float32) for n in LENGTHS],
        ADVANTAGES,
        aggregation=aggregation,
        row_length=row_length,
        rows=rows,
    )


@functools.cache
def _mesh(slices, tensor):
    return sharding.make_mesh(MeshConfig(slices=slices, tensor=tensor))


@functools.cache
def _program(mesh, config, tx):
    return learner.update_program(mesh, SHAPE, config, tx)


SGD = optax.sgd(1.0)


def _update(batch, *, config=CONFIG, tx=SGD, mesh=None, count=None, params=None):
    """(state, metrics) of one step from `params`; with SGD(1) the gradient is what they lose."""
    mesh = mesh or _mesh(1, 1)
    params = params or toy_engine.random_policy()
    whole = sharding.replicated(mesh)
    state = learner.init_state(mesh, SHAPE, tx, jax.device_put(params, whole))
    specs = sharding.tree_shardings(policy.param_specs(SHAPE), mesh, sharding.ROLLOUT_RULES)
    return _program(mesh, config, tx)(
        state,
        jax.device_put(params, specs),
        jax.device_put(SAMPLER, whole),
        jax.device_put(batch, learner.batch_sharding(mesh)),
        jax.device_put(np.int32(len(batch.tokens) if count is None else count), whole),
    )


def _gradient(batch, **options):
    state, metrics = _update(batch, **options)
    old = toy_engine.random_policy()
    return jax.tree.map(lambda a, b: np.asarray(a - b), old, jax.device_get(state.params)), metrics


def _assert_trees_close(got, wanted):
    jax.tree.map(CLOSE, got, wanted)


@jax.jit
def _objective(params, tokens, weights):
    """Policy-gradient objective of unpacked rows: minus weighted log-probabilities, [N, W]."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = policy.packed_forward(params, SHAPE, tokens, positions, jnp.zeros_like(tokens))
    scores = jax.nn.log_softmax(policy.logits(params, hidden[:, :-1]) / 0.8, axis=-1)
    chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(chosen * weights[:, 1:])


@pytest.fixture(scope="module")
def by_definition():
    """The policy gradient of the batch, from one sequence a row and no microbatch."""
    tokens = np.zeros((len(LENGTHS), 24), np.int32)
    weights = np.zeros(tokens.shape, np.float32)
    responses = sum(LENGTHS) - sum(PROMPTS)
    for row, (sequence, prompt) in enumerate(zip(_tokens(), PROMPTS, strict=True)):
        tokens[row, : len(sequence)] = sequence
        weights[row, prompt : len(sequence)] = ADVANTAGES[row] / responses
    return jax.device_get(jax.grad(_objective)(toy_engine.random_policy(), tokens, weights))


@pytest.fixture(scope="module")
def plain():
    """(gradient, metrics) on one device."""
    return _gradient(_batch())


def test_the_gradient_is_the_policy_gradient(plain, by_definition):
    """On policy the ratio is one; microbatches, packing and segments leave no trace."""
    assert len(_batch().tokens) == 2
    _assert_trees_close(plain[0], by_definition)
    norm = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in jax.tree.leaves(by_definition)))
    CLOSE(plain[1].grad_norm, norm)


def test_a_sharded_update_is_the_plain_one(plain):
    """Two slices of two devices: parameters sharded over both axes, rows over the slices."""
    sharded, metrics = _gradient(_batch(), mesh=_mesh(2, 2))
    _assert_trees_close(sharded, plain[0])
    for name, ours, theirs in zip(metrics._fields, metrics, plain[1], strict=True):
        CLOSE(ours, theirs, err_msg=name)


def test_another_packing_gives_the_same_gradient(plain):
    other = _batch(row_length=48, rows=1)
    assert other.tokens.shape[1:] != _batch().tokens.shape[1:]
    gradient, metrics = _gradient(other)
    _assert_trees_close(gradient, plain[0])
    CLOSE(metrics.loss, plain[1].loss)


def test_microbatches_beyond_the_count_change_nothing():
    """Whatever they hold; a batch whose count is one microbatch is that microbatch alone."""
    batch = _batch()
    padded = packing.pad_microbatches(batch, 4)
    junk = packing.PackedBatch(*(x.copy() for x in padded))
    for field in junk:
        field[2:] = 7
    clean, spoilt, first = (_gradient(b, count=n) for b, n in ((padded, 2), (junk, 2), (padded, 1)))
    jax.tree.map(np.testing.assert_array_equal, clean, spoilt)
    sums = [float(x[1].loss) for x in (clean, first)]
    assert sums[0] != sums[1]


def test_the_loss_by_hand_for_both_aggregations(plain):
    """At ratio one a token costs minus its advantage: over tokens, or over responses first."""
    responses = np.array(LENGTHS) - np.array(PROMPTS)
    by_token = -np.dot(responses, ADVANTAGES) / responses.sum()
    CLOSE(plain[1].loss, by_token)
    sequences, metrics = _gradient(_batch(aggregation="sequence"))
    CLOSE(metrics.loss, -np.mean(ADVANTAGES))
    differ = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), sequences, plain[0])
    assert max(jax.tree.leaves(differ)) > 1e-3
    assert float(plain[1].clip_share) == 0


@functools.partial(jax.jit, static_argnames="config")
def _loss(params, reference, old, config, batch):
    return learner.microbatch_loss(params, reference, old, SHAPE, config, SAMPLER, batch)


_log_probs = jax.jit(learner.token_log_probs, static_argnames="config")


@pytest.fixture(scope="module")
def microbatch():
    """All sequences in one microbatch."""
    batch = _batch(rows=4)
    assert len(batch.tokens) == 1
    return packing.PackedBatch(*(x[0] for x in batch))


def test_kl_is_zero_against_itself_and_penalises_the_rest(microbatch):
    params, other = toy_engine.random_policy(), toy_engine.random_policy(seed=5)
    config = dataclasses.replace(CONFIG, kl_coef=0.5)
    itself, metrics = _loss(params, params, None, config, microbatch)
    assert float(metrics.kl) == 0
    loss, metrics = _loss(params, other, None, config, microbatch)
    ratio = np.float64(_log_probs(other, SHAPE, SAMPLER, microbatch)) - np.float64(
        _log_probs(params, SHAPE, SAMPLER, microbatch)
    )
    kl = np.sum((np.expm1(ratio) - ratio) * microbatch.weights)
    assert kl > 0.1
    CLOSE(metrics.kl, kl, rtol=1e-3)
    CLOSE(loss - itself, 0.5 * kl, rtol=1e-3)


def test_importance_weights_by_hand(microbatch):
    """Behaviour three times less likely than the policy: weights of 3, cut to the cap of 2."""
    params = toy_engine.random_policy()
    own = _log_probs(params, SHAPE, SAMPLER, microbatch)
    rarer = microbatch._replace(behaviour=own - np.log(3.0))
    plain, metrics = _loss(params, params, None, CONFIG, rarer)
    CLOSE(metrics.logprob_gap_mean, np.log(3.0), rtol=1e-4)
    CLOSE(metrics.logprob_gap_max, np.log(3.0), rtol=1e-4)
    for cap, weight in ((2.0, 2.0), (5.0, 3.0)):
        config = dataclasses.replace(CONFIG, importance_cap=cap)
        CLOSE(_loss(params, params, None, config, rarer)[0], weight * plain, rtol=1e-4)


def test_the_gap_does_not_look_at_prompts(microbatch):
    params = toy_engine.random_policy()
    own = np.array(_log_probs(params, SHAPE, SAMPLER, microbatch))
    behaviour = np.where(microbatch.weights > 0, own, 99.0)
    first = tuple(np.argwhere(microbatch.weights > 0)[0])
    behaviour[first] += 0.25
    _, metrics = _loss(params, params, None, CONFIG, microbatch._replace(behaviour=behaviour))
    CLOSE(metrics.logprob_gap_max, 0.25, rtol=1e-4)
    CLOSE(metrics.logprob_gap_mean, 0.25 * microbatch.weights[first], rtol=1e-3)


def test_a_sampled_token_is_never_filtered(microbatch):
    """Its log-probability stays finite even where the filter would leave one other token."""
    narrow = sampling.make_params(1.0, 1, 1.0, filtered=True)
    scores = _log_probs(toy_engine.random_policy(), SHAPE, narrow, microbatch)
    counted = np.asarray(scores)[microbatch.weights > 0]
    assert np.all(np.isfinite(counted)) and counted.min() > -50 and counted.max() <= 0
    # Only two logits are left: the best token's and the sampled one's.
    assert np.all((counted == 0) | (counted <= -np.log(2) + 1e-5))


def test_an_update_makes_good_responses_likelier_and_bad_ones_less(microbatch):
    config = dataclasses.replace(CONFIG, learning_rate=1e-3, warmup_steps=0)
    state, metrics = _update(_batch(), config=config, tx=_adam(config))
    before = _log_probs(toy_engine.random_policy(), SHAPE, SAMPLER, microbatch)
    after = _log_probs(jax.device_get(state.params), SHAPE, SAMPLER, microbatch)
    gained = np.sum(np.asarray(after - before) * microbatch.weights * microbatch.advantages)
    assert gained > 0 and int(state.step) == 1
    for sequence, advantage in enumerate(ADVANTAGES):
        own = (microbatch.segment_ids == sequence) & (microbatch.weights > 0)
        if abs(advantage) >= 1:
            assert np.sign(np.sum(np.asarray(after - before)[own])) == np.sign(advantage)
    assert float(metrics.grad_norm) > 0


@functools.cache
def _adam(config):
    return learner.optimizer(config, 10)


def test_a_second_update_keeps_the_ratio_to_the_first():
    """It is the gradient of the ratio's objective, with the log-probabilities before the first."""
    config = dataclasses.replace(CONFIG, updates_per_step=2, clip_low=1.0, clip_high=1e6)
    params = toy_engine.random_policy()
    batch = _batch(rows=4)
    one = packing.PackedBatch(*(x[0] for x in batch))
    old = _log_probs(params, SHAPE, SAMPLER, one)

    @jax.jit
    def step(params, old):
        gradient = jax.grad(
            lambda p: learner.microbatch_loss(p, p, old, SHAPE, config, SAMPLER, one)[0]
        )(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)

    wanted = step(step(params, old), old)
    state, metrics = _update(batch, config=config, tx=optax.sgd(0.05))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        jax.device_get(state.params),
        jax.device_get(wanted),
    )
    assert int(state.step) == 1 and float(metrics.clip_share) == 0


def test_a_second_update_is_clipped(microbatch):
    """Once moved past the clip, tokens are counted, and those clipped pull no further."""
    params = toy_engine.random_policy()
    own = _log_probs(params, SHAPE, SAMPLER, microbatch)
    config = dataclasses.replace(CONFIG, clip_low=0.2, clip_high=0.28)
    up = np.where(microbatch.advantages > 0, 1.0, -1.0)
    # Every token has moved by 0.5 nats in the direction of its advantage.
    loss, metrics = _loss(params, params, own - 0.5 * up, config, microbatch)
    CLOSE(metrics.clip_share, 1.0)
    wanted = -np.sum(
        microbatch.weights * microbatch.advantages * np.where(up > 0, 1.28, 0.8), dtype=np.float64
    )
    CLOSE(loss, wanted)
    gradient = jax.grad(lambda p: _loss(p, params, own - 0.5 * up, config, microbatch)[0])(params)
    assert all(not np.any(x) for x in jax.tree.leaves(gradient))


def test_schedules_by_hand():
    config = LearnerConfig(learning_rate=0.4, warmup_steps=4, decay="constant")
    rate = learner.schedule(config, 12)
    assert [float(rate(n)) for n in (0, 2, 4, 11)] == pytest.approx([0.1, 0.25, 0.4, 0.4])
    linear = learner.schedule(dataclasses.replace(config, decay="linear"), 12)
    assert [float(linear(n)) for n in (4, 8, 12)] == pytest.approx([0.4, 0.2, 0.0])
    cosine = learner.schedule(dataclasses.replace(config, decay="cosine"), 12)
    assert [float(cosine(n)) for n in (4, 6, 8, 12)] == pytest.approx(
        [0.4, 0.2 * (1 + np.cos(np.pi / 4)), 0.2, 0.0], abs=1e-6
    )


def test_schedules_count_updates():
    config = LearnerConfig(learning_rate=0.4, warmup_steps=2, decay="linear", updates_per_step=3)
    rate = learner.schedule(config, 4)
    assert [float(rate(n)) for n in (0, 3, 6, 9, 12)] == pytest.approx(
        [0.4 / 6, 0.2333, 0.4, 0.2, 0], abs=1e-4
    )


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_schedules_without_warm_up_begin_at_the_top(decay):
    config = LearnerConfig(learning_rate=0.4, warmup_steps=0, decay=decay)
    assert float(learner.schedule(config, 5)(0)) == pytest.approx(0.4)


def test_moments_lie_where_their_parameters_lie():
    mesh, tx = _mesh(2, 2), learner.optimizer(CONFIG, 10)
    state = learner.init_state(mesh, SHAPE, tx, toy_engine.random_policy())
    held = [x.sharding for x in jax.tree.leaves(state.params)]
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(state.opt_state, name)
        assert [x.sharding for x in jax.tree.leaves(moments)] == held
    ffn = state.params["layers"][0]["gate_up"]  # [D, 2, F]: over both axes
    assert {s.data.shape for s in ffn.addressable_shards} == {(16, 2, 12)}
    assert int(state.step) == 0
