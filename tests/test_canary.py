"""A drafter that went bad is replaced by the last good version, and a good one never is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_engine
from toy_engine import DRAFTER, SHAPE

from tlt_jax import canary, sampling, sharding, spot_training

SAMPLING = sampling.params_of(toy_engine.ROLLOUT)


@pytest.fixture(scope="module")
def rolled():
    """(programs, target, carry) after a rollout with the mirrored drafter, which is never wrong."""
    programs = toy_engine.engine("main")
    seed, asked, _ = toy_engine.tailed("mirrored")
    carry = toy_engine.roll(programs, toy_engine.mirrored(), asked, seed=seed).carry
    return programs, toy_engine.place(programs, toy_engine.mirrored()[0]), carry


def _state(programs, params, version=9):
    tx = spot_training.optimizer(DRAFTER)
    state = dataclasses.replace(
        spot_training.init_state(tx, jax.tree.map(jnp.copy, params)), version=jnp.int32(version)
    )
    return jax.device_put(state, sharding.replicated(programs.mesh))


def _check(rolled, params, good, buffer=None):
    """(state, good drafter, verdict, sentence) for a drafter of version 9 and a good one of 4."""
    programs, target, carry = rolled
    whole = sharding.replicated(programs.mesh)
    kept = jax.device_put(canary.GoodDrafter(jax.tree.map(jnp.copy, good), jnp.int32(4)), whole)
    program = canary.check_program(programs.mesh, SHAPE, DRAFTER)
    buffer = carry.buffer if buffer is None else buffer
    given = _state(programs, params), kept, buffer, jax.device_put(SAMPLING, whole)
    state, after, verdict = program(target, *given)
    verdict = sharding.to_host(verdict)
    return state, after, verdict, canary.sentence(verdict)


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("kind", ["NaN", "of another policy", "collapsed"])
def test_the_last_good_version_takes_the_place_of_a_bad_one(rolled, kind):
    whole = toy_engine.mirrored()[1]
    bad = {
        "NaN": jax.tree.map(lambda x: x * jnp.nan, whole),
        "of another policy": toy_engine.random_drafter(),
        "collapsed": jax.tree.map(jnp.zeros_like, whole),
    }[kind]
    state, good, verdict, sentence = _check(rolled, bad, whole)
    assert verdict.replaced and (verdict.version, verdict.good_version) == (9, 4)
    assert not verdict.acceptance >= canary.WORSE * verdict.of_good
    assert verdict.of_good > 0.95, "the mirrored drafter equals the target"
    _same(state.params, whole)
    _same(good.params, whole)
    assert (int(state.version), int(good.version)) == (9, 4)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.opt_state))
    assert sentence.startswith("drafter version 9 went bad") and "version 4" in sentence


def test_a_drafter_that_got_no_worse_is_the_last_good_one_from_then_on(rolled):
    whole, other = toy_engine.mirrored()[1], toy_engine.random_drafter()
    nearly = jax.tree.map(lambda x: 1.001 * x, whole)
    for params, before in ((nearly, whole), (whole, other)):
        state, good, verdict, sentence = _check(rolled, params, before)
        assert not verdict.replaced and sentence == ""
        _same(state.params, params)
        _same(good.params, params)
        assert (int(state.version), int(good.version)) == (9, 9)


def test_without_evidence_nothing_happens(rolled):
    programs = rolled[0]
    whole, other = toy_engine.mirrored()[1], toy_engine.random_drafter()
    state, _, verdict, _ = _check(rolled, other, whole, toy_engine.buffers(programs))
    assert not verdict.replaced and np.isnan(verdict.acceptance)
    _same(state.params, other)


def test_all_slices_judge_by_all_buffers(rolled, monkeypatch):
    """With the buffer of either slice alone the figure is another one, on either side."""
    monkeypatch.setattr(canary, "LEAST_EVIDENCE", 1)
    programs, _, carry = rolled
    whole, other = toy_engine.mirrored()[1], toy_engine.random_drafter()
    shares = []
    for kept in range(2):
        filled = np.asarray(carry.buffer.segment_ids).copy()
        filled[1 - kept] = -1
        half = dataclasses.replace(
            carry.buffer, segment_ids=jax.device_put(filled, sharding.per_slice(programs.mesh))
        )
        shares.append(_check(rolled, other, whole, half)[2])
    both = _check(rolled, other, whole)[2]
    low, high = sorted(float(share.acceptance) for share in shares)
    assert low < both.acceptance < high and all(share.replaced for share in shares)
