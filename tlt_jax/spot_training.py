"""Drafter training: the gradient of a microbatch, and the update every slice applies alike.

One implementation serves the idle slices inside a chunk, the time between steps, and the warm
start. Sums and not means travel between slices, so that unequal numbers of microbatches give the
same gradient as one slice that took them all.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tlt_jax import objectives, sharding
from tlt_jax.buffer import DrafterBuffer, Microbatch, sample
from tlt_jax.config import DrafterConfig, PolicyConfig


@struct.dataclass
class DrafterState:
    """Trainable state of the drafter; equal on all slices.

    Parameters are float32 whatever the policy's dtype: small updates would round away in bfloat16.
    """

    params: Any
    opt_state: Any
    version: jax.Array  # [] int32, updates applied so far


@struct.dataclass
class GradientSum:
    """Sums over the pairs of the microbatches taken so far."""

    gradients: Any  # like the drafter's parameters
    loss: jax.Array  # [] float32
    weight: jax.Array  # [] float32, pairs


def optimizer(
    config: DrafterConfig, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """AdamW with gradient clipping, at `config.learning_rate` unless a schedule is given."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule or config.learning_rate, weight_decay=config.weight_decay),
    )


def init_state(tx: optax.GradientTransformation, params: Any) -> DrafterState:
    """Version 0 of a drafter that the optimizer `tx` will train."""
    master = sharding.cast(params, jnp.float32)
    return DrafterState(params=master, opt_state=tx.init(master), version=jnp.int32(0))


def zero_sum(params: Any) -> GradientSum:
    return GradientSum(
        gradients=jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
        loss=jnp.float32(0),
        weight=jnp.float32(0),
    )


def add_microbatch(
    total: GradientSum,
    params: Any,
    target_params: Any,
    policy_config: PolicyConfig,
    config: DrafterConfig,
    microbatch: Microbatch,
) -> GradientSum:
    """Adds one microbatch's gradient to a sum."""
    (loss, weight), gradients = jax.value_and_grad(objectives.loss_sum, has_aux=True)(
        params, target_params, policy_config, config, microbatch
    )
    return GradientSum(
        gradients=jax.tree.map(lambda a, b: a + b.astype(a.dtype), total.gradients, gradients),
        loss=total.loss + loss,
        weight=total.weight + weight,
    )


def add_samples(
    total: GradientSum,
    params: Any,
    target_params: Any,
    policy_config: PolicyConfig,
    config: DrafterConfig,
    buffer: DrafterBuffer,
    key: jax.Array,
    *,
    first: jax.Array,
    count: jax.Array,
) -> tuple[GradientSum, jax.Array]:
    """Adds random microbatches of one slice's buffer, `count` ([] int32) of them if it holds any.

    Each is drawn by the key and its number, `first` ([] int32), `first` + 1, ... Returns the sum
    and how many microbatches were added, [] int32.
    """
    count = jnp.where(buffer.filled > 0, count, 0)

    def add(index: jax.Array, total: GradientSum) -> GradientSum:
        rows, tokens = config.microbatch_rows, config.microbatch_tokens
        own = jax.random.fold_in(key, first + index)
        microbatch = sample(buffer, own, rows=rows, tokens=tokens)
        return add_microbatch(total, params, target_params, policy_config, config, microbatch)

    return jax.lax.fori_loop(0, count, add, total), count


def apply(
    tx: optax.GradientTransformation, state: DrafterState, total: GradientSum
) -> DrafterState:
    """One update by `tx` with the mean gradient; nothing happens where the sum has no weight."""

    def update(state: DrafterState) -> DrafterState:
        mean = jax.tree.map(
            lambda g, p: (g / total.weight).astype(p.dtype), total.gradients, state.params
        )
        updates, opt_state = tx.update(mean, state.opt_state, state.params)
        return DrafterState(
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            version=state.version + 1,
        )

    return jax.lax.cond(total.weight > 0, update, lambda s: s, state)
