"""Coupled sampling: noise by name, filters against a naive loop, and the distribution drawn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import sampling

V = 7
KEY = jax.random.key(3)

_noise = jax.jit(sampling.position_noise, static_argnames=("count", "vocab_size"))
_process = jax.jit(sampling.process_logits)
_pick = jax.jit(sampling.pick)
_log_probs = jax.jit(sampling.log_probs)
_params = functools.partial(sampling.make_params, filtered=True)


def _ids(*values):
    return jnp.array(values, jnp.int32)


def _noise_at(sequence, position, *, key=KEY):
    return _noise(key, _ids(sequence), _ids(position), count=1, vocab_size=V)[0, 0]


def test_noise_does_not_depend_on_the_batch_it_is_drawn_in():
    whole = _noise(KEY, _ids(5, 2, 9), _ids(3, 7, 0), count=4, vocab_size=V)
    assert whole.shape == (3, 4, V) and whole.dtype == jnp.float32
    other = _noise(KEY, _ids(9, 5), _ids(2, 4), count=2, vocab_size=V)
    np.testing.assert_array_equal(other[0], whole[2, 2:4])
    np.testing.assert_array_equal(other[1], whole[0, 1:3])
    for row, (sequence, start) in enumerate(((5, 3), (2, 7), (9, 0))):
        for index in range(4):
            np.testing.assert_array_equal(_noise_at(sequence, start + index), whole[row, index])


def test_noise_differs_by_key_sequence_and_position():
    base = _noise_at(5, 3)
    others = [
        _noise_at(5, 3, key=jax.random.key(4)),
        _noise_at(6, 3),
        _noise_at(5, 4),
        _noise_at(3, 5),  # sequence and position exchanged
        _noise_at(4, 4),  # the same sum
    ]
    assert all(np.all(other != base) for other in others)


def _naive_kept(logits, temperature, top_k, top_p):
    """Which tokens of one position stay, [V] bool: top-k, then top-p, then ties with the last."""
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    order = order[: top_k or len(logits)]
    weights = [np.exp((logits[token] - max(logits)) / temperature) for token in order]
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        if mass < top_p:
            kept.append(token)
        mass += weight / sum(weights)
    return np.array([logit >= logits[kept[-1]] for logit in logits])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (3, 1.0), (0, 0.35), (0, 0.9), (4, 0.7), (V + 5, 0.8)]
)
def test_filters_are_the_naive_ones(temperature, top_k, top_p):
    rng = np.random.default_rng(0)
    logits = rng.integers(-6, 6, (40, V)) / 2.0  # half of the rows hold ties
    assert sum(len(set(row)) < V for row in logits.tolist()) > 10
    params = _params(temperature, top_k, top_p)
    found = np.asarray(_process(jnp.asarray(logits, jnp.float32), params))
    kept = np.array([_naive_kept(row, temperature, top_k, top_p) for row in logits.tolist()])
    np.testing.assert_array_equal(found, np.where(kept, logits, np.float32(sampling.MASKED)))

    tokens = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32)[:, None], (V, 40))
    by_token = _log_probs(jnp.broadcast_to(found, (V, 40, V)), tokens, params).T
    weights = np.where(kept, np.exp(logits / temperature), 0.0)
    probs = weights / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(np.exp(by_token), probs, atol=1e-6)
    np.testing.assert_allclose(by_token[kept], np.log(probs[kept]), atol=1e-5)
    np.testing.assert_allclose(np.sum(np.exp(by_token), axis=1, where=kept), 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "kept"),
    [
        (1.0, 2, 1.0, 2),
        (1.0, 3, 1.0, 4),  # the fourth ties with the third
        (1.0, 0, 0.4, 1),
        (1.0, 0, 0.6, 2),
        (1.0, 0, 0.8, 4),
        (0.5, 0, 0.6, 1),  # the sharper distribution is 0.73, 0.18, 0.05, 0.05
        (2.0, 0, 0.7, 4),  # the flatter one 0.37, 0.26, 0.18, 0.18
        (1.0, 2, 0.6, 1),  # among the first two, the first holds 2/3
    ],
)
def test_filters_by_hand(temperature, top_k, top_p, kept):
    logits = jnp.log(jnp.array([0.5, 0.25, 0.125, 0.125]))
    found = _process(logits, _params(temperature, top_k, top_p))
    assert np.asarray(found > sampling.MASKED).tolist() == [index < kept for index in range(4)]


@pytest.mark.parametrize(("top_k", "top_p", "filtered"), [(0, 1.0, False), (3, 0.5, True)])
def test_temperature_zero_is_greedy(top_k, top_p, filtered):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.standard_normal((50, V)), jnp.float32)
    noise = 10 * jnp.asarray(rng.gumbel(size=(50, V)), jnp.float32)
    params = sampling.make_params(0.0, top_k, top_p, filtered=filtered)
    processed = _process(logits, params)
    found = _pick(processed, noise, params)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(logits, axis=-1))
    np.testing.assert_allclose(_log_probs(processed, found, params), 0.0, atol=1e-6)


@pytest.mark.parametrize("scale", [1, 20], ids=["flat", "peaked"])
def test_no_filter_is_a_neutral_filter(scale):
    # Peaked: what comes after the first token holds less than float32 tells from zero.
    logits = scale * jnp.asarray(np.random.default_rng(2).standard_normal((20, V)), jnp.float32)
    plain = sampling.make_params(0.8, 0, 1.0, filtered=False)
    np.testing.assert_array_equal(_process(logits, plain), logits)
    np.testing.assert_array_equal(_process(logits, _params(0.8, 0, 1.0)), logits)


def test_filters_are_left_out_where_nobody_asks_for_them():
    params = sampling.make_params(1.0, 1, 0.1, filtered=False)
    logits = jnp.arange(V, dtype=jnp.bfloat16)
    found = _process(logits, params)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.arange(V))


def test_values_of_the_parameters_compile_nothing(caplog):
    logits = jnp.arange(9.0)
    _process(logits, _params(1.0, 2, 0.9))
    with jax.log_compiles():
        _process(logits, _params(0.3, 5, 0.2))
        assert not [record for record in caplog.records if "Compiling" in record.message]
        _process(logits[:8], _params(0.3, 5, 0.2))
        assert [record for record in caplog.records if "Compiling" in record.message]


def _chi_square(counts, probs):
    expected = counts.sum() * probs
    return np.sum((counts - expected) ** 2 / expected)


# Draws are fixed by the key, so these tests give the same number each time. The limits are the
# 0.999 quantiles of chi-square with 4 and 24 degrees of freedom (18.5, 51.2) and, for the filtered
# case, with 2 (13.8).
@pytest.mark.parametrize(
    ("temperature", "top_k", "limit"), [(1.0, 0, 18.5), (0.6, 0, 18.5), (1.0, 3, 13.8)]
)
def test_coupled_samples_follow_the_softmax(temperature, top_k, limit):
    count = 4096
    logits = jnp.array([0.3, -1.0, 1.2, 0.0, -0.4])
    params = _params(temperature, top_k, 1.0)
    processed = _process(logits, params)
    noise = _noise(KEY, _ids(1, 2, 3, 4), _ids(0, 0, 0, 0), count=count, vocab_size=5)
    tokens = np.asarray(_pick(jnp.broadcast_to(processed, noise.shape), noise, params))
    weights = np.where(processed > sampling.MASKED, np.exp(np.asarray(logits) / temperature), 0)
    probs = weights / weights.sum()
    counts = np.bincount(tokens.ravel(), minlength=5)
    assert counts[probs == 0].sum() == 0
    assert _chi_square(counts[probs > 0], probs[probs > 0]) < limit
    flat = np.full(5, 0.2)[probs > 0] * 5 / (probs > 0).sum()
    assert _chi_square(counts[probs > 0], flat) > 10 * limit  # the test has the power to fail


def test_neighbours_in_position_and_sequence_are_independent():
    logits = jnp.array([0.3, -1.0, 1.2, 0.0, -0.4])
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    joint = np.outer(probs, probs).ravel()
    params = sampling.make_params(1.0, 0, 1.0, filtered=False)
    noise = _noise(KEY, _ids(1, 2, 3, 4), _ids(0, 0, 0, 0), count=4096, vocab_size=5)
    tokens = np.asarray(_pick(jnp.broadcast_to(logits, noise.shape), noise, params))
    by_position = np.bincount((5 * tokens[:, ::2] + tokens[:, 1::2]).ravel(), minlength=25)
    by_sequence = np.bincount((5 * tokens[::2] + tokens[1::2]).ravel(), minlength=25)
    assert _chi_square(by_position, joint) < 51.2
    assert _chi_square(by_sequence, joint) < 51.2
