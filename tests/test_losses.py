"""Losses: hand arithmetic, then identities between special cases and known things."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import losses

_grpo = functools.partial(losses.grpo, clip_low=0.2, clip_high=0.28, kl_coef=0.0)


def _random_log_probs(seed, shape=(3, 8)):
    return jnp.asarray(-np.random.default_rng(seed).exponential(size=shape), jnp.float32)


def _of_ratio(ratio, advantage, **changes):
    one = jnp.array([np.log(ratio) - 1.0])
    return _grpo(one, jnp.array([-1.0]), jnp.array([advantage]), one, **changes)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.1, 2.0, -2.2, 0.0),
        (1.4, 2.0, -2.56, 1.0),  # above 1.28 there is nothing more to gain
        (0.5, 2.0, -1.0, 0.0),  # a fall that hurts is not clipped
        (0.5, -2.0, 1.6, 1.0),  # below 0.8 there is nothing more to gain
        (1.4, -2.0, 2.8, 0.0),
        (1.4, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_by_hand(ratio, advantage, loss, clipped):
    found = _of_ratio(ratio, advantage)
    np.testing.assert_allclose(found.loss, [loss], rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found.clipped, [clipped])
    assert found.clipped.dtype == jnp.float32


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"), [(1.1, 2.0, -2.2), (1.4, 2.0, 0.0), (0.5, -2.0, 0.0)]
)
def test_a_clipped_token_has_no_gradient(ratio, advantage, slope):
    one, old = jnp.array([np.log(ratio) - 1.0]), jnp.array([-1.0])
    found = jax.grad(lambda x: _grpo(x, old, jnp.array([advantage]), one).loss[0])(one)
    np.testing.assert_allclose(found, [slope], rtol=1e-6)


def test_on_policy_the_gradient_is_the_policy_gradient():
    log_probs, advantages = _random_log_probs(0), _random_log_probs(1) + 1
    gradient = jax.grad(lambda x: jnp.sum(_grpo(x, log_probs, advantages, log_probs).loss))(
        log_probs
    )
    np.testing.assert_allclose(gradient, -advantages, rtol=1e-6)


def test_kl_by_hand_and_its_weight():
    # r = log 2: 2 - 1 - log 2 = 0.306853 nats.
    log_probs, reference = jnp.log(jnp.array([0.25])), jnp.log(jnp.array([0.5]))
    np.testing.assert_allclose(losses.low_variance_kl(log_probs, reference), [0.306853], rtol=1e-5)
    found = losses.grpo(
        log_probs,
        log_probs,
        jnp.array([3.0]),
        reference,
        clip_low=0.2,
        clip_high=0.2,
        kl_coef=0.1,
    )
    np.testing.assert_allclose(found.kl, [0.306853], rtol=1e-5)
    np.testing.assert_allclose(found.loss, [-3.0 + 0.0306853], rtol=1e-6)


def test_kl_estimate_is_never_negative_and_unbiased():
    rng = np.random.default_rng(0)
    policy, reference = (np.log(rng.dirichlet(np.ones(6))) for _ in range(2))
    estimates = np.asarray(
        losses.low_variance_kl(
            jnp.asarray(policy, jnp.float32), jnp.asarray(reference, jnp.float32)
        )
    )
    assert np.all(estimates >= 0)
    exact = np.sum(np.exp(policy) * (policy - reference))
    np.testing.assert_allclose(np.sum(np.exp(policy) * estimates), exact, rtol=1e-5)
    np.testing.assert_array_equal(losses.low_variance_kl(jnp.ones(3), jnp.ones(3)), np.zeros(3))


def test_truncated_importance_by_hand():
    old, behaviour = jnp.log(jnp.array([0.5, 0.4, 0.1])), jnp.log(jnp.array([0.5, 0.1, 0.2]))
    np.testing.assert_allclose(
        losses.truncated_importance(old, behaviour, 2.0), [1.0, 2.0, 0.5], rtol=1e-6
    )


def test_smooth_l1_by_hand():
    # 0.5 * 0.5^2 = 0.125 inside, 3 - 0.5 = 2.5 outside, on either side of the target.
    estimate, target = jnp.array([[0.5, -3.0], [1.0, 0.0]]), jnp.zeros((2, 2))
    np.testing.assert_allclose(
        losses.smooth_l1(estimate, target), [(0.125 + 2.5) / 2, 0.25], rtol=1e-6
    )
    gradient = jax.grad(lambda x: jnp.sum(losses.smooth_l1(x, target)))(estimate)
    np.testing.assert_allclose(gradient, [[0.25, -0.5], [0.5, 0.0]], rtol=1e-6)
    assert losses.smooth_l1(estimate.astype(jnp.bfloat16), target).dtype == jnp.float32


def test_soft_cross_entropy_by_hand_and_its_gradient():
    logits, target = jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.log(jnp.array([0.25, 0.5, 0.25]))
    by_hand = 0.25 * np.log(2) + 0.75 * np.log(4)
    np.testing.assert_allclose(losses.soft_cross_entropy(logits, target), by_hand, rtol=1e-6)
    gradient = jax.grad(losses.soft_cross_entropy)(logits, target)
    np.testing.assert_allclose(gradient, [0.25, -0.25, 0.0], atol=1e-6)


def test_soft_cross_entropy_of_a_match_is_the_entropy():
    logits = 3 * _random_log_probs(2)
    probs = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
    entropy = -np.sum(probs * np.log(probs), axis=-1)
    np.testing.assert_allclose(losses.soft_cross_entropy(logits, logits + 5), entropy, rtol=1e-5)
    others = losses.soft_cross_entropy(jnp.roll(logits, 1, axis=-1), logits)
    assert np.all(others > entropy)


def _two_distributions(seed, spread=2.0):
    return np.random.default_rng(seed).normal(scale=spread, size=(2, 4, 9)).astype(np.float32)


def _softmax(logits):
    grown = np.exp(logits.astype(np.float64))
    return grown / grown.sum(axis=-1, keepdims=True)


def test_coupled_acceptance_is_the_double_sum():
    logits, target_logits = _two_distributions(0)
    q, p = _softmax(logits), _softmax(target_logits)
    pairs = np.maximum(p[..., None, :] / p[..., None], q[..., None, :] / q[..., None])
    found = losses.coupled_acceptance(logits, target_logits)
    np.testing.assert_allclose(found, np.sum(1 / pairs.sum(axis=-1), axis=-1), rtol=1e-5)


def test_coupled_acceptance_is_how_often_noisy_arg_maxes_agree():
    logits, target_logits = _two_distributions(1)
    noise = np.random.default_rng(2).gumbel(size=(40_000, *logits.shape))
    agree = np.argmax(logits + noise, axis=-1) == np.argmax(target_logits + noise, axis=-1)
    found = losses.coupled_acceptance(logits, target_logits)
    np.testing.assert_allclose(found, agree.mean(axis=0), atol=4 * 0.5 / 200)  # 4 deviations


def test_rejection_acceptance_is_how_often_a_draft_is_kept():
    logits, target_logits = _two_distributions(3)
    q, p = _softmax(logits), _softmax(target_logits)
    kept = np.sum(q * np.minimum(1, p / q), axis=-1)
    np.testing.assert_allclose(losses.rejection_acceptance(logits, target_logits), kept, rtol=1e-5)


_ACCEPTANCE = (losses.coupled_acceptance, losses.rejection_acceptance)


@pytest.mark.parametrize("acceptance", _ACCEPTANCE)
def test_what_equals_the_target_is_always_accepted_and_what_is_apart_never(acceptance):
    logits = jnp.asarray(_two_distributions(4)[0])
    np.testing.assert_allclose(acceptance(logits, logits + 3), 1, rtol=1e-5)
    left, right = jnp.array([0.0, 0.5, -1e30, -1e30]), jnp.array([-1e30, -1e30, 0.0, 0.5])
    np.testing.assert_allclose(acceptance(left, right), 0, atol=1e-6)


@pytest.mark.parametrize("acceptance", _ACCEPTANCE)
def test_the_gradient_of_an_acceptance_is_its_slope(acceptance):
    logits, target_logits = map(jnp.asarray, _two_distributions(5))
    direction = jnp.asarray(_two_distributions(6)[0])
    slope = jnp.sum(jax.grad(lambda x: jnp.sum(acceptance(x, target_logits)))(logits) * direction)
    ahead, back = (
        jnp.sum(acceptance(logits + h * direction, target_logits)) for h in (3e-3, -3e-3)
    )
    np.testing.assert_allclose(slope, (ahead - back) / 6e-3, rtol=0.02, atol=2e-3)
    assert abs(slope) > 0.01


def test_masked_tokens_leave_acceptances_finite():
    """Top-k and top-p filtering give tokens no probability; gradients go through them, too."""
    logits, target_logits = map(jnp.asarray, _two_distributions(7))
    masked = target_logits.at[:, 3:].set(-1e30)
    for acceptance in _ACCEPTANCE:
        for draft in (logits, logits.at[:, :5].set(-1e30)):
            found, gradient = jax.value_and_grad(lambda x, f=acceptance: jnp.sum(f(x, masked)))(
                draft
            )
            assert np.isfinite(found) and np.all(np.isfinite(gradient))
