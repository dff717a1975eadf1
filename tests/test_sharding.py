"""The table of logical axes, sharded initial values, the resharder, and sharded against plain."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tlt_jax import policy, sharding
from tlt_jax.config import MeshConfig
from tlt_jax.sharding import ROLLOUT_RULES, TRAIN_RULES, ParamSpec
from tlt_jax.types import UserError

_decode = jax.jit(policy.decode, static_argnames="config")
_packed = jax.jit(policy.packed_forward, static_argnames="config")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(slices=2, tensor=2))


@pytest.fixture(scope="module")
def even_config(tiny_config):
    """The tiny policy with a vocabulary that two devices can share."""
    return dataclasses.replace(tiny_config, vocab_size=12, qkv_bias=True)


@pytest.mark.parametrize(
    ("axes", "rollout", "train"),
    [
        (("vocab", "width"), P("tensor", None), P("tensor", "slice")),
        (("width", "kv_heads", None, None), P(None, "tensor", None, None), None),
        (("width", None, "ffn"), P(None, None, "tensor"), P("slice", None, "tensor")),
        (("rows", None), P("slice", None), P("slice", None)),
        ((None, "heads"), P(None, "tensor"), P(None, "tensor")),
        ((), P(), P()),
    ],
)
def test_specs_by_hand(axes, rollout, train):
    assert sharding.spec(axes, ROLLOUT_RULES) == rollout
    train = P("slice", "tensor", None, None) if train is None else train
    assert sharding.spec(axes, TRAIN_RULES) == train


def test_an_unknown_axis_is_an_error():
    with pytest.raises(KeyError):
        sharding.spec(("vocabulary",), ROLLOUT_RULES)


def test_mesh_axes_and_devices(mesh):
    assert mesh.axis_names == ("slice", "tensor") and mesh.devices.shape == (2, 2)
    assert mesh.devices.ravel().tolist() == jax.devices()[:4]
    # A slice is a run of neighbouring devices, where the tensor axis has its fast links.
    smaller = sharding.make_mesh(MeshConfig(slices=1, tensor=2))
    assert smaller.devices.tolist() == [jax.devices()[:2]]


def test_a_mesh_that_does_not_fit_is_told_in_a_sentence():
    with pytest.raises(UserError) as raised:
        sharding.make_mesh(MeshConfig(slices=100, tensor=2))
    sentence = str(raised.value)
    assert "100 slices x 2 tensor = 200 devices" in sentence
    assert f"but {jax.device_count()} " in sentence and "config.mesh.slices" in sentence


def test_initial_values_follow_their_declaration():
    specs = {
        "gain": ParamSpec((4,), ("width",), None),
        "bias": ParamSpec((4,), ("width",), 0),
        "a": ParamSpec((64, 64), (None, None), 0.5),
        "b": ParamSpec((64, 64), (None, None), 0.5),
    }
    made = sharding.tree_init(specs, jax.random.key(0), jnp.dtype("bfloat16"))
    assert {x.dtype for x in made.values()} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(made["gain"], np.ones(4))
    np.testing.assert_array_equal(made["bias"], np.zeros(4))
    for name in ("a", "b"):
        values = np.asarray(made[name], np.float32)
        # The standard error is 0.5 / sqrt(4096) = 0.008 of the mean, 0.0055 of the deviation.
        assert abs(values.mean()) < 0.03 and abs(values.std() - 0.5) < 0.02
    assert not np.array_equal(made["a"], made["b"])


def test_a_spec_needs_one_axis_per_dimension():
    with pytest.raises(AssertionError):
        ParamSpec((2, 3), ("width",), None)


@pytest.fixture(scope="module")
def specs(even_config):
    return policy.param_specs(even_config)


@pytest.mark.parametrize(
    ("name", "rollout", "train"),
    [
        ("qkv", (16, 1, 4, 4), (8, 1, 4, 4)),  # [D, K, G + 2, H]
        ("qkv_bias", (1, 4, 4), (1, 4, 4)),
        ("out", (1, 2, 4, 16), (1, 2, 4, 8)),  # [K, G, H, D]
        ("gate_up", (16, 2, 12), (8, 2, 12)),  # [D, 2, F]
        ("down", (12, 16), (12, 8)),
        ("ffn_norm", (16,), (8,)),
        ("q_norm", (4,), (4,)),
    ],
)
def test_what_a_device_holds_of_a_layer(mesh, specs, name, rollout, train):
    layer = specs["layers"][1]
    for rules, shape in ((ROLLOUT_RULES, rollout), (TRAIN_RULES, train)):
        held = sharding.tree_shardings(layer, mesh, rules)[name]
        assert held.shard_shape(layer[name].shape) == shape


@pytest.fixture(scope="module")
def trained_specs(specs):
    return {name: specs[name] for name in ("embed", "head", "norm")}


@pytest.fixture(scope="module")
def trained(mesh, trained_specs):
    """Initial parameters made in training layout, and the same made without a mesh."""

    def init(key):
        return sharding.tree_init(trained_specs, key, jnp.dtype("float32"))

    shardings = sharding.tree_shardings(trained_specs, mesh, TRAIN_RULES)
    key = jax.random.key(1)
    return jax.jit(init, out_shardings=shardings)(key), jax.jit(init)(key)


def test_sharded_initial_values_are_the_plain_ones(trained):
    sharded, plain = trained
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), sharded, plain)
    assert sharded["embed"].addressable_shards[0].data.shape == (6, 8)  # [V, D] = [12, 16]
    assert sharded["head"].addressable_shards[0].data.shape == (8, 6)
    assert sharded["norm"].addressable_shards[0].data.shape == (8,)


def test_the_resharder_is_one_program_that_changes_no_value(mesh, trained_specs, trained, caplog):
    wanted = sharding.tree_shardings(trained_specs, mesh, ROLLOUT_RULES)
    reshard = sharding.resharder(wanted, "float32")

    def compiled_programs():
        return sum("Finished XLA compilation" in record.message for record in caplog.records)

    with jax.log_compiles():
        moved = reshard(trained[0])
        reshard(trained[0])
        assert compiled_programs() == 1
    jax.tree.map(np.testing.assert_array_equal, moved, trained[0])
    jax.tree.map(_check_sharding, moved, wanted)
    assert moved["embed"].addressable_shards[0].data.shape == (6, 16)
    assert moved["norm"].addressable_shards[0].data.shape == (16,)


def _check_sharding(array, wanted):
    assert array.sharding.is_equivalent_to(wanted, array.ndim)


def test_a_sharded_policy_is_the_plain_one(mesh, even_config, random_params):
    specs = policy.param_specs(even_config)
    plain = random_params(specs, 0)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 12, (4, 6)).astype(np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1]] * 4, np.int32)
    segments = np.array([[0, 0, 0, 0, 1, 1]] * 4, np.int32)
    packed = (tokens, positions, segments)
    expected, _ = _packed(plain, even_config, *packed)
    lengths = np.array([0, 1, 2, 3], np.int32)
    cache = jax.tree.map(  # any numbers will do for the tokens before
        lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype),
        policy.empty_cache(even_config, 4, 9),
    )
    decoded, _, _ = _decode(plain, even_config, tokens, cache, lengths)
    rows = sharding.per_slice(mesh)
    heads = jax.sharding.NamedSharding(
        mesh, sharding.spec(("rows", "kv_heads", None, None), ROLLOUT_RULES)
    )
    for rules in (TRAIN_RULES, ROLLOUT_RULES):
        params = jax.device_put(plain, sharding.tree_shardings(specs, mesh, rules))
        found, _ = _packed(params, even_config, *jax.device_put(packed, rows))
        assert len(found.sharding.device_set) == 4
        np.testing.assert_allclose(found, expected, atol=1e-5)
    found, _, written = _decode(
        params,
        even_config,
        jax.device_put(tokens, rows),
        jax.device_put(cache, heads),
        jax.device_put(lengths, rows),
    )
    np.testing.assert_allclose(found, decoded, atol=1e-5)
    assert written[0].k.addressable_shards[0].data.shape == (2, 1, 9, 4)  # [B, K, S, H]


def test_host_copies_and_bytes(trained):
    sharded, plain = trained
    held = sharding.to_host(sharded)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(held))
    jax.tree.map(np.testing.assert_array_equal, held, jax.device_get(sharded))
    tree = {"a": jnp.zeros((3, 5), jnp.bfloat16), "b": jnp.zeros((7,), jnp.int32)}
    assert sharding.tree_bytes(tree) == 3 * 5 * 2 + 7 * 4
    assert sharding.tree_bytes(sharded) == sharding.tree_bytes(plain)


def test_shapes_come_from_the_same_declaration(specs):
    shapes = sharding.tree_shapes(specs, jnp.dtype("bfloat16"))
    assert shapes["layers"][0]["qkv_bias"] == jax.ShapeDtypeStruct((2, 4, 4), jnp.bfloat16)
    assert shapes["embed"].shape == (12, 16)
