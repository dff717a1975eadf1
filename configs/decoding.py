"""python -m tlt_jax.benchmark --config=configs/decoding.py --workdir=runs/decoding

How fast plain decoding is, by live rows: a policy of 4 layers, 256 wide (3.2M parameters, random
weights: responses of a hundred tokens on average, some of four hundred), in slots that are
refilled. Two slices of 32, 8, 2 and 1 rows; a chain beside it shows that speculation does not pay
in so shallow a policy on CPU.
Five minutes on two CPU cores.
"""

from ml_collections import config_dict

from configs import quickstart


def get_config() -> config_dict.ConfigDict:
    """The benchmark's grid on a shallow, wide policy."""
    config = quickstart.get_config()
    config.warm_start_dir = ""
    config.policy.update(num_layers=4, width=256, num_heads=4, num_kv_heads=4, head_size=64)
    config.policy.ffn_width = 704
    config.benchmark.parts = ("grid",)
    config.benchmark.grid_rows = (32, 8, 2, 1)
    config.benchmark.grid_strategies = ("chain-2",)
    return config
