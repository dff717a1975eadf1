"""python -m tlt_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Five minutes on two CPU cores with AVX-512, thirteen to fourteen on older ones, installation
included; the mean reward goes from 0.4 to 0.7.
A policy of 48 layers, 64 wide (2.4M parameters), learns to search for pairs of numbers. Deep and
narrow on purpose: only there do two CPU cores gain what an accelerator gains from verifying several
tokens at once. Variants: "" (the run above), "tiny" (random weights, a few steps, for a first look)
and "gpu" (one device).

The weights it begins from were made in a good hour on two cores by

    python -m tlt_jax.warm_start --config=configs/quickstart.py --config.warm_start_dir= \\
        --config.warm_start.policy_steps=700 --config.warm_start.drafter_steps=500 \\
        --config.warm_start.drafter_learning_rate=1e-3 \\
        --config.task.mix=mixed --workdir=configs/warm_start/pairs
    python -m tlt_jax.warm_start --config=configs/quickstart.py \\
        --config.warm_start.policy_steps=0 --config.warm_start.drafter_steps=600 \\
        --config.warm_start.drafter_learning_rate=5e-4 \\
        --config.task.mix=mixed --workdir=configs/warm_start/pairs
    python -m tlt_jax.warm_start --config=configs/quickstart.py \\
        --config.warm_start.policy_steps=120 --config.warm_start.learning_rate=7e-4 \\
        --config.warm_start.drafter_steps=200 --config.warm_start.drafter_learning_rate=5e-4 \\
        --config.task.mix=mixed --workdir=configs/warm_start/pairs
    python -m tlt_jax.warm_start --config=configs/quickstart.py \\
        --config.warm_start.policy_steps=0 --config.warm_start.drafter_steps=1500 \\
        --config.warm_start.drafter_learning_rate=1e-3 --workdir=configs/warm_start/pairs

of which the first two ran on version 3.0.0 of the task, whose author never forgets the answer, and
the first three trained the drafter at depth 1 and a constant rate.
"""

import dataclasses

from ml_collections import config_dict

from tlt_jax.config import RunConfig

WARM_START = "configs/warm_start/pairs"


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The run's `ConfigDict`; raises ValueError for an unknown variant."""
    config = config_dict.ConfigDict(dataclasses.asdict(RunConfig()))
    config.warm_start_dir = WARM_START
    config.policy.update(num_layers=48, width=64, num_heads=2, num_kv_heads=1, ffn_width=192)
    config.drafter.update(ffn_width=512, objective="hass", train_depth=3, learning_rate=1e-4)
    config.drafter.buffer_megabytes = 2.2  # 16 rows
    config.task.mix = "easy"
    config.rollout.length_buckets = (144, 256, 512)
    config.rollout.chunk_tokens = 120
    config.num_steps = 50
    config.learner.learning_rate = 1e-4
    config.learner.decay = "cosine"
    if variant == "tiny":
        _shrink(config)
    elif variant == "gpu":
        _put_on_one_device(config)
    elif variant:
        raise ValueError(
            f"configs/quickstart.py has no variant '{variant}'; it has 'tiny' and 'gpu'."
        )
    return config


def _shrink(config: config_dict.ConfigDict) -> None:
    config.warm_start_dir = ""
    config.num_steps = 4
    config.policy.update(num_layers=2, width=32, num_heads=2, head_size=16, ffn_width=64)
    config.rollout.update(prompts_per_step=2, group_size=4, max_response_length=60)
    config.rollout.update(row_buckets=(4, 1), strategies=("chain-2", "chain-4"))
    config.rollout.update(length_buckets=(64, 96), chunk_tokens=48)
    config.drafter.update(ffn_width=32, row_length=96, buffer_megabytes=0.06)
    config.drafter.update(microbatch_tokens=48, rounds_per_microbatch=(4, 8))
    config.learner.row_length = 96
    config.checkpoint.every = 2


def _put_on_one_device(config: config_dict.ConfigDict) -> None:
    config.mesh.slices = 1
    config.rollout.row_buckets = (32, 8, 2)
    config.rollout.strategies = ("chain-8",) * 3
    config.drafter.rounds_per_microbatch = (4, 6, 8)
    config.benchmark.other_slices = ()
