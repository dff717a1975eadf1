"""Parameter trees as safetensors files: what `warm_start` writes and `train` begins from."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import safetensors
from safetensors.flax import load_file, save_file

from tlt_jax.sharding import tree_shapes
from tlt_jax.types import UserError


def _names(tree: Any) -> list[str]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]


def save(path: str | os.PathLike[str], tree: Any, *, dtype: str = "bfloat16") -> None:
    """Writes every leaf of `tree` in `dtype` under its dotted path; replaces the file at once."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = [jnp.asarray(leaf, dtype) for leaf in jax.tree.leaves(jax.device_get(tree))]
    partial = path.with_suffix(".partial")
    save_file(dict(zip(_names(tree), leaves, strict=True)), partial)
    partial.replace(path)


def holds(path: str | os.PathLike[str], name: str) -> bool:
    """Whether a file has a tensor of this name; one that cannot be read has none."""
    try:
        with safetensors.safe_open(path, "np") as file:
            return name in file.keys()  # noqa: SIM118 (the file is no mapping)
    except (safetensors.SafetensorError, OSError):
        return False


def load(path: str | os.PathLike[str], specs: Any, *, dtype: str) -> Any:
    """Reads the tree that `specs` (a tree of `ParamSpec`) declares.

    Raises:
      UserError: the file is missing or damaged, or holds other names or shapes than declared.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}; make them with python -m tlt_jax.warm_start.")
    try:
        arrays = load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}).") from error
    shapes = tree_shapes(specs, jnp.dtype(dtype))
    names = _names(shapes)
    leaves, treedef = jax.tree.flatten(shapes)
    wrong = sorted(set(names) ^ set(arrays))
    if wrong:
        raise UserError(
            f"{path} does not fit the configured model: '{wrong[0]}' is in only one of them."
        )
    for name, leaf in zip(names, leaves, strict=True):
        if arrays[name].shape != leaf.shape:
            raise UserError(
                f"{path} holds '{name}' of shape {arrays[name].shape}, but the configured model "
                f"needs {leaf.shape}."
            )
    return jax.tree.unflatten(treedef, [arrays[name].astype(dtype) for name in names])
