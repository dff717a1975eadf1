"""The mesh and the one table from logical axes to mesh axes.

Every sharding in the library comes from `spec` and this table. A parameter is declared once, as a
`ParamSpec`; abstract shapes, shardings and initial values all derive from that declaration.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlt_jax.config import MeshConfig
from tlt_jax.types import UserError

SLICE = "slice"
TENSOR = "tensor"

# Logical axis -> mesh axis. Rollout weights are copied per slice; training shards `width` as well.
ROLLOUT_RULES: dict[str | None, str | None] = {
    None: None,
    "vocab": TENSOR,
    "kv_heads": TENSOR,
    "heads": TENSOR,
    "ffn": TENSOR,
    "width": None,
    "rows": SLICE,
}
TRAIN_RULES = ROLLOUT_RULES | {"width": SLICE}


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter: its shape, a logical axis per dimension, and its initial standard deviation.

    `scale` 0 means zeros, `scale` None means ones.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    scale: float | None

    def __post_init__(self):
        assert len(self.shape) == len(self.axes)


def make_mesh(config: MeshConfig) -> Mesh:
    """Mesh of `config.slices` x `config.tensor` over the devices of all processes.

    Raises:
      UserError: there are fewer devices than the mesh needs.
    """
    needed = config.slices * config.tensor
    devices = jax.devices()
    if len(devices) < needed:
        raise UserError(
            f"config.mesh asks for {config.slices} slices x {config.tensor} tensor = {needed} "
            f"devices, but {len(devices)} {devices[0].platform} device(s) are present; lower "
            "config.mesh.slices or config.mesh.tensor."
        )
    grid = np.asarray(devices[:needed]).reshape(config.slices, config.tensor)
    return Mesh(grid, (SLICE, TENSOR))


def spec(axes: tuple[str | None, ...], rules: dict[str | None, str | None]) -> PartitionSpec:
    """Partition spec of an array with these logical axes."""
    return PartitionSpec(*(rules[axis] for axis in axes))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def per_slice(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose first axis is split over the slices."""
    return NamedSharding(mesh, PartitionSpec(SLICE))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, ParamSpec)


def tree_shardings(specs: Any, mesh: Mesh, rules: dict[str | None, str | None]) -> Any:
    """NamedSharding for every `ParamSpec` of a tree."""
    return jax.tree.map(lambda s: NamedSharding(mesh, spec(s.axes, rules)), specs, is_leaf=_is_spec)


def tree_shapes(specs: Any, dtype: jnp.dtype) -> Any:
    """ShapeDtypeStruct for every `ParamSpec` of a tree."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, dtype), specs, is_leaf=_is_spec)


def tree_init(specs: Any, key: jax.Array, dtype: jnp.dtype) -> Any:
    """Initial parameters: normal with each spec's standard deviation, zeros or ones."""
    leaves, treedef = jax.tree.flatten(specs, is_leaf=_is_spec)
    keys = jax.random.split(key, len(leaves))

    def init(leaf: ParamSpec, leaf_key: jax.Array) -> jax.Array:
        if leaf.scale is None:
            return jnp.ones(leaf.shape, dtype)
        if leaf.scale == 0:
            return jnp.zeros(leaf.shape, dtype)
        return (jax.random.normal(leaf_key, leaf.shape) * leaf.scale).astype(dtype)

    return jax.tree.unflatten(treedef, [init(*pair) for pair in zip(leaves, keys, strict=True)])


def cast(tree: Any, dtype: jnp.dtype | str) -> Any:
    """The tree in another dtype; master weights are float32, working copies may be narrower."""
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def resharder(shardings: Any, dtype: jnp.dtype | str) -> Callable[[Any], Any]:
    """One jitted program that copies a tree into `shardings`: the step from learner to rollout."""
    return jax.jit(lambda tree: cast(tree, dtype), out_shardings=shardings)


def to_host(tree: Any) -> Any:
    """Numpy copies of a tree on every process, whichever processes hold its shards."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, every copy on a device counted once."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
