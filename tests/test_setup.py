"""What a run starts from."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import toy_run

from tlt_jax import setup, weights
from tlt_jax.budget import NO_BLOCK, Block
from tlt_jax.choice import Choice
from tlt_jax.types import Strategy, UserError


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
    machinery.close()
    assert state.carry.drafter is None and state.carry.buffer is None


def test_a_log_of_decisions_is_read_by_step(tmp_path):
    path = tmp_path / "decisions.jsonl"
    lines = [
        (0, "plain", 0.0, NO_BLOCK),
        (0, "chain-2", 1.5, Block(4, 3)),
        (1, "ngram-4", 1.25, Block(2, 1)),
    ]
    fields = "step", "strategy", "give_up_below", "block"
    records = [
        dict(zip(fields, [*line[:-1], dataclasses.asdict(line[-1])], strict=True)) for line in lines
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    plain, chain, ngram = (
        Choice(Strategy.parse(name), "replayed", below, block) for _, name, below, block in lines
    )
    assert setup.load_replay(str(path)) == {0: [plain, chain], 1: [ngram]}
    assert setup.load_replay("") is None


def test_what_is_no_log_of_decisions_is_refused(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "reward_mean": 0.5}\n')
    with pytest.raises(UserError, match=r"replay=.*metrics\.jsonl is no log of decisions of this"):
        setup.load_replay(str(path))
    with pytest.raises(UserError, match=r"decisions\.jsonl does not exist"):
        setup.load_replay(str(tmp_path / "decisions.jsonl"))


def test_a_drafter_that_reads_one_hidden_state_is_widened(tmp_path):
    config = toy_run.changed(toy_run.CONFIG, warm_start_dir=str(tmp_path))
    wide = toy_run.changed(config, policy={"feature_layers": (0, 1)})
    path = tmp_path / "drafter.safetensors"
    known = setup.initial_drafter(toy_run.changed(config, warm_start_dir=""))
    weights.save(path, known, dtype="float32")
    found = setup.initial_drafter(wide)
    assert found["read"].shape == (3, 32, 32)
    jax.tree.map(np.testing.assert_array_equal, {k: found[k] for k in known}, known)
    own = found | {"read": found["read"] + 1}
    weights.save(path, own, dtype="float32")  # one that reads as much is taken as it is
    jax.tree.map(np.testing.assert_array_equal, setup.initial_drafter(wide), own)
    path.write_bytes(b"no such thing")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        setup.initial_drafter(wide)
