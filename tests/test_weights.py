"""Parameter files: the round trip, and one sentence for each way a file can be wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import policy, weights
from tlt_jax.sharding import ParamSpec
from tlt_jax.types import UserError

SPECS = {
    "layers": (
        {"qkv": ParamSpec((2, 3), (None, None), 1.0)},
        {"qkv": ParamSpec((2, 3), (None, None), 1.0)},
    ),
    "norm": ParamSpec((3,), (None,), None),
}


def _tree():
    first, second = np.arange(12, dtype=np.float32).reshape(2, 2, 3) / 8
    return {
        "layers": ({"qkv": jnp.asarray(first)}, {"qkv": jnp.asarray(second)}),
        "norm": jnp.array([1.0, 1 + 2**-12, -3.0]),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_round_trip_returns_the_same_bits(tmp_path, dtype):
    path, tree = tmp_path / "made" / "for it" / "policy.safetensors", _tree()
    weights.save(path, tree, dtype=dtype)
    found = weights.load(path, SPECS, dtype=dtype)
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(dtype)}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(dtype)), found, tree)
    assert [p.name for p in path.parent.iterdir()] == ["policy.safetensors"]


def test_files_are_bfloat16_unless_told_else_and_read_in_any_dtype(tmp_path):
    weights.save(tmp_path / "a.safetensors", _tree())
    found = weights.load(tmp_path / "a.safetensors", SPECS, dtype="float32")
    assert found["norm"].dtype == jnp.float32
    np.testing.assert_array_equal(found["norm"], [1.0, 1.0, -3.0])  # 1 + 2^-12 was rounded


def test_a_whole_policy_survives(tmp_path, tiny_config, random_params):
    specs = policy.param_specs(tiny_config)
    params = random_params(specs, 0)
    weights.save(tmp_path / "p.safetensors", params, dtype="float32")
    jax.tree.map(
        np.testing.assert_array_equal,
        weights.load(tmp_path / "p.safetensors", specs, dtype="float32"),
        params,
    )


def test_saving_replaces_the_file(tmp_path):
    path, tree = tmp_path / "a.safetensors", _tree()
    weights.save(path, jax.tree.map(jnp.zeros_like, tree))
    weights.save(path, tree)
    found = weights.load(path, SPECS, dtype="bfloat16")
    np.testing.assert_array_equal(found["layers"][1]["qkv"], tree["layers"][1]["qkv"])


def _sentence(path, specs=SPECS):
    with pytest.raises(UserError) as raised:
        weights.load(path, specs, dtype="float32")
    assert str(path) in str(raised.value)
    return str(raised.value)


def test_a_missing_file_says_how_to_make_it(tmp_path):
    assert "python -m tlt_jax.warm_start" in _sentence(tmp_path / "nothing.safetensors")
    assert "no weights at" in _sentence(tmp_path)  # a folder


@pytest.mark.parametrize("keep", [0, 5, 40, -3], ids=["empty", "stub", "header", "cut"])
def test_a_damaged_file_is_told_from_a_missing_one(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    weights.save(path, _tree())
    path.write_bytes(path.read_bytes()[:keep])
    assert "is not a readable safetensors file" in _sentence(path)


def test_a_name_in_only_one_of_file_and_model_is_given(tmp_path):
    path = tmp_path / "a.safetensors"
    weights.save(path, _tree())
    more = SPECS | {"head": ParamSpec((3, 4), (None, None), 1.0)}
    assert "'head' is in only one of them" in _sentence(path, more)
    fewer = SPECS | {"layers": SPECS["layers"][:1]}
    assert "'layers.1.qkv' is in only one of them" in _sentence(path, fewer)


def test_a_shape_that_does_not_fit_is_given(tmp_path, tiny_config, random_params):
    path = tmp_path / "a.safetensors"
    weights.save(path, random_params(policy.param_specs(tiny_config), 0))
    wider = dataclasses.replace(tiny_config, ffn_width=32)
    sentence = _sentence(path, policy.param_specs(wider))
    assert "'layers.0.down' of shape (24, 16)" in sentence and "needs (32, 16)" in sentence
