"""python -m tlt_jax.train --config=configs/countdown.py --workdir=runs/countdown

A second task of another kind: reach a goal from a few numbers with + - *, by search. It begins
from a warm start that the next command makes (about 20 minutes on two cores):

    python -m tlt_jax.warm_start --config=configs/countdown.py --config.warm_start_dir= \\
        --workdir=runs/countdown_warm_start
"""

from ml_collections import config_dict

from configs import quickstart


def get_config() -> config_dict.ConfigDict:
    """The quickstart's sizes on another task."""
    config = quickstart.get_config()
    config.task.name = "countdown"
    config.task.mix = "easy"
    config.warm_start_dir = "runs/countdown_warm_start"
    return config
