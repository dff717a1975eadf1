"""The pool compiles each program once, and a warmed-up rollout compiles nothing (promise 8)."""

import gc
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_engine

from tlt_jax import program_pool, sharding
from tlt_jax.budget import Block
from tlt_jax.controller import Controller
from tlt_jax.program_pool import ProgramPool, Recipe, abstract
from tlt_jax.types import Strategy


def _recipe(number, *, before=lambda: None, argument=None):
    """How to make a program that adds `number`; `before()` is called as it is made."""

    def build():
        before()
        return jax.jit(lambda x: x + number)

    return Recipe(number, build, (jnp.zeros(3) if argument is None else argument,))


def test_a_program_is_built_once_per_key():
    pool, built = ProgramPool(), []

    def recipe(number):
        return _recipe(number, before=lambda: built.append(number))

    for number in (1, 2, 1, 1):
        program = pool.get(recipe(number))
        np.testing.assert_array_equal(program(jnp.zeros(3)), np.full(3, number))
    assert built == [1, 2] and pool.compiled == pool.surprises == len(pool) == 2
    pool.clear()
    assert len(pool) == 0
    pool.get(recipe(1))
    assert built == [1, 2, 1] and pool.compiled == 3


def test_a_program_is_compiled_for_shapes_alone():
    """No array has to exist, and a call with another shape fails instead of compiling."""
    pool = ProgramPool()
    shape = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=jnp.zeros(3).sharding)
    program = pool.get(_recipe(1, argument=shape))
    np.testing.assert_array_equal(program(jnp.zeros(3)), np.ones(3))
    with pytest.raises(TypeError):
        program(jnp.zeros(4))
    assert pool.compiled == 1


def test_abstract_keeps_shape_dtype_and_sharding():
    programs = toy_engine.engine("main")
    whole = jax.device_put(jnp.zeros((4, 2), jnp.int32), sharding.per_slice(programs.mesh))
    held = abstract({"a": whole, "none": None})["a"]
    assert (held.shape, held.dtype, held.sharding) == ((4, 2), jnp.int32, whole.sharding)


def test_what_is_ordered_is_compiled_side_by_side():
    """Two that wait for one another end; what was ordered is no surprise."""
    meeting, pool = threading.Barrier(2, timeout=20), ProgramPool()
    pool.order([_recipe(1, before=meeting.wait), _recipe(2, before=meeting.wait)])
    pool.wait()
    np.testing.assert_array_equal(pool.get(_recipe(2))(jnp.zeros(3)), np.full(3, 2))
    assert (pool.compiled, pool.surprises, pool.busy) == (2, 0, False)


def test_what_is_needed_at_once_does_not_wait_for_what_was_ordered_before(monkeypatch):
    """One thread works on the first of three; the third is compiled by who asks for it."""
    monkeypatch.setattr(program_pool.os, "cpu_count", lambda: 1)
    begun, release, pool = threading.Event(), threading.Event(), ProgramPool()

    def block():
        begun.set()
        assert release.wait(20)

    pool.order([_recipe(1, before=block), _recipe(2), _recipe(3)])
    assert begun.wait(20) and pool.busy
    np.testing.assert_array_equal(pool.get(_recipe(3))(jnp.zeros(3)), np.full(3, 3))
    assert pool.compiled == 1 and pool.busy
    release.set()
    pool.wait()
    assert (pool.compiled, pool.surprises, len(pool)) == (3, 0, 3)


def test_the_clock_stands_while_a_program_is_waited_for():
    pool, began = ProgramPool(), time.monotonic()
    start = pool.clock()
    pool.get(_recipe(1, before=lambda: time.sleep(0.5)))
    pool.get(_recipe(1))
    assert pool.waited >= 0.5
    assert pool.clock() - start <= time.monotonic() - began - 0.5


def test_what_was_ordered_and_not_begun_can_be_left(monkeypatch):
    monkeypatch.setattr(program_pool.os, "cpu_count", lambda: 1)
    begun, release, pool = threading.Event(), threading.Event(), ProgramPool()
    pool.order([_recipe(1, before=lambda: (begun.set(), release.wait(20))), _recipe(2)])
    assert begun.wait(20)
    pool.cancel()
    release.set()
    pool.wait()
    assert pool.compiled == len(pool) == 1


def test_what_does_not_compile_says_so_to_all_who_want_it():
    def fails():
        raise RuntimeError("does not compile")

    pool = ProgramPool()
    pool.order([_recipe(1), _recipe(2, before=fails)])
    with pytest.raises(RuntimeError, match="does not compile"):
        pool.wait()
    with pytest.raises(RuntimeError, match="does not compile"):
        pool.get(_recipe(2))
    with pytest.raises(RuntimeError, match="does not compile"):
        ProgramPool().get(_recipe(2, before=fails))


def test_no_arrays_are_kept_for_what_was_ordered():
    release, pool, array = threading.Event(), ProgramPool(), jnp.zeros((4, 4))
    held = weakref.ref(array)
    pool.order([_recipe(1, before=lambda: release.wait(20), argument=array)])
    del array
    gc.collect()
    assert held() is None and pool.busy
    release.set()
    pool.wait()


@pytest.mark.parametrize(
    ("name", "first_rows", "strategies"),
    [
        ("main", 4, {4: Strategy(2), 1: Strategy(4)}),
        ("plain", 4, {4: Strategy(0), 1: Strategy(0)}),
        ("one slice", 8, {8: Strategy(2)}),
        ("four slices", 2, {2: Strategy(4)}),
    ],
)
def test_buckets_and_their_strategies(name, first_rows, strategies):
    programs = toy_engine.engine(name)
    assert programs.first_rows == first_rows
    arms = {rows: programs.arms(rows) for rows in programs.rollout.row_buckets}
    assert arms == {rows: (strategy,) for rows, strategy in strategies.items()}


def test_the_first_bucket_is_the_smallest_that_holds_all():
    programs = toy_engine.engine("main")  # eight sequences on two slices
    assert programs.having(row_buckets=(32, 8, 4, 1), strategies=("plain",) * 4).first_rows == 4
    assert programs.having(row_buckets=(32, 6, 1), strategies=("plain",) * 3).first_rows == 6
    assert programs.having(row_buckets=(32, 6, 1), prompts_per_step=4).first_rows == 32
    assert programs.having(row_buckets=(3, 1)).first_rows == 3  # two sequences wait


def test_lengths_grow_as_rows_shrink():
    programs = toy_engine.engine("main")  # row buckets 4 and 1, length buckets 24 and 48
    assert [programs.least_length(rows) for rows in programs.buckets] == [24, 48]
    many = programs.having(
        row_buckets=(8, 4, 2, 1), strategies=("plain",) * 4, length_buckets=(24, 32, 48)
    )
    assert [many.least_length(rows) for rows in many.buckets] == [24, 32, 48]  # 8 rows are not used


def test_sampler_and_orders_are_data_on_every_device():
    programs = toy_engine.engine("main").having(temperature=0.25)
    sampler = programs.sampler(jax.random.key(3), (2, 7))
    taught = Controller(log_sharpness=(0.0, 1.0, 2.0))
    orders = programs.orders(Strategy(2), rounds=5, index=2, controller=taught, block=Block(4, 3))
    assert float(sampler.params.temperature) == 0.25 and sampler.stop_tokens.tolist() == [2, 7]
    assert (int(orders.rounds), int(orders.index)) == (5, 2)
    assert (int(orders.block), int(orders.microbatches)) == (4, 3)
    np.testing.assert_allclose(orders.sharpness, [1.0, np.exp(1.0)])
    for leaf in jax.tree.leaves((sampler, orders)):
        assert leaf.sharding.is_fully_replicated and len(leaf.devices()) == 2


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # A chunk for 4 rows of either length and for 1 long row, with idle training two; growing
        # from one length, shrinking from one row bucket; prefill.
        ("main", 3 * 2 + 2 + 2 + 1),
        ("plain", 3 + 2 + 2 + 1),
        ("one slice", 2 + 1),
        ("plain, then chains", 2 + 1 + 1),
        ("queue", 2 * 2 + 1 + 1 + 2),  # the last for refilling caches of either length
    ],
)
def test_warming_up_compiles_what_a_rollout_can_need(name, count):
    assert toy_engine.engine(name).warmed_up == count


@pytest.mark.parametrize("name", ["main", "plain", "one slice", "four slices", "tensor", "queue"])
def test_after_warming_up_a_rollout_compiles_nothing(name):
    """Neither from the pool nor anywhere else; the first rollout loads constants of small jobs."""
    programs = toy_engine.engine(name)
    models = toy_engine.counting()[0], toy_engine.random_drafter()
    lengths = (30, 1, 2, 3, 4, 5, 6, 7)
    toy_engine.roll(programs, models, toy_engine.counting_prompts(*lengths))
    target, carry = toy_engine.place(programs, models[0]), toy_engine.carry(programs, models[1])
    asked, key = toy_engine.counting_prompts(*reversed(lengths)), jax.random.key(8)
    compiled = programs.pool.compiled
    with toy_engine.compilations() as found:
        toy_engine.rollout.run(
            programs.having(temperature=0.5, chunk_tokens=10),
            target,
            carry,
            asked,
            key,
            stop_tokens=(toy_engine.STOP,),
        )
    assert found == []
    assert programs.pool.compiled == compiled


def test_a_compilation_is_seen():
    """The test above would see nothing if JAX logged its compilations in other words."""
    with toy_engine.compilations() as found:
        jax.jit(lambda x: x * 3.25)(jnp.zeros(7))
    assert len(found) >= 1


def test_modes_that_draft_to_different_depths_share_a_pool():
    """What both use is compiled once and takes the orders of either."""
    first = toy_engine.engine("plain, then chains")
    models = toy_engine.random_policy(), toy_engine.random_drafter()
    seed, asked, _ = toy_engine.tailed()
    deeper = first.having(row_buckets=(8, 4, 1), strategies=("chain-5", "plain", "chain-4"))
    assert deeper.rollout.deepest > first.rollout.deepest and deeper.pool is first.pool
    wanted, got = (
        toy_engine.roll(programs, models, asked, seed=seed) for programs in (first, deeper)
    )
    assert {record.strategy for record in got.chunks} == {"plain", "chain-4"}
    for one, other in zip(wanted.responses, got.responses, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
