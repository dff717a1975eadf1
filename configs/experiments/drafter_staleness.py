"""python -m tlt_jax.ablate drafter_staleness --workdir=runs/drafter_staleness

When does training the drafter during RL pay? The quickstart's policy at three learning rates and
three seeds; see `tlt_jax/staleness.py`. Nine RL runs of about five minutes each on two CPU cores
with AVX-512. At the highest rate a trained drafter ends with an accept length a quarter above that
of a frozen one, at the quickstart's rate with 1 to 2 % more: docs/drafter.md.
"""

from ml_collections import config_dict

from configs import quickstart


def get_config() -> config_dict.ConfigDict:
    """The quickstart with deeper drafts, and drafters of every objective."""
    config = quickstart.get_config()
    config.num_steps = 36
    config.learner.decay = "constant"
    config.policy.feature_layers = (2, 24)  # of which "eagle3" alone reads all
    config.drafter.update(microbatch_tokens=512, learning_rate=1e-4, buffer_megabytes=6.6)
    config.staleness.learning_rates = (1e-4, 3e-4, 5e-4)
    config.staleness.seeds = (0, 1, 2)
    config.staleness.drafters = (
        "frozen", "hass-512", "eagle-4096", "hass-4096", "eagle3-4096",
    )  # fmt: skip
    return config
