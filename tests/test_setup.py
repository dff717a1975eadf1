"""What a run starts from."""

import toy_run

from tlt_jax import setup, weights


def test_plain_decoding_needs_no_drafter(tmp_path):
    config = toy_run.changed(
        toy_run.CONFIG,
        policy={"num_layers": 1},
        task={"data_dir": str(tmp_path / "data")},
        rollout={"speculate": False},
        warm_start_dir=str(tmp_path),
    )
    random = setup.initial_policy(toy_run.changed(config, warm_start_dir=""))
    weights.save(tmp_path / "policy.safetensors", random)  # and no drafter.safetensors
    machinery, state = setup.start(config)
    machinery.reward_threads.shutdown()
    assert state.drafter is None and state.buffer is None
