"""A run small enough for a test to train, benchmark and warm-start, and changes of configs."""

import dataclasses

from tlt_jax.config import (
    DrafterConfig,
    LearnerConfig,
    MeshConfig,
    PolicyConfig,
    RolloutConfig,
    RunConfig,
)

# One row and one length bucket: few programs.
CONFIG = RunConfig(
    policy=PolicyConfig(
        num_layers=2, width=32, num_heads=2, num_kv_heads=2, head_size=16, ffn_width=48
    ),
    mesh=MeshConfig(slices=2),
    rollout=RolloutConfig(
        prompts_per_step=2,
        group_size=4,
        max_response_length=40,
        row_buckets=(4,),
        strategies=("tree-2-2-5",),
        length_buckets=(72,),
        chunk_tokens=12,
    ),
    drafter=DrafterConfig(
        ffn_width=32,
        buffer_megabytes=0.041,  # 4 rows
        row_length=72,
        microbatch_tokens=36,
        train_depth=1,
        rounds_per_microbatch=(2,),
    ),
    learner=LearnerConfig(row_length=72),
)


def changed(config, **groups):
    """The config with fields of its groups changed: `rollout={"top_k": 3}`, or `seed=7`."""
    changes = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in groups.items()
    }
    return dataclasses.replace(config, **changes)
