"""TPU topologies that programs are compiled for on a host without a TPU, and a shape to compile."""

import pytest
from jax.experimental import topologies

from tlt_jax.config import PolicyConfig

GIB = 2**30

QWEN_7B = PolicyConfig(
    vocab_size=152_064,
    num_layers=28,
    width=3584,
    num_heads=28,
    num_kv_heads=4,
    head_size=128,
    ffn_width=18_944,
    rope_theta=1e6,
    qkv_bias=True,
    qk_norm=False,
    tie_embeddings=False,
    dtype="bfloat16",
    attention_backend="tpu",
)


def devices(topology):
    """The devices of, say, "v5e:4x4"; needs libtpu."""
    with pytest.MonkeyPatch.context() as patch:
        # Without it libtpu asks a cloud metadata server which machine it is on, and waits.
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # tests run in several processes
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def compiled(program, *arguments):
    """A jitted program compiled for the TPU devices that its abstract arguments are placed on."""
    return program.trace(*arguments).lower(lowering_platforms=("tpu",)).compile()
