"""Supervised warm start: makes the policy and the drafter that RL begins from.

    python -m tlt_jax.warm_start --config=configs/quickstart.py --workdir=DIR

Packed demonstrations of the task train the policy by next-token cross-entropy; then the drafter
learns the policy's features on the same rows. Both go on from `config.warm_start_dir`;
`--config.warm_start_dir=` (empty) begins from random parameters. Writes `policy.safetensors`,
`drafter.safetensors` and `warm_start.json` into the workdir.
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from tlt_jax import command_line, policy, setup, sharding, spot_training, weights
from tlt_jax.buffer import Microbatch
from tlt_jax.config import RunConfig
from tlt_jax.tasks import pipeline
from tlt_jax.tasks.task import get_task

PROGRESS_EVERY = 50


def supervised_loss(params: Any, config: RunConfig, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy in nats of the tokens with `loss_mask` 1; batch arrays are [B, T]."""
    hidden, _ = policy.packed_forward(
        params, config.policy, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    logits = policy.logits(params, hidden[:, :-1])
    per_token = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    mask = batch["loss_mask"][:, 1:]
    return jnp.sum(per_token * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def schedule(rate: float, steps: int) -> optax.Schedule:
    """Warm-up over a twentieth of the steps, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)


def policy_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """AdamW with gradient clipping."""
    rate = schedule(config.warm_start.learning_rate, config.warm_start.policy_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95))


def drafter_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """That of spot training, but for its schedule."""
    rate = schedule(config.warm_start.drafter_learning_rate, config.warm_start.drafter_steps)
    return spot_training.optimizer(config.drafter, rate)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=(0, 1))
def policy_step(
    params: Any, opt_state: Any, batch: dict[str, jax.Array], config: RunConfig
) -> tuple[Any, Any, jax.Array]:
    """One supervised update; returns parameters, optimizer state and loss."""
    loss, gradients = jax.value_and_grad(supervised_loss)(params, config, batch)
    updates, opt_state = policy_optimizer(config).update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


@functools.partial(jax.jit, static_argnames="config", donate_argnums=0)
def drafter_step(
    state: spot_training.DrafterState,
    target_params: Any,
    batch: dict[str, jax.Array],
    config: RunConfig,
) -> tuple[spot_training.DrafterState, jax.Array]:
    """One drafter update on the policy's features of a batch; returns state and mean loss."""
    features, _ = policy.packed_forward(
        target_params, config.policy, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    microbatch = Microbatch(
        tokens=batch["tokens"],
        features=features,
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        starts=jnp.zeros(batch["tokens"].shape[:1], jnp.int32),
    )
    whole_rows = dataclasses.replace(config.drafter, microbatch_tokens=batch["tokens"].shape[1])
    total = spot_training.add_microbatch(
        spot_training.zero_sum(state.params),
        state.params,
        target_params,
        config.policy,
        whole_rows,
        microbatch,
    )
    state = spot_training.apply(drafter_optimizer(config), state, total)
    return state, total.loss / total.weight


class Batches:
    """Endless shuffled batches of packed rows, the rows of a batch split over the slices."""

    def __init__(self, rows: dict[str, np.ndarray], config: RunConfig, mesh: jax.sharding.Mesh):
        self._rows = rows
        self._size = config.warm_start.batch_rows
        self._random = np.random.default_rng(config.seed)
        self._sharding = NamedSharding(mesh, PartitionSpec(sharding.SLICE))

    def next(self) -> dict[str, jax.Array]:
        count = len(self._rows["tokens"])
        chosen = self._random.choice(count, size=self._size, replace=count < self._size)
        return {k: jax.device_put(v[chosen], self._sharding) for k, v in self._rows.items()}


def warm_start(config: RunConfig, workdir: pathlib.Path) -> None:
    """Runs both phases, of which either may have 0 steps, and writes the three files."""
    mesh = sharding.make_mesh(config.mesh)
    task = get_task(config.task.name)
    source = pipeline.load_source(task, config.task.mix, "train", config.task.data_dir)
    rows = pipeline.pack_demonstrations(
        source, task, seed=config.seed, row_length=config.warm_start.row_length
    )
    batches = Batches(rows, config, mesh)
    began = time.monotonic()
    params, policy_loss = train_policy(config, mesh, batches, began)
    draft, drafter_loss = train_drafter(config, mesh, batches, params, began)
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
    config: RunConfig, mesh: jax.sharding.Mesh, batches: Batches, began: float
) -> tuple[Any, float | None]:
    """Policy parameters and the last loss, None without steps."""
    params = jax.device_put(setup.initial_policy(config), sharding.replicated(mesh))
    steps = config.warm_start.policy_steps
    if steps == 0:
        return params, None
    opt_state = policy_optimizer(config).init(params)
    for step in range(steps):
        params, opt_state, loss = policy_step(params, opt_state, batches.next(), config)
        _progress("policy", step, steps, loss, began)
    return params, float(loss)


def train_drafter(
    config: RunConfig, mesh: jax.sharding.Mesh, batches: Batches, target: Any, began: float
) -> tuple[Any, float | None]:
    """Drafter parameters and the last loss, None without steps."""
    params = setup.initial_drafter(config)
    steps = config.warm_start.drafter_steps
    if steps == 0:
        return params, None
    state = setup.drafter_state(drafter_optimizer(config), mesh, params)
    for step in range(steps):
        state, loss = drafter_step(state, target, batches.next(), config)
        _progress("drafter", step, steps, loss, began)
    return state.params, float(loss)


def _progress(what: str, step: int, steps: int, loss: jax.Array, began: float) -> None:
    if (step + 1) % PROGRESS_EVERY == 0 or step + 1 == steps:
        seconds = time.monotonic() - began
        print(f"{what} {step + 1}/{steps} | loss {float(loss):.4f} | {seconds:.0f}s", flush=True)


def main(argv: list[str]) -> None:
    config, workdir = command_line.start(argv)
    warm_start(config, workdir)


if __name__ == "__main__":
    command_line.run(main)
