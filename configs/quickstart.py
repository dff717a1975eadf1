"""python -m tlt_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

Four to seven minutes on two CPU cores, installation included; the mean reward goes from 0.5 to 0.8.
A 3M-parameter policy (16 layers, 128 wide) learns to search for pairs of numbers. Variants: ""
(the run above) and "tiny" (random weights, a few steps, for a first look).

The weights it begins from were made in three quarters of an hour on two cores by

    python -m tlt_jax.warm_start --config=configs/quickstart.py --config.warm_start_dir= \\
        --config.warm_start.drafter_learning_rate=1e-3 --config.drafter.train_depth=3 \\
        --config.task.mix=mixed --workdir=configs/warm_start/pairs
    python -m tlt_jax.warm_start --config=configs/quickstart.py \\
        --config.warm_start.policy_steps=160 --config.warm_start.learning_rate=1e-3 \\
        --config.warm_start.drafter_steps=400 --config.warm_start.drafter_learning_rate=1e-3 \\
        --config.drafter.train_depth=3 --config.task.mix=mixed --workdir=configs/warm_start/pairs
"""

import dataclasses

from ml_collections import config_dict

from tlt_jax.config import RunConfig

WARM_START = "configs/warm_start/pairs"


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """The run's `ConfigDict`; raises ValueError for an unknown variant."""
    config = config_dict.ConfigDict(dataclasses.asdict(RunConfig()))
    config.warm_start_dir = WARM_START
    config.task.mix = "easy"
    config.num_steps = 40
    config.learner.learning_rate = 1e-4
    config.learner.decay = "cosine"
    if variant == "tiny":
        _shrink(config)
    elif variant:
        raise ValueError(f"configs/quickstart.py has no variant '{variant}'; it has 'tiny'.")
    return config


def _shrink(config: config_dict.ConfigDict) -> None:
    config.warm_start_dir = ""
    config.num_steps = 4
    config.policy.update(num_layers=2, width=32, num_heads=2, head_size=16, ffn_width=64)
    config.rollout.update(prompts_per_step=2, group_size=4, max_response_length=60)
    config.rollout.update(row_buckets=(4, 1), depths=(2, 4), length_buckets=(64, 96))
    config.drafter.update(ffn_width=32, row_length=96, buffer_rows=4)
    config.learner.row_length = 96
    config.checkpoint.every = 2
