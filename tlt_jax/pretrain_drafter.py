"""Makes a drafter for a policy: offline, from the policy's own responses to prompts of the task.

    python -m tlt_jax.pretrain_drafter --config=configs/quickstart.py --workdir=DIR

The policy of `config.warm_start_dir` answers prompts by plain decoding, sampled as in RL, until
there are `config.warm_start.responses` of them; then a drafter learns on these, with the objective,
the gradient and the update of spot training. It begins from the one in `config.warm_start_dir`, or
from random parameters where there is none. Every eighth row is held out, to say how likely drafts
are to be accepted. Writes `policy.safetensors` (unchanged), `drafter.safetensors` and
`pretrain_drafter.json` into the workdir, so that `--config.warm_start_dir=DIR` trains from it.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tlt_jax import (
    command_line,
    offline_training,
    rl_step,
    rollout,
    setup,
    sharding,
    weights,
)
from tlt_jax.config import RunConfig
from tlt_jax.drafting import Models
from tlt_jax.offline_training import Batches
from tlt_jax.programs import RolloutPrograms
from tlt_jax.rollout import Carry, Response
from tlt_jax.types import UserError

FIRST_PROMPT = 2_000_000  # neither training nor the benchmark comes so far
HELD_OUT = 8  # one row in so many
DEPTH = 4  # of the drafts that are judged


def pretrain(config: RunConfig, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains a drafter and writes the three files; returns what the last one holds."""
    began = time.monotonic()
    mesh = sharding.make_mesh(config.mesh)
    target = rl_step.rollout_layout(mesh, config)(setup.initial_policy(config))
    rows = offline_training.packed(config, sample(config, mesh, target))
    seconds = time.monotonic() - began
    print(f"{config.warm_start.responses} responses sampled | {seconds:.0f}s", flush=True)
    if len(rows["tokens"]) == 1:
        raise UserError(
            f"config.warm_start.responses is {config.warm_start.responses}; so few fill a single "
            "row, and one is held out: ask for more."
        )
    held_out = np.arange(len(rows["tokens"])) % HELD_OUT == 0
    test, train = ({k: v[chosen] for k, v in rows.items()} for chosen in (held_out, ~held_out))
    draft = setup.initial_drafter(config)
    before = acceptance(config, mesh, test, Models(target, draft))
    draft, loss = offline_training.train_drafter(
        config, mesh, Batches(train, config, mesh), target, draft, began
    )
    report = {
        "policy": config.warm_start_dir or "random parameters",
        "objective": config.drafter.objective,
        "responses": config.warm_start.responses,
        "tokens": int(np.sum(rows["segment_ids"] >= 0)),
        "steps": config.warm_start.drafter_steps,
        "loss": loss,
        "acceptance_before": before,
        "acceptance": acceptance(config, mesh, test, Models(target, draft)),
        "seconds": round(time.monotonic() - began, 1),
    }
    weights.save(workdir / "policy.safetensors", target)
    weights.save(workdir / "drafter.safetensors", draft)
    (workdir / "pretrain_drafter.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def sample(config: RunConfig, mesh: jax.sharding.Mesh, target: Any) -> list[Response]:
    """The policy's responses, a step's prompts at a time."""
    task, prompts = setup.load_task(config)
    shape = dataclasses.replace(config.rollout, speculate=False)
    programs = RolloutPrograms(
        mesh=mesh,
        policy=config.policy,
        rollout=shape,
        drafter=config.drafter,
        drafting=False,
        training=False,
    )
    carry, responses = Carry(None, None, None), list[Response]()
    while len(responses) < config.warm_start.responses:
        first = FIRST_PROMPT + len(responses)
        drawn = [prompts[first + i]["prompt_ids"] for i in range(shape.prompts_per_step)]
        result = rollout.run(
            programs,
            target,
            carry,
            [prompt for prompt in drawn for _ in range(shape.group_size)],
            jax.random.fold_in(jax.random.key(config.seed), first),
            stop_tokens=(task.tokenizer.eos_id,),
        )
        carry = result.carry
        responses += result.responses
    return responses[: config.warm_start.responses]


def acceptance(
    config: RunConfig, mesh: jax.sharding.Mesh, rows: Mapping[str, np.ndarray], models: Models
) -> list[float]:
    """Mean probability that a draft is accepted, by draft depth."""
    sums = [
        sharding.to_host(
            offline_training.acceptance_sums(
                models.draft, models.target, batch, config, depth=DEPTH
            )
        )
        for batch in offline_training.in_order(rows, config, mesh)
    ]
    accepted, counted = (np.sum(each, axis=0) for each in zip(*sums, strict=True))
    return [round(float(share), 4) for share in accepted / np.maximum(counted, 1)]


def main(argv: list[str]) -> None:
    config, workdir = command_line.start(argv)
    report = pretrain(config, workdir)
    for name in ("acceptance_before", "acceptance"):
        print(f"{name.replace('_', ' ')}, by draft depth: {report[name]}")
    print(f"wrote {workdir}/policy.safetensors and drafter.safetensors", flush=True)


if __name__ == "__main__":
    command_line.run(main)
