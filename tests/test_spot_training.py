"""Drafter training: the loss by a naive loop, its mask, sums over slices, and the update."""

import dataclasses
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tlt_jax import buffer as buffer_lib
from tlt_jax import drafter, objectives, policy, sharding, spot_training
from tlt_jax.buffer import Microbatch
from tlt_jax.config import DrafterConfig, MeshConfig, PolicyConfig
from tlt_jax.spot_training import GradientSum

CONFIG = DrafterConfig(
    ffn_width=20,
    learning_rate=1e-2,
    buffer_megabytes=0.0019,  # 3 rows
    row_length=8,
    microbatch_rows=2,
    microbatch_tokens=8,
    train_depth=2,
)
TX = spot_training.optimizer(CONFIG)
W, D = CONFIG.row_length, 16
SEGMENTS = np.array([[4, 4, 4, 7, 7, 7, 7, -1], [5, 5, 5, 5, 5, 5, 5, 5]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 5, 6, 7]], np.int32)

_steps = jax.jit(drafter.packed_steps, static_argnames=("config", "count", "steps"))
_sample = jax.jit(buffer_lib.sample, static_argnames=("rows", "tokens"))
_add_samples = jax.jit(spot_training.add_samples, static_argnames=("policy_config", "config"))
_apply = jax.jit(spot_training.apply, static_argnames="tx")


@functools.partial(jax.jit, static_argnames="policy_config")
def _evaluate(params, target, policy_config, microbatch):
    """(loss, terms), and the loss's gradients with respect to the drafter and to the target."""

    def loss(params, target):
        return objectives.loss_sum(params, target, policy_config, CONFIG, microbatch)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, target)


@pytest.fixture(scope="module")
def target(tiny_config, random_params):
    return random_params(policy.param_specs(tiny_config), 0)


@pytest.fixture(scope="module")
def params(tiny_config, random_params):
    return random_params(drafter.param_specs(tiny_config, CONFIG), 1)


@pytest.fixture(scope="module")
def microbatch():
    rng = np.random.default_rng(2)
    return Microbatch(
        tokens=jnp.asarray(rng.integers(0, 11, (2, W)), jnp.int32),
        features=jnp.asarray(rng.standard_normal((2, W, D)), jnp.float32),
        segment_ids=jnp.asarray(SEGMENTS),
        positions=jnp.asarray(POSITIONS),
        starts=jnp.zeros(2, jnp.int32),
    )


@pytest.fixture(scope="module")
def sequences(target, tiny_config):
    """Six sequences of eight tokens with the target's true features: [6, W] and [6, W, D]."""
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 11, (6, W)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(W, dtype=jnp.int32), (6, W))
    packed = jax.jit(policy.packed_forward, static_argnames="config")
    features, _ = packed(target, tiny_config, tokens, positions, jnp.zeros((6, W), jnp.int32))
    return tokens, features


def _filled(sequences, *lengths, first=0):
    """A buffer that holds sequences from `first` on, cut to these lengths."""
    tokens, features = (x[first : first + len(lengths)] for x in sequences)
    empty = buffer_lib.empty(CONFIG, PolicyConfig(width=D))
    given = jnp.array(lengths, jnp.int32)
    return buffer_lib.insert_each(empty, tokens, features, given, given > 0)


def _accumulate(params, target, policy_config, buffer, key, count):
    """Sum of `count` microbatches, drawn by the key and their number."""
    given = params, target, policy_config, CONFIG, buffer, key
    numbers = {"first": jnp.int32(0), "count": jnp.int32(count)}
    total, taken = _add_samples(spot_training.zero_sum(params), *given, **numbers)
    assert int(taken) == (count if int(buffer.filled) else 0)
    return total


def _cross_entropy(logits, target_logits):
    """By its definition, of one draft."""
    probs = np.exp(target_logits) / np.sum(np.exp(target_logits))
    return -probs @ (logits - np.log(np.sum(np.exp(logits))))


@pytest.mark.parametrize("objective", ["hass", "eagle3"])
def test_the_loss_is_the_naive_sum_over_pairs(params, target, tiny_config, microbatch, objective):
    embedded = policy.embed(target, jnp.roll(microbatch.tokens, -1, axis=1))
    given = (microbatch.features, embedded, POSITIONS, SEGMENTS, microbatch.starts)
    steps = _steps(params, tiny_config, *given, count=W, steps=2)
    estimates = [np.asarray(x, np.float64) for x, _ in steps]
    features, head = (np.asarray(x, np.float64) for x in (microbatch.features, target["head"]))
    expected, count = 0.0, 0
    for depth, row, t in np.ndindex(2, 2, W - 1):
        # Depth 1 drafts at t from pair t, depth 2 from pair t - 1: all lie in one segment.
        if t < depth or len(set(SEGMENTS[row, t - depth : t + 2])) > 1:
            continue
        estimate, truth = estimates[depth][row, t], features[row, t + 1]
        distance = np.abs(estimate - truth)
        smooth = np.mean(np.where(distance < 1, distance**2 / 2, distance - 0.5))
        expected += _cross_entropy(estimate @ head, truth @ head)
        expected += CONFIG.feature_loss_weight * smooth * (objective != "eagle3")
        count += 1
    config = dataclasses.replace(CONFIG, objective=objective)
    loss, weight = _loss(params, target, tiny_config, config, microbatch)
    assert count == 21 and float(weight) == 21  # 12 pairs, of which 9 have one before them
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_of_several_hidden_states_the_last_is_the_target(params, target, tiny_config, microbatch):
    """A drafter that reads nothing but the last one has the loss of one that knows no other."""
    config = dataclasses.replace(tiny_config, feature_layers=(0,))
    other = jax.random.normal(jax.random.key(8), microbatch.features.shape)
    wide = microbatch.replace(features=jnp.concatenate([other, microbatch.features], axis=-1))
    reading = {"read_norm": jnp.ones((2, D)), "read": jnp.stack([jnp.zeros((D, D)), jnp.eye(D)])}
    found = _loss(params | reading, target, config, CONFIG, wide)
    expected = _loss(params, target, tiny_config, CONFIG, microbatch)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_padding_and_the_step_between_segments_do_not_count(
    params, target, tiny_config, microbatch
):
    """Fails when pairs are not masked, when attention crosses segments, or both."""
    (loss, weight), _ = _evaluate(params, target, tiny_config, microbatch)
    garbage = microbatch.replace(
        tokens=microbatch.tokens.at[0, 7].set(3),
        features=microbatch.features.at[0, 7].set(50.0),
    )
    (same, _), _ = _evaluate(params, target, tiny_config, garbage)
    np.testing.assert_array_equal(same, loss)

    total, pairs = 0.0, 0.0
    for row, place in ((0, slice(0, 3)), (0, slice(3, 7)), (1, slice(0, 8))):
        alone = _segment_alone(microbatch, row, place)
        (part, number), _ = _evaluate(params, target, tiny_config, alone)
        total, pairs = total + float(part), pairs + float(number)
    assert pairs == float(weight) == 21
    np.testing.assert_allclose(loss, total, rtol=1e-5)


def _segment_alone(microbatch, row, place):
    """A microbatch that holds one segment of `microbatch`, at the start of its first row."""
    empty = jax.tree.map(jnp.zeros_like, microbatch)
    empty = empty.replace(segment_ids=jnp.full_like(empty.segment_ids, -1))
    count = place.stop - place.start

    def move(x, whole):
        return x if x.ndim == 1 else x.at[0, :count].set(whole[row, place])

    return jax.tree.map(move, empty, microbatch)


def test_the_parts_of_a_row_add_up_to_what_they_hold(params, target, tiny_config, microbatch):
    """At depth 1 every pair lies in one part; at depth 2 drafts across the cut are missing."""

    def part(start):
        config = dataclasses.replace(CONFIG, train_depth=1, microbatch_tokens=4)
        starts = jnp.full(2, start, jnp.int32)
        moved = microbatch.replace(starts=starts)
        return _loss(params, target, tiny_config, config, moved)

    shallow = dataclasses.replace(CONFIG, train_depth=1)
    whole = _loss(params, target, tiny_config, shallow, microbatch)
    (loss, pairs), (more, others) = part(0), part(4)
    assert (pairs, others) == (3 + 4, 2 + 3) and float(whole[1]) == 12
    np.testing.assert_allclose(loss + more, whole[0], rtol=1e-5)


_loss = jax.jit(objectives.loss_sum, static_argnames=("policy_config", "config"))


def test_the_target_gets_no_gradient_and_all_of_the_drafter_does(
    params, target, tiny_config, microbatch
):
    _, (gradients, target_gradients) = _evaluate(params, target, tiny_config, microbatch)
    for leaf in jax.tree.leaves(target_gradients):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(gradients))


def test_unequal_slices_add_up_to_one_slice(params, target, tiny_config, sequences):
    """Slices take 3 and 1 microbatches; the sum is that of one slice that took all four."""
    mesh = sharding.make_mesh(MeshConfig(slices=2, tensor=1))
    buffers = [_filled(sequences, 8, 5, 3), _filled(sequences, 6, 2, 7, first=3)]
    counts, key = jnp.array([3, 1], jnp.int32), jax.random.key(5)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *buffers)

    def on_slice(params, target, buffer, count):
        own, own_key = (
            spot_training.zero_sum(params),
            jax.random.fold_in(key, jax.lax.axis_index("slice")),
        )
        for first in (0, 2):  # up to two at a time
            own, _ = spot_training.add_samples(
                own,
                params,
                target,
                tiny_config,
                CONFIG,
                jax.tree.map(lambda x: x[0], buffer),
                own_key,
                first=jnp.int32(first),
                count=jnp.clip(count[0] - first, 0, 2),
            )
        return jax.lax.psum(own, "slice")

    summed = jax.jit(
        jax.shard_map(
            on_slice,
            mesh=mesh,
            in_specs=(P(), P(), P("slice"), P("slice")),
            out_specs=P(),
            check_vma=False,
        )
    )(params, target, stacked, counts)

    parts = []  # (loss, pairs, gradients) of every microbatch, slice by slice
    for index, buffer in enumerate(buffers):
        for number in range(int(counts[index])):
            draw_key = jax.random.fold_in(jax.random.fold_in(key, index), number)
            drawn = _sample(buffer, draw_key, rows=CONFIG.microbatch_rows, tokens=W)
            (loss, pairs), (gradients, _) = _evaluate(params, target, tiny_config, drawn)
            parts.append((loss, pairs, gradients))
    loss, pairs, gradients = jax.tree.map(lambda *x: sum(x), *parts)
    np.testing.assert_allclose(summed.loss, loss, rtol=1e-5)
    assert float(summed.weight) == float(pairs) > 0
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        summed.gradients,
        gradients,
    )
    # A mean of the slices' means is something else, so the test would see it.
    first, second = (
        sum(part[2]["norm"] for part in own) / sum(part[1] for part in own)
        for own in (parts[:3], parts[3:])
    )
    assert np.max(np.abs((first + second) / 2 - gradients["norm"] / pairs)) > 1e-2


def test_features_made_anew_are_those_that_were_stored(params, target, tiny_config, sequences):
    """A ring of tokens alone gives the gradient of one with features, for the same policy."""
    stored = _filled(sequences, 8, 5, 3, 6)
    bare = dataclasses.replace(CONFIG, store_features=False)
    ring = buffer_lib.empty(bare, PolicyConfig(width=D))
    assert ring.features is None and ring.tokens.shape[0] > stored.tokens.shape[0]
    ring = jax.tree.map(lambda x: x[: stored.tokens.shape[0]] if x.ndim else x, ring)
    given = jnp.array([8, 5, 3, 6], jnp.int32)
    ring = buffer_lib.insert_each(ring, sequences[0][:4], None, given, given > 0)
    jax.tree.map(np.testing.assert_array_equal, ring, stored.replace(features=None))
    for seed in range(3):
        of_stored, of_ring = (
            _accumulate(params, target, tiny_config, held, jax.random.key(seed), 2)
            for held in (stored, ring)
        )
        assert float(of_stored.weight) == float(of_ring.weight) > 0
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), of_ring, of_stored
        )


def test_an_empty_buffer_or_no_microbatch_leaves_the_drafter_alone(
    params, target, tiny_config, sequences
):
    state, key = spot_training.init_state(TX, params), jax.random.key(0)
    for buffer, count in ((_filled(sequences, 0, 0), 3), (_filled(sequences, 8), 0)):
        total = _accumulate(params, target, tiny_config, buffer, key, count)
        jax.tree.map(np.testing.assert_array_equal, total, spot_training.zero_sum(params))
        jax.tree.map(np.testing.assert_array_equal, _apply(TX, state, total), state)


def test_segments_without_a_pair_leave_the_drafter_alone(params, target, tiny_config, sequences):
    buffer = _filled(sequences, 1, 1, 1)
    total = _accumulate(params, target, tiny_config, buffer, jax.random.key(0), 3)
    assert float(total.weight) == 0
    state = spot_training.init_state(TX, params)
    jax.tree.map(np.testing.assert_array_equal, _apply(TX, state, total), state)


def test_microbatches_vary_with_the_key_and_their_number(params, target, tiny_config, sequences):
    buffer = _filled(sequences, 8, 7, 6)

    def loss(seed, count):
        key = jax.random.key(seed)
        total = _accumulate(params, target, tiny_config, buffer, key, count)
        return float(total.loss)

    assert len({loss(seed, 2) for seed in range(6)}) >= 3
    assert loss(0, 2) < loss(0, 3)


def test_the_update_by_hand():
    """Gradients 6, 8 over 2 pairs: mean 3, 4 of norm 5, clipped to 0.6, 0.8; AdamW starts at 0.

    The first moment is then 0.1 times that, and the first step is the learning rate in each
    coordinate against the gradient's sign, with the decay 0.5 * lr * parameter on top.
    """
    config = DrafterConfig(learning_rate=0.01, weight_decay=0.5, max_grad_norm=1.0)
    tx = spot_training.optimizer(config)
    state = spot_training.init_state(tx, {"w": jnp.array([2.0, -4.0])})
    assert int(state.version) == 0
    total = GradientSum(
        gradients={"w": jnp.array([6.0, 8.0])}, loss=jnp.float32(1), weight=jnp.float32(2)
    )
    after = spot_training.apply(tx, state, total)
    moments = optax.tree_utils.tree_get(after.opt_state, "mu")
    np.testing.assert_allclose(moments["w"], [0.06, 0.08], rtol=1e-5)
    np.testing.assert_allclose(after.params["w"], [2 - 0.01 - 0.01, -4 - 0.01 + 0.02], rtol=1e-5)
    assert int(after.version) == 1
    assert int(spot_training.apply(tx, after, total).version) == 2


def test_small_updates_add_up_in_bfloat16():
    """Twenty steps of 0.001 move a gain of 1.0 by 0.02; 1.0 - 0.001 rounds back to 1.0."""
    tx = spot_training.optimizer(DrafterConfig(learning_rate=1e-3, max_grad_norm=10.0))
    state = spot_training.init_state(tx, {"norm": jnp.ones((2,), jnp.bfloat16)})
    total = GradientSum(
        gradients={"norm": jnp.ones((2,))}, loss=jnp.float32(1), weight=jnp.float32(1)
    )
    for _ in range(20):
        state = _apply(tx, state, total)
    np.testing.assert_allclose(np.asarray(state.params["norm"], np.float32), 0.98, atol=0.006)


def _digest(tree):
    held = jax.device_get(jax.tree.leaves(tree))
    return hashlib.sha256(b"".join(x.tobytes() for x in held)).hexdigest()


def test_training_lowers_the_loss_and_touches_nothing_but_the_drafter(
    params, target, tiny_config, sequences
):
    buffer = _filled(sequences, 8, 8, 8)
    before = _digest(target)

    state, losses = spot_training.init_state(TX, params), []
    for step in range(150):
        key = jax.random.fold_in(jax.random.key(0), step)
        total = _accumulate(state.params, target, tiny_config, buffer, key, 1)
        state = _apply(TX, state, total)
        losses.append(float(total.loss / total.weight))
    assert int(state.version) == 150
    # The cross-entropy cannot fall below the target's own entropy; measure what lies above it.
    logits = policy.logits(target, sequences[1][:3, 1:])
    probs = jax.nn.softmax(logits, axis=-1)
    floor = -float(jnp.mean(jnp.sum(probs * jnp.log(probs), axis=-1)))
    first, last = np.mean(losses[:10]) - floor, np.mean(losses[-10:]) - floor
    assert 0 <= last < 0.2 * first
    assert _digest(target) == before
    assert _digest(state.params) != _digest(params)
