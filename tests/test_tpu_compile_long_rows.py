"""Compiles drafter training on a row of 32,768 tokens of a 7B policy for one TPU chip."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tpu_topologies
from jax.sharding import SingleDeviceSharding
from tpu_topologies import GIB, QWEN_7B

from tlt_jax import drafter, policy, sharding, spot_training
from tlt_jax.buffer import Microbatch
from tlt_jax.config import DrafterConfig

pytestmark = [pytest.mark.slow, pytest.mark.tpu_compile]

ROW = 32_768
CHIP_GIB = 16  # of a v5e chip, the smallest there is
CONFIG = DrafterConfig(ffn_width=QWEN_7B.ffn_width, row_length=ROW)
NUMBERS = jax.ShapeDtypeStruct((1, ROW), jnp.int32)


def _compiled(function, *arguments, donated=()):
    """A function compiled for abstract arguments on a single chip."""
    chip = SingleDeviceSharding(tpu_topologies.devices("v5e:2x2")[0])
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments
    )
    return tpu_topologies.compiled(jax.jit(function, donate_argnums=donated), *placed)


def _assert_fits(compiled):
    memory = compiled.memory_analysis()
    held, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    given = memory.output_size_in_bytes - memory.alias_size_in_bytes
    parts = ", ".join(f"{x / GIB:.2f} GiB" for x in (held, temporary, given))
    print(f"arguments, temporaries and results that are no arguments: {parts}")
    assert held + temporary + given < CHIP_GIB * GIB


@pytest.mark.parametrize(
    ("tokens", "objective", "depth"),
    [(512, "hass", 3), (ROW, "eagle", 1)],
)
def test_a_drafter_of_a_7b_policy_trains_on_a_long_row_on_one_chip(tokens, objective, depth):
    """The gradient of `tokens` tokens that see the whole row, added to a sum."""
    config = dataclasses.replace(
        CONFIG, objective=objective, microbatch_tokens=tokens, train_depth=depth
    )
    target = sharding.tree_shapes(policy.param_specs(QWEN_7B), jnp.bfloat16)
    target = {name: target[name] for name in ("embed", "head")}  # features are stored
    params = sharding.tree_shapes(drafter.param_specs(QWEN_7B, config), jnp.float32)
    total = jax.eval_shape(spot_training.zero_sum, params)
    microbatch = Microbatch(
        tokens=NUMBERS,
        features=jax.ShapeDtypeStruct((1, ROW, QWEN_7B.feature_width), jnp.bfloat16),
        segment_ids=NUMBERS,
        positions=NUMBERS,
        starts=jax.ShapeDtypeStruct((1,), jnp.int32),
    )

    def add(total, params, target, microbatch):
        return spot_training.add_microbatch(total, params, target, QWEN_7B, config, microbatch)

    _assert_fits(_compiled(add, total, params, target, microbatch, donated=0))


def test_features_of_a_long_row_are_made_on_one_chip():
    """As for a buffer without features; memory besides parameters does not grow with layers."""
    target = sharding.tree_shapes(policy.param_specs(QWEN_7B), jnp.bfloat16)

    def forward(target, tokens, positions, segment_ids):
        return policy.packed_forward(target, QWEN_7B, tokens, positions, segment_ids)[1]

    _assert_fits(_compiled(forward, target, NUMBERS, NUMBERS, NUMBERS))
