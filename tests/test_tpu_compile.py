"""Compiles the programs of an RL step for TPU topologies on a host without a TPU.

Device `i` of a compiled program is entry `i` of its flattened (slice, tensor) mesh.
"""

import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_topologies
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from tpu_topologies import GIB, QWEN_7B

from pallas_kernels.verify_attention.tpu import verify_attention_tpu
from tlt_jax import (
    attention,
    buffer,
    chunk,
    drafter,
    kv_cache,
    learner,
    ngram,
    packing,
    policy,
    row_programs,
    sampling,
    sharding,
    spot_training,
)
from tlt_jax.chunk import ChunkKind, ChunkOrders
from tlt_jax.config import DrafterConfig, LearnerConfig, MeshConfig, PolicyConfig
from tlt_jax.sharding import ROLLOUT_RULES, SLICE, TENSOR
from tlt_jax.speculation import Sampler
from tlt_jax.types import Strategy


def compiles_for_tpu(test):
    return pytest.mark.tpu_compile(pytest.mark.parametrize("backend", ["reference", "tpu"])(test))


POLICY = PolicyConfig(
    vocab_size=1024,
    num_layers=4,
    width=512,
    num_heads=8,
    num_kv_heads=4,
    head_size=128,
    ffn_width=1536,
    dtype="bfloat16",
)
CHAIN = Strategy(4)


class Shapes(NamedTuple):
    """Abstract arguments of the rollout's programs, with shardings."""

    target: Any
    batch: tuple[Any, ...]
    state: Any
    buffer: Any
    library: Any
    sampler: Any
    orders: Any
    rows: Any

    @property
    def of_chunk(self):
        return tuple(getattr(self, name) for name in self._fields if name != "batch")


def _mesh(topology, *, slices, tensor):
    grid = np.asarray(tpu_topologies.devices(topology)).reshape(slices, tensor)
    return Mesh(grid, (SLICE, TENSOR), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module")
def mesh():
    return _mesh("v5e:2x2", slices=2, tensor=2)


def _placed(shapes, shardings):
    """`shapes` with shardings, given as a prefix tree."""
    return jax.tree.map(
        lambda x, held: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=held),
        shapes,
        jax.tree.broadcast(shardings, shapes),
    )


def _evaluated(make, shardings):
    return _placed(jax.eval_shape(make), shardings)


def _params(mesh, config, rules):
    specs = policy.param_specs(config)
    shapes = sharding.tree_shapes(specs, jnp.dtype(config.dtype))
    return _placed(shapes, sharding.tree_shardings(specs, mesh, rules))


def _sampling_params():
    return sampling.make_params(1.0, 0, 1.0, filtered=False)


def _prefill(mesh, config, length):
    return row_programs.prefill_program(mesh, config, length=length, keep_features=True)


def _chunk(mesh, config, drafter_config, *, training, strategy=CHAIN):
    kind = ChunkKind(strategy, training=training)
    return chunk.chunk_program(mesh, config, drafter_config, kind, keep_features=True)


def _shapes(mesh, config, drafter_config, *, rows, length, prompt):
    """Arguments for `rows` rows per slice, caches of `length` and prompts of `prompt` tokens."""
    whole, by_slice = sharding.replicated(mesh), sharding.per_slice(mesh)
    slices = mesh.shape[SLICE]
    target = _params(mesh, config, ROLLOUT_RULES)
    number = jax.ShapeDtypeStruct((slices * rows,), jnp.int32, sharding=by_slice)
    tokens = jax.ShapeDtypeStruct((slices * rows, prompt), jnp.int32, sharding=by_slice)
    batch = (tokens, number, number, number, number)

    def drafter_state():
        params = drafter.init(config, drafter_config, jax.random.key(0))
        return spot_training.init_state(spot_training.optimizer(drafter_config), params)

    def buffers():
        own = buffer.empty(drafter_config, config)
        return jax.tree.map(lambda x: jnp.stack([x] * slices), own)

    return Shapes(
        target=target,
        batch=batch,
        state=_evaluated(drafter_state, whole),
        buffer=_evaluated(buffers, by_slice),
        library=_evaluated(functools.partial(ngram.empty_library, 64, length), whole),
        sampler=_evaluated(
            lambda: Sampler(jax.random.key(0), _sampling_params(), jnp.zeros((1,), jnp.int32)),
            whole,
        ),
        orders=_evaluated(
            lambda: ChunkOrders(
                jnp.int32(0),
                jnp.int32(0),
                jnp.ones(CHAIN.depth),
                jnp.float32(0),
                block=jnp.int32(4),
                microbatches=jnp.int32(1),
            ),
            whole,
        ),
        rows=_evaluated(
            functools.partial(_prefill(mesh, config, length), target, *batch),
            row_programs.state_shardings(mesh, keep_features=True),
        ),
    )


def _small(mesh, backend):
    """The small policy with `backend`, a drafter of its size, and arguments."""
    config = dataclasses.replace(POLICY, attention_backend=backend)
    drafter_config = DrafterConfig(ffn_width=1024, row_length=512)
    shapes = _shapes(mesh, config, drafter_config, rows=4, length=512, prompt=64)
    return config, drafter_config, shapes


def _device_bytes(tree):
    """Bytes of one device's share of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _iota(dims, order):
    """Device ids of HLO's `dims <= [..]T(order)`, flat."""
    dims = [int(size) for size in dims.split(",")]
    order = [int(axis) for axis in order.split(",")] if order else list(range(len(dims)))
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).ravel()


def _device_groups(text):
    """Which devices talk to one another, one list for each group of each collective of HLO text.

    HLO writes groups out, `{{0,1},{2,3}}`, as a reshaped range, `[2,2]<=[2,2]T(1,0)`, or as axes of
    a mesh, `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}`.
    """
    groups, collectives = [], 0
    for written in re.findall(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]+\})\}", text):
        collectives += 1
        groups += [[int(i) for i in group.split(",")] for group in re.findall(r"[\d,]*\d", written)]
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    for shape, dims, order in re.findall(rf"replica_groups=\[([\d,]+)\]<={iota}", text):
        collectives += 1
        count = int(shape.split(",")[0])
        groups += _iota(dims, order).reshape(count, -1).tolist()
    by_axes = rf"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\({iota}\))? \{{([^}}:]+)\}}"
    for axes, dims, order, chosen in re.findall(by_axes, text):
        collectives += 1
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", axes)}
        ids = _iota(dims or str(math.prod(sizes.values())), order).reshape(*sizes.values())
        last = [list(sizes).index(name) for name in chosen.split(",")]
        first = [axis for axis in range(ids.ndim) if axis not in last]
        per_group = math.prod(ids.shape[axis] for axis in last)
        groups += ids.transpose(first + last).reshape(-1, per_group).tolist()
    found = len(re.findall(r"(?:replica_groups|source_target_pairs)=", text))
    assert collectives == found, f"{found - collectives} collectives have groups of another form"
    return groups


def _slice_groups(compiled, mesh):
    """Groups of devices, as in `_device_groups`, that reach over more than one slice."""
    tensor = mesh.shape[TENSOR]
    groups = _device_groups(compiled.as_text())
    return [group for group in groups if len({i // tensor for i in group}) > 1]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("all-reduce(x), replica_groups={{0,2},{1,3}}, to_apply=add", [[0, 2], [1, 3]]),
        ("permute(x), channel_id=1, source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=[2,2]<=[4], use_global", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), use_global", [[0, 2], [1, 3]]),
        ("replica_groups=[1,4]<=[4]", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x={1}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}, dims={0}",
            [[0, 1], [2, 3]],
        ),
    ],
)
def test_device_groups_by_hand(text, groups):
    assert _device_groups(text) == groups


@pytest.mark.parametrize("kernel_rows", [1024, 4, 1], ids="{} rows".format)
def test_the_kernel_sees_each_devices_own_heads(monkeypatch, kernel_rows):
    batch, count, heads, kv_heads, size, length = 4, 5, 4, 2, 8, 16
    rng = np.random.default_rng(0)
    shapes = [(batch, count, heads, size)] + [(batch, count, kv_heads, size)] * 2
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    lengths = jnp.array([0, 3, 11, 7], jnp.int32)
    old = rng.standard_normal((2, batch, kv_heads, length, size))
    cache = kv_cache.LayerCache(*jnp.asarray(old, jnp.float32))

    def on_mesh(backend):
        attend = functools.partial(attention.cached, backend=backend)
        program = jax.shard_map(
            attend,
            mesh=sharding.make_mesh(MeshConfig(slices=2, tensor=2)),
            in_specs=P(SLICE),
            out_specs=P(SLICE),
            axis_names={SLICE},
            check_vma=False,
        )
        return jax.jit(program)(q, k, v, cache, lengths)

    expected, expected_cache = on_mesh("reference")
    calls = []

    def interpreted(*arguments, backend):
        assert backend == "tpu"
        calls.append([x.shape for x in arguments[:2]])
        return verify_attention_tpu(*arguments, interpret=True)

    monkeypatch.setattr(attention, "verify_attention", interpreted)
    monkeypatch.setattr(attention, "KERNEL_ROWS", kernel_rows)
    found, found_cache = on_mesh("tpu")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found_cache, expected_cache)
    # Two rows, two query heads and one kv head a device; blocks of at most `kernel_rows` rows.
    tokens = {1024: [5], 4: [2, 2, 1], 1: [1] * 5}[kernel_rows]
    assert calls == [[(2, n, 2, size), (2, 1, length, size)] for n in tokens]


def _assert_updated_in_place(compiled, donated):
    """What is donated comes back in its own memory, and there is no second copy of it."""
    memory, donated_bytes = compiled.memory_analysis(), _device_bytes(donated)
    assert memory.alias_size_in_bytes >= donated_bytes
    assert memory.temp_size_in_bytes < donated_bytes


@compiles_for_tpu
@pytest.mark.parametrize("strategy", [CHAIN, Strategy(4, 4, 40)], ids=str)
def test_a_chunk_without_training_stays_in_its_slice(mesh, backend, strategy):
    config, drafter_config, shapes = _small(mesh, backend)
    shapes = shapes._replace(library=None)
    program = _chunk(mesh, config, drafter_config, training=False, strategy=strategy)
    compiled = tpu_topologies.compiled(program, *shapes.of_chunk)
    assert ("tpu_custom_call" in compiled.as_text()) == (backend == "tpu")
    assert _device_groups(compiled.as_text())  # of the tensor axis
    assert not _slice_groups(compiled, mesh)
    _assert_updated_in_place(compiled, (shapes.state, shapes.buffer, shapes.rows))


@compiles_for_tpu
def test_texts_for_the_ngram_drafter_reach_all_slices(mesh, backend):
    config, drafter_config, shapes = _small(mesh, backend)
    strategy = Strategy(4, ngram=True)
    program = _chunk(mesh, config, drafter_config, training=False, strategy=strategy)
    compiled = tpu_topologies.compiled(program, *shapes.of_chunk)
    assert _slice_groups(compiled, mesh)
    _assert_updated_in_place(compiled, (shapes.state, shapes.buffer, shapes.library, shapes.rows))


@compiles_for_tpu
def test_a_chunk_with_training_adds_gradients_over_slices(mesh, backend):
    config, drafter_config, shapes = _small(mesh, backend)
    compiled = tpu_topologies.compiled(
        _chunk(mesh, config, drafter_config, training=True), *shapes.of_chunk
    )
    assert ("tpu_custom_call" in compiled.as_text()) == (backend == "tpu")
    assert _slice_groups(compiled, mesh)
    _assert_updated_in_place(compiled, (shapes.state, shapes.buffer, shapes.library, shapes.rows))


@compiles_for_tpu
def test_prefill_stays_in_its_slice(mesh, backend):
    config, _, shapes = _small(mesh, backend)
    length = shapes.rows.tokens.shape[1]
    compiled = tpu_topologies.compiled(_prefill(mesh, config, length), shapes.target, *shapes.batch)
    assert ("tpu_custom_call" in compiled.as_text()) == (backend == "tpu")
    assert _device_groups(compiled.as_text())
    assert not _slice_groups(compiled, mesh)
    assert compiled.memory_analysis().temp_size_in_bytes < _device_bytes(shapes.rows)


@compiles_for_tpu
def test_a_refill_stays_in_its_slice_and_in_place(mesh, backend):
    config, _, shapes = _small(mesh, backend)
    few = [
        jax.ShapeDtypeStruct((mesh.shape[SLICE], *x.shape[1:]), x.dtype, sharding=x.sharding)
        for x in shapes.batch
    ]
    program = row_programs.refill_program(mesh, config, keep_features=True)
    slots = few[1]  # numbers, like lengths
    compiled = tpu_topologies.compiled(
        program, shapes.target, shapes.state.params, shapes.rows, slots, *few
    )
    assert not _slice_groups(compiled, mesh)
    _assert_updated_in_place(compiled, shapes.rows)


@pytest.mark.tpu_compile
def test_the_policy_update_keeps_its_state_in_place(mesh):
    settings = LearnerConfig(row_length=512, microbatch_rows=2, updates_per_step=2)
    tx = learner.optimizer(settings, num_steps=100)
    whole = sharding.replicated(mesh)
    reference = _params(mesh, POLICY, ROLLOUT_RULES)
    state = _placed(
        jax.eval_shape(functools.partial(learner.init_state, mesh, POLICY, tx), reference),
        learner.state_shardings(mesh, POLICY, tx),
    )
    empty = packing.empty_batch(4, settings.microbatch_rows, settings.row_length)
    compiled = tpu_topologies.compiled(
        learner.update_program(mesh, POLICY, settings, tx),
        state,
        reference,
        _evaluated(_sampling_params, whole),
        _placed(empty, learner.batch_sharding(mesh)),
        jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
    )
    assert _slice_groups(compiled, mesh)
    assert compiled.memory_analysis().alias_size_in_bytes >= _device_bytes(state)


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize("training", [False, True], ids=["rollout", "training"])
def test_a_7b_policy_fits_v5e_chips(training):
    mesh = _mesh("v5e:4x4", slices=4, tensor=4)
    drafter_config = DrafterConfig(
        ffn_width=QWEN_7B.ffn_width, buffer_megabytes=500, row_length=4096
    )
    shapes = _shapes(mesh, QWEN_7B, drafter_config, rows=8, length=4096, prompt=512)
    program = _chunk(mesh, QWEN_7B, drafter_config, training=training)
    memory = tpu_topologies.compiled(program, *shapes.of_chunk).memory_analysis()
    held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    print(f"a chip holds {held / GIB:.2f} GiB of arguments, {temporary / GIB:.2f} of temporaries")
    assert held + temporary < 16 * GIB
