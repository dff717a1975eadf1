"""Devices of the tests: four host CPU devices of one thread each, unless JAX_PLATFORMS says else.

Conftest files are read before any test module, hence before JAX starts its backend.
"""

import dataclasses
import importlib.util
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax.config import PolicyConfig, RopeScaling
from tlt_jax.sharding import ParamSpec

if "JAX_PLATFORMS" not in os.environ:
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
).strip()

# What one process has compiled the others need not, nor does the next run: most test modules use
# the programs of `toy_engine`.
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla_cache"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_compilation_cache_max_size", 2**31)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

TINY = PolicyConfig(
    vocab_size=11,
    num_layers=2,
    width=16,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    ffn_width=24,
    rope_theta=100.0,
    qk_norm=False,
)
# Each family turns on what the others leave off; every norm epsilon is large enough to show.
FAMILIES = {
    "qwen2": dataclasses.replace(TINY, qkv_bias=True, norm_eps=1e-2),
    "qwen3": dataclasses.replace(TINY, qk_norm=True, tie_embeddings=False, norm_eps=1e-3),
    "llama3": dataclasses.replace(
        TINY,
        tie_embeddings=False,
        rope_scaling=RopeScaling(factor=8.0, low_freq_factor=1.0, original_max_length=64),
    ),
}


@pytest.fixture(scope="session", params=FAMILIES)
def family(request):
    """The tiny `PolicyConfig` of each model family in turn."""
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def tiny_config():
    """One family, for tests where the family does not matter: RoPE, norms and an own head."""
    return FAMILIES["qwen3"]


@pytest.fixture(scope="session")
def random_params():
    """Function (specs, seed, dtype) -> parameters, none of which is a plain zero or one.

    Initial gains are ones and initial biases zeros, which would hide a gain or bias left out.
    """

    def draw(specs, seed, dtype="float32"):
        rng = np.random.default_rng(seed)

        def one(spec):
            centre, scale = (1.0, 0.3) if spec.scale is None else (0.0, max(spec.scale, 0.3))
            return jnp.asarray(centre + scale * rng.standard_normal(spec.shape), dtype)

        return jax.tree.map(one, specs, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))

    return draw


def pytest_collection_modifyitems(items):
    """Tests marked `tpu_compile` need the TPU compiler, but no TPU."""
    if importlib.util.find_spec("libtpu") is None:
        reason = "libtpu, the TPU compiler, is not installed: see requirements-tpu.txt"
        for item in items:
            if item.get_closest_marker("tpu_compile"):
                item.add_marker(pytest.mark.skip(reason=reason))
