"""The programs of a rollout one by one: prefill, shrink, grow, and a chunk with training."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_engine
from toy_engine import DRAFTER, NEVER, SHAPE

from tlt_jax import buffer as buffer_lib
from tlt_jax import objectives, policy, row_programs, sharding, spot_training
from tlt_jax.budget import Block
from tlt_jax.buffer import Microbatch
from tlt_jax.chunk import TRAINING_STREAM, ChunkKind
from tlt_jax.program_pool import ProgramPool
from tlt_jax.types import INVALID

ROWS, SLICES = 4, 2
PRICE = DRAFTER.rounds_per_microbatch[0]  # of the bucket of four rows
CLOSE = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def programs():
    return toy_engine.engine("main")


@pytest.fixture(scope="module")
def target(programs):
    return toy_engine.place(programs, toy_engine.random_policy())


def _prefilled(programs, target, gains, *, ids=range(SLICES * ROWS)):
    """Rows of eight prompts that end after at most `gains` tokens."""
    asked = toy_engine.prompts(SLICES * ROWS, seed=2)
    tokens = np.zeros((len(asked), programs.rollout.max_prompt_length), np.int32)
    for row, prompt in enumerate(asked):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(prompt) for prompt in asked], np.int32)
    ids = np.array(ids, np.int32)
    batch = (tokens, lengths, lengths + np.array(gains, np.int32), ids, ids)
    return programs.prefill(target, jax.device_put(batch, sharding.per_slice(programs.mesh)))


def _run(programs, target, rows, *, rounds, training, state=None, buffer=None, **orders):
    """One chunk from copies: (drafter state, buffer, rows, report)."""
    state = state or toy_engine.drafter_state(programs, toy_engine.random_drafter())
    buffer = buffer or toy_engine.buffers(programs)
    bucket = rows.tokens.shape[0] // SLICES
    kind = ChunkKind(programs.arms(bucket)[0], training=training)
    given = jax.tree.map(lambda x: x.copy(), (state, buffer, rows))
    sampler = programs.sampler(jax.random.key(4), (NEVER,))
    given_orders = {"index": 0, "block": Block(PRICE, 1)} | orders
    orders = programs.orders(kind.strategy, rounds=rounds, **given_orders)
    arguments = (target, given[0], given[1], None, sampler, orders, given[2])
    chunk = programs.chunk_program(kind, arguments)(*arguments)
    return chunk[0], chunk[1], chunk[3], chunk[4]


@jax.jit
def _sample(buffer, key):
    rows, tokens = DRAFTER.microbatch_rows, DRAFTER.microbatch_tokens
    return buffer_lib.sample(buffer, key, rows=rows, tokens=tokens)


@jax.jit
def _packed(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return policy.packed_forward(params, SHAPE, tokens, positions, jnp.zeros_like(tokens))[0]


def test_prefill_reads_the_prompts(programs, target):
    state = _prefilled(programs, target, [9] * 8, ids=[0, 1, 2, INVALID, 3, 4, 5, 6])
    features = _packed(toy_engine.random_policy(), state.tokens)
    for row, length in enumerate(state.length.tolist()):
        CLOSE(state.features[row, :length], features[row, :length])
    np.testing.assert_array_equal(state.live, np.asarray(state.sequence_ids) != INVALID)
    np.testing.assert_array_equal(state.stored, ~np.asarray(state.live))
    assert state.tokens.shape == (8, 24) and state.cache[0].k.shape == (8, 2, 24, 4)


def test_every_program_keeps_the_rows_on_their_slices(programs, target):
    """A program that moved them would pay for it in every chunk, and the next would not fit."""
    state = _prefilled(programs, target, [9] * 8)
    wanted = row_programs.state_shardings(programs.mesh, keep_features=True)
    made = [state, programs.grow(state), programs.shrink(state, 1)]
    made.append(_run(programs, target, state, rounds=1, training=False)[2])
    for rows in made:
        for held, inner in zip(
            jax.tree.leaves(wanted),
            [rows.tokens, rows.log_probs, rows.cache[0].k, rows.features, rows.draft_cache.k],
            strict=False,
        ):
            assert isinstance(held, jax.sharding.NamedSharding)
            assert {s.index[0].start or 0 for s in inner.addressable_shards} == {
                0,
                inner.shape[0] // 2,
            }


def test_shrink_keeps_the_live_row_of_each_slice(programs, target):
    """Whatever a row has moves along: here row 2 of slice 0 and row 1 of slice 1."""
    state = _prefilled(programs, target, [9] * 8)
    state = state.replace(live=jnp.array([0, 0, 1, 0, 0, 1, 0, 0], bool))
    state = jax.device_put(state, sharding.per_slice(programs.mesh))
    before = jax.device_get(state)
    shrunk = jax.device_get(programs.shrink(state, 1))
    jax.tree.map(lambda old, new: np.testing.assert_array_equal(old[[2, 5]], new), before, shrunk)


def test_shrink_fills_up_with_ended_rows(programs, target):
    state = _prefilled(programs, target, [9] * 8)
    state = state.replace(live=jnp.zeros(8, bool).at[6].set(True))
    state = jax.device_put(state, sharding.per_slice(programs.mesh))
    shrunk = programs.shrink(state, 1)
    assert shrunk.sequence_ids.tolist() == [0, 6] and shrunk.live.tolist() == [False, True]


def test_grow_adds_empty_positions(programs, target):
    before = _prefilled(programs, target, [9] * 8)
    after = programs.grow(before)
    assert after.tokens.shape == (8, 48)

    def check(old, new):
        axis = next((a for a in range(old.ndim) if old.shape[a] != new.shape[a]), None)
        if axis is None:
            np.testing.assert_array_equal(old, new)
            return
        kept, added = np.split(np.asarray(new), [old.shape[axis]], axis=axis)
        np.testing.assert_array_equal(old, kept)
        assert not added.any()

    jax.tree.map(check, before, after)


def _segments(buffer, slice_):
    """{segment id: (tokens, features)} of a slice's buffer on the host."""
    found = {}
    for row, ids in enumerate(buffer.segment_ids[slice_]):
        for segment in set(ids.tolist()) - {INVALID}:
            here = ids == segment
            found[segment] = buffer.tokens[slice_, row][here], buffer.features[slice_, row][here]
    return found


def test_ended_rows_are_stored_with_true_features_and_only_once(programs, target):
    """In the order of rows; padding rows never; the next chunk stores what ended since."""
    state = _prefilled(programs, target, [1, 14, 2, 5, 14, 3, 14, 14], ids=[*range(7), INVALID])
    state_1, buffer, rows, _ = _run(programs, target, state, rounds=3, training=False)
    live = np.asarray(rows.live)
    assert live[[1, 4, 6]].all() and not live[[0, 2, 5, 7]].any()
    sampler = programs.sampler(jax.random.key(4), (NEVER,))
    kind = ChunkKind(programs.arms(ROWS)[0])
    orders = programs.orders(kind.strategy, rounds=9, index=1)
    assert buffer.segments.tolist() == [(~live[:4]).sum(), (~live[4:7]).sum()]
    arguments = (target, state_1, buffer, None, sampler, orders, rows)
    _, buffer, _, rows, _ = programs.chunk_program(kind, arguments)(*arguments)
    assert not np.any(rows.live) and np.all(rows.stored)
    buffer, rows = jax.device_get((buffer, rows))
    assert buffer.segments.tolist() == [4, 3]
    features = _packed(toy_engine.random_policy(), rows.tokens)
    for slice_ in range(SLICES):
        stored = _segments(buffer, slice_)
        own = range(4) if slice_ == 0 else range(4, 7)
        unseen = set(own)
        for tokens, kept in stored.values():
            row = next(
                r
                for r in unseen
                if rows.length[r] - 1 == len(tokens)
                and np.array_equal(rows.tokens[r, : len(tokens)], tokens)
            )
            unseen.remove(row)
            CLOSE(kept, features[row, : len(tokens)])
        assert not unseen


@pytest.fixture(scope="module")
def unequal(programs, target):
    """A chunk of up to 24 rounds: slice 0 ends after one and trains while slice 1 goes on."""
    state = _prefilled(programs, target, [1, 1, 1, 1, 14, 2, 2, 2])
    return _run(programs, target, state, rounds=24, training=True, index=3)


def test_an_idle_slice_trains_until_the_tail_ends(unequal):
    """Decided on the device: nothing was idle when the chunk began, nor is it run to its end."""
    _, _, rows, report = jax.device_get(unequal)
    assert not np.any(rows.live)
    first, last = report.stats.rounds.tolist()
    blocks = -(-last // PRICE)
    assert first == 1 and 2 < blocks < 24 // PRICE
    assert report.microbatches.tolist() == [blocks - 1, 0]


def test_all_slices_leave_with_the_same_drafter(unequal):
    state, _, _, report = unequal
    toy_engine.assert_same_on_all_devices(state)
    assert int(state.version) == 1 and report.draft_version.tolist() == [0, 0]
    loss = np.asarray(report.draft_loss)
    assert np.isfinite(loss[0]) and loss[0] == loss[1]


def test_the_update_is_that_of_all_microbatches_at_once(programs, target):
    """The moments are those of the mean gradient over all their pairs; every draw has its key."""
    state = _prefilled(programs, target, [9] * 8, ids=[INVALID] * 8)
    buffer, blocks = _full_buffers(programs), 2
    given = {"rounds": blocks * PRICE, "training": True, "buffer": buffer, "index": 3}
    state, _, _, report = jax.device_get(_run(programs, target, state, **given))
    assert report.microbatches.tolist() == [blocks, blocks]
    key = jax.random.fold_in(jax.random.key(4), TRAINING_STREAM)
    key = jax.random.fold_in(key, 3)
    drawn = []
    for slice_ in range(SLICES):
        own = jax.tree.map(lambda x, s=slice_: jnp.asarray(np.asarray(x)[s]), buffer)
        for block in range(blocks):
            one = jax.random.fold_in(jax.random.fold_in(key, slice_), block)
            drawn.append(_sample(own, one))
    whole = jax.tree.map(lambda *x: jnp.concatenate(x), *drawn)
    params, models = toy_engine.random_drafter(), toy_engine.random_policy()

    @jax.jit
    def mean_loss(params, microbatch: Microbatch):
        loss, pairs = objectives.loss_sum(params, models, SHAPE, DRAFTER, microbatch)
        return loss / pairs

    loss, gradients = jax.value_and_grad(mean_loss)(params, whole)
    CLOSE(report.draft_loss[0], loss)
    fresh = spot_training.optimizer(DRAFTER)
    updates, moments = fresh.update(gradients, fresh.init(params), params)
    wanted, got = (optax.tree_utils.tree_get(s, "mu") for s in (moments, state.opt_state))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), got, wanted)
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), state.params, params)
    assert min(jax.tree.leaves(moved)) > 0.5 * DRAFTER.learning_rate
    del updates


def test_a_slice_with_an_empty_buffer_takes_nothing(programs, target):
    """Slice 1 never had a row: it idles from the start, but there is nothing to learn from."""
    state = _prefilled(programs, target, [9] * 4 + [1] * 4, ids=[0, 1, 2, 3] + [INVALID] * 4)
    old = toy_engine.drafter_state(programs, toy_engine.random_drafter())
    given = {"rounds": 21, "training": True, "state": old}
    new, buffer, rows, report = _run(programs, target, state, **given)
    assert report.stats.rounds[0] > PRICE and report.stats.rounds[1] == 0
    assert report.microbatches.tolist() == [0, 0] and buffer.filled.tolist() == [2, 0]
    jax.tree.map(np.testing.assert_array_equal, new, old)
    # With nothing live anywhere, all whole blocks are for training: slice 1 still cannot.
    new, _, _, report = _run(programs, target, rows, buffer=buffer, **given)
    assert report.stats.rounds.tolist() == [0, 0]
    assert report.microbatches.tolist() == [21 // PRICE, 0] and int(new.version) == 1
    toy_engine.assert_same_on_all_devices(new)


def test_a_slice_that_gives_up_keeps_no_other_training(programs, target):
    """Slice 0 ends after three rounds; slice 1, idle, trains in the blocks until then alone."""
    state = _prefilled(programs, target, [14] * 4 + [1] * 4, ids=range(8))
    draft = jax.tree.map(lambda x: jnp.nan * x, toy_engine.random_drafter())
    given = {
        "rounds": 12,
        "training": True,
        "state": toy_engine.drafter_state(programs, draft),
        "buffer": _full_buffers(programs),
    }
    _, _, rows, report = _run(programs, target, state, give_up_below=2.0, **given)
    assert report.stats.rounds.tolist()[0] == 3 and np.any(rows.live)
    blocks = -(-3 // PRICE)
    assert report.microbatches[1] <= blocks < 12 // PRICE
    _, _, rows, report = _run(programs, target, state, give_up_below=0.0, **given)
    assert report.stats.rounds.tolist()[0] == 12 and report.microbatches[1] > blocks


def test_nothing_stored_anywhere_leaves_the_drafter_alone(programs, target):
    state = _prefilled(programs, target, [9] * 8, ids=[INVALID] * 8)
    old = toy_engine.drafter_state(programs, toy_engine.random_drafter())
    new, _, _, report = _run(programs, target, state, rounds=8, training=True, state=old)
    assert report.microbatches.tolist() == [0, 0] and np.all(np.isnan(report.draft_loss))
    jax.tree.map(np.testing.assert_array_equal, new, old)


def test_without_the_training_branch_the_drafter_stays(programs, target):
    state = _prefilled(programs, target, [1, 1, 1, 1, 9, 2, 2, 2])
    old = toy_engine.drafter_state(programs, toy_engine.random_drafter())
    new, buffer, _, report = _run(programs, target, state, rounds=12, training=False, state=old)
    assert report.microbatches.tolist() == [0, 0] and buffer.segments.tolist() == [4, 4]
    jax.tree.map(np.testing.assert_array_equal, new, old)


def _full_buffers(programs):
    """Buffers in which every row holds another random sequence."""
    empty = toy_engine.buffers(programs)
    rng = np.random.default_rng(0)
    full = dataclasses.replace(
        empty,
        tokens=jnp.asarray(rng.integers(3, SHAPE.vocab_size, empty.tokens.shape), jnp.int32),
        features=jnp.asarray(rng.normal(size=empty.features.shape), jnp.float32),
        segment_ids=jnp.zeros_like(empty.segment_ids),
        positions=jnp.broadcast_to(jnp.arange(DRAFTER.row_length), empty.positions.shape),
        filled=jnp.full_like(empty.filled, empty.tokens.shape[1]),
    )
    return jax.device_put(full, sharding.per_slice(programs.mesh))


def test_draws_differ_by_chunk(programs, target):
    """Else every chunk of a tail would train on the same rows."""
    state = _prefilled(programs, target, [9] * 8, ids=[INVALID] * 8)
    given = {"rounds": 8, "training": True, "buffer": _full_buffers(programs)}
    losses = [
        float(_run(programs, target, state, index=index, **given)[3].draft_loss[0])
        for index in (3, 4, 3)
    ]
    assert losses[0] == losses[2] != losses[1]


def test_a_buffer_of_tokens_alone_trains_alike(programs, target):
    """The policy makes the features anew: the same, for it has not changed since."""
    bare = dataclasses.replace(DRAFTER, store_features=False)
    other = dataclasses.replace(programs, drafter=bare, pool=ProgramPool())
    state = _prefilled(programs, target, [1, 1, 1, 1, 14, 2, 2, 2])
    found = [_run(p, target, state, rounds=24, training=True) for p in (programs, other)]
    (stored, whole, _, report), (anew, tokens, _, again) = found
    assert tokens.features is None and whole.features is not None
    assert report.microbatches.tolist() == again.microbatches.tolist() != [0, 0]
    np.testing.assert_allclose(again.draft_loss[0], report.draft_loss[0], rtol=1e-4)
    moments = (optax.tree_utils.tree_get(each.opt_state, "mu") for each in (anew, stored))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-5), *moments)


def test_with_a_tensor_axis_all_devices_agree():
    """Training inside a slice of two devices: same drafter everywhere, near that of one device."""
    programs = toy_engine.engine("tensor")
    target = toy_engine.place(programs, toy_engine.random_policy())
    state = _prefilled(programs, target, [1, 1, 1, 1, 14, 2, 2, 2])
    new, _, _, report = _run(programs, target, state, rounds=24, training=True, index=3)
    assert int(new.version) == 1 and report.microbatches[0] > 1 and report.microbatches[1] == 0
    toy_engine.assert_same_on_all_devices(new)
