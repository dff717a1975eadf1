"""Supervised warm start: makes the policy and the drafter that RL begins from.

    python -m tlt_jax.warm_start --config=configs/quickstart.py --workdir=DIR

Packed demonstrations of the task train the policy by next-token cross-entropy; then the drafter
learns the policy's features on the same rows. Both go on from `config.warm_start_dir`;
`--config.warm_start_dir=` (empty) begins from random parameters. Writes `policy.safetensors`,
`drafter.safetensors` and `warm_start.json` into the workdir.
"""

import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tlt_jax import command_line, offline_training, policy, setup, sharding, weights
from tlt_jax.config import RunConfig
from tlt_jax.tasks import pipeline
from tlt_jax.tasks.task import get_task


def supervised_loss(params: Any, config: RunConfig, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy in nats of the tokens with `loss_mask` 1; batch arrays are [B, T]."""
    hidden, _ = policy.packed_forward(
        params, config.policy, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    logits = policy.logits(params, hidden[:, :-1])
    per_token = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    mask = batch["loss_mask"][:, 1:]
    return jnp.sum(per_token * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def policy_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """AdamW with gradient clipping."""
    rate = offline_training.schedule(
        config.warm_start.learning_rate, config.warm_start.policy_steps
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))


@functools.partial(jax.jit, static_argnames="config", donate_argnums=(0, 1))
def policy_step(
    params: Any, opt_state: Any, batch: dict[str, jax.Array], config: RunConfig
) -> tuple[Any, Any, jax.Array]:
    """One supervised update; returns parameters, optimizer state and loss."""
    loss, gradients = jax.value_and_grad(supervised_loss)(params, config, batch)
    updates, opt_state = policy_optimizer(config).update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


def warm_start(config: RunConfig, workdir: pathlib.Path) -> None:
    """Runs both phases, of which either may have 0 steps, and writes the three files."""
    mesh = sharding.make_mesh(config.mesh)
    task = get_task(config.task.name)
    source = pipeline.load_source(task, config.task.mix, "train", config.task.data_dir)
    rows = pipeline.pack_demonstrations(
        source, task, seed=config.seed, row_length=config.warm_start.row_length
    )
    batches = offline_training.Batches(rows, config, mesh)
    began = time.monotonic()
    params, policy_loss = train_policy(config, mesh, batches, began)
    draft, drafter_loss = offline_training.train_drafter(
        config, mesh, batches, params, setup.initial_drafter(config), began
    )
    weights.save(workdir / "policy.safetensors", params)
    weights.save(workdir / "drafter.safetensors", draft)
    report = {
        "task": config.task.name,
        "mix": config.task.mix,
        "began_from": config.warm_start_dir or "random parameters",
        "policy_steps": config.warm_start.policy_steps,
        "policy_loss": policy_loss,
        "drafter_steps": config.warm_start.drafter_steps,
        "drafter_loss": drafter_loss,
        "seconds": round(time.monotonic() - began, 1),
    }
    (workdir / "warm_start.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"wrote {workdir}/policy.safetensors and drafter.safetensors", flush=True)


def train_policy(
    config: RunConfig, mesh: jax.sharding.Mesh, batches: offline_training.Batches, began: float
) -> tuple[Any, float | None]:
    """Policy parameters and the last loss, None without steps."""
    params = jax.device_put(setup.initial_policy(config), sharding.replicated(mesh))
    steps = config.warm_start.policy_steps
    if steps == 0:
        return params, None
    opt_state = policy_optimizer(config).init(params)
    for step in range(steps):
        params, opt_state, loss = policy_step(params, opt_state, batches.next(), config)
        offline_training.progress("policy", step, steps, loss, began)
    return params, float(loss)


def main(argv: list[str]) -> None:
    config, workdir = command_line.start(argv)
    warm_start(config, workdir)


if __name__ == "__main__":
    command_line.run(main)
