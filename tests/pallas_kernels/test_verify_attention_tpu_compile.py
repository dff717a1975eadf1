"""Compiles the verify_attention kernel for TPU chips on a host without one, and reads its cost."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.verify_attention import verify_attention, verify_attention_reference

pytestmark = pytest.mark.tpu_compile

_TOPOLOGIES = ("v5e:2x2", "v4:2x2x1")
_REPLICATED = (P(), P(), P(), P(), P())
_kernel = functools.partial(verify_attention, backend="tpu")


@pytest.fixture(params=_TOPOLOGIES)
def tpu_devices(request):
    return tpu_topologies.devices(request.param)


def _compile(attend, devices, *, b, t, n, k, s, h, dtype, specs=_REPLICATED):
    """Compiles for a (slice, tensor) mesh of `devices`; `specs` shard q, k, v, lengths, mask."""
    mesh = Mesh(np.asarray(devices), ("slice", "tensor"), axis_types=(AxisType.Auto,) * 2)
    if mesh.size > 1:
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=specs[0])
    shapes = [((b, t, n, h), dtype), *[((b, k, s, h), dtype)] * 2]
    shapes += [((b,), jnp.int32), ((t, t), jnp.bool_)]
    arguments = [
        jax.ShapeDtypeStruct(*shape, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(attend).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def test_one_chip_of_a_7b_model_copies_no_cache(tpu_devices):
    # 28 query and 4 kv heads over 4 chips. The cache is 2 * 8 * 4096 * 128 bfloat16 = 16 MiB.
    axes = dict(b=8, t=8, n=7, k=1, s=4096, h=128, dtype=jnp.bfloat16)
    chip = np.asarray(tpu_devices[:1]).reshape(1, 1)
    kernel = _compile(_kernel, chip, **axes)
    reference = _compile(verify_attention_reference, chip, **axes)

    cache_bytes = 16 * 2**20
    assert "tpu_custom_call" in kernel.as_text()
    assert kernel.memory_analysis().temp_size_in_bytes < cache_bytes / 100
    # The kernel's share is its own cost estimate (the cache read once); the compiler counts the
    # rest, and would count a pad, transpose or cast of the cache on the way into the kernel.
    assert cache_bytes < kernel.cost_analysis()["bytes accessed"] < 1.1 * cache_bytes
    assert reference.cost_analysis()["bytes accessed"] > 4 * cache_bytes


@pytest.mark.parametrize(
    "axes",
    [
        dict(b=2, t=5, n=3, k=1, s=384, h=64, dtype=jnp.float32),
        dict(b=2, t=5, n=3, k=3, s=300, h=80, dtype=jnp.bfloat16),
        dict(b=1, t=128, n=8, k=1, s=1024, h=128, dtype=jnp.bfloat16),
    ],
    ids=["block-384-rows-15", "one-block-rows-5", "rows-1024"],
)
def test_other_shapes_compile(tpu_devices, axes):
    chip = np.asarray(tpu_devices[:1]).reshape(1, 1)
    assert "tpu_custom_call" in _compile(_kernel, chip, **axes).as_text()


def test_rows_and_heads_shard_without_communication(tpu_devices):
    axes = dict(b=4, t=4, n=4, k=2, s=256, h=64, dtype=jnp.bfloat16)
    cache = P("slice", "tensor")
    compiled = _compile(
        _kernel,
        np.asarray(tpu_devices[:4]).reshape(2, 2),
        specs=(P("slice", None, "tensor"), cache, cache, P("slice"), P()),
        **axes,
    )
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    assert not [name for name in ("all-gather", "all-reduce", "all-to-all") if name in text]
    assert compiled.memory_analysis().argument_size_in_bytes < math.prod((4, 2, 256, 64)) * 2
