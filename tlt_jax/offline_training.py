"""Drafter training on rows that are there already: for the warm start and `pretrain_drafter`.

The gradient and the update are those of spot training (`spot_training`), on whole batches.
"""

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from tlt_jax import objectives, packing, policy, sampling, setup, sharding, spot_training
from tlt_jax.buffer import Microbatch
from tlt_jax.config import PolicyConfig, RunConfig
from tlt_jax.rollout import Response
from tlt_jax.types import INVALID

PROGRESS_EVERY = 50


def schedule(rate: float, steps: int) -> optax.Schedule:
    """Warm-up over a twentieth of the steps, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)


def drafter_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """That of spot training, but for its schedule."""
    rate = schedule(config.warm_start.drafter_learning_rate, config.warm_start.drafter_steps)
    return spot_training.optimizer(config.drafter, rate)


def packed(config: RunConfig, responses: Sequence[Response]) -> dict[str, np.ndarray]:
    """Tokens, positions and segment ids of packed rows, [R, W] each.

    The segment id of a token says which response it belongs to.
    """
    batch = packing.pack(
        [r.tokens for r in responses],
        [r.prompt_length for r in responses],
        [r.log_probs for r in responses],
        [0.0] * len(responses),
        aggregation="token",
        row_length=config.warm_start.row_length,
        rows=1,
    )
    names = "tokens", "positions", "segment_ids"
    return {name: getattr(batch, name)[:, 0] for name in names}


class Batches:
    """Endless shuffled batches of packed rows, the rows of a batch split over the slices."""

    def __init__(self, rows: Mapping[str, np.ndarray], config: RunConfig, mesh: jax.sharding.Mesh):
        self._rows = rows
        self._size = config.warm_start.batch_rows
        self._random = np.random.default_rng(config.seed)
        self._sharding = NamedSharding(mesh, PartitionSpec(sharding.SLICE))

    def next(self) -> dict[str, jax.Array]:
        count = len(self._rows["tokens"])
        chosen = self._random.choice(count, size=self._size, replace=count < self._size)
        return {k: jax.device_put(v[chosen], self._sharding) for k, v in self._rows.items()}


def in_order(
    rows: Mapping[str, np.ndarray], config: RunConfig, mesh: jax.sharding.Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Each row once, in batches as of `Batches`; the last one is filled up with rows of nothing."""
    size, held = config.warm_start.batch_rows, NamedSharding(mesh, PartitionSpec(sharding.SLICE))
    for first in range(0, len(rows["tokens"]), size):
        batch = {k: v[first : first + size] for k, v in rows.items()}
        missing = [(0, size - len(batch["tokens"])), (0, 0)]
        batch = {
            k: np.pad(v, missing, constant_values=INVALID if k == "segment_ids" else 0)
            for k, v in batch.items()
        }
        yield jax.device_put(batch, held)


def microbatch_of(
    target_params: Any, config: PolicyConfig, batch: Mapping[str, jax.Array]
) -> Microbatch:
    """Whole rows, [B, T] each, with the policy's features."""
    _, features = policy.packed_forward(
        target_params, config, batch["tokens"], batch["positions"], batch["segment_ids"]
    )
    return Microbatch(
        tokens=batch["tokens"],
        features=features,
        segment_ids=batch["segment_ids"],
        positions=batch["positions"],
        starts=jnp.zeros(batch["tokens"].shape[:1], jnp.int32),
    )


@functools.partial(jax.jit, static_argnames="config", donate_argnums=0)
def drafter_step(
    state: spot_training.DrafterState,
    target_params: Any,
    batch: dict[str, jax.Array],
    config: RunConfig,
) -> tuple[spot_training.DrafterState, jax.Array]:
    """One drafter update on the policy's features of a batch; returns state and mean loss."""
    microbatch = microbatch_of(target_params, config.policy, batch)
    total = spot_training.add_microbatch(
        spot_training.zero_sum(state.params),
        state.params,
        target_params,
        config.policy,
        config.drafter.on_whole_rows(microbatch.tokens.shape[1]),
        microbatch,
    )
    state = spot_training.apply(drafter_optimizer(config), state, total)
    return state, total.loss / total.weight


@functools.partial(jax.jit, static_argnames=("config", "depth"))
def acceptance_sums(
    params: Any,
    target_params: Any,
    batch: dict[str, jax.Array],
    config: RunConfig,
    *,
    depth: int,
) -> tuple[jax.Array, jax.Array]:
    """`objectives.acceptance_sums` of a batch."""
    microbatch = microbatch_of(target_params, config.policy, batch)
    return objectives.acceptance_sums(
        params,
        target_params,
        config.policy,
        config.drafter.on_whole_rows(microbatch.tokens.shape[1]),
        sampling.params_of(config.rollout),
        microbatch,
        depth=depth,
    )


def train_drafter(
    config: RunConfig,
    mesh: jax.sharding.Mesh,
    batches: Batches,
    target: Any,
    params: Any,
    began: float,
) -> tuple[Any, float | None]:
    """Drafter parameters and the last loss, None without steps; `began` is a monotonic time."""
    steps = config.warm_start.drafter_steps
    if steps == 0:
        return params, None
    state = setup.drafter_state(drafter_optimizer(config), mesh, params)
    for step in range(steps):
        state, loss = drafter_step(state, target, batches.next(), config)
        progress("drafter", step, steps, loss, began)
    return state.params, float(loss)


def progress(what: str, step: int, steps: int, loss: jax.Array, began: float) -> None:
    """Prints a line now and then."""
    if (step + 1) % PROGRESS_EVERY == 0 or step + 1 == steps:
        seconds = time.monotonic() - began
        print(f"{what} {step + 1}/{steps} | loss {float(loss):.4f} | {seconds:.0f}s", flush=True)
