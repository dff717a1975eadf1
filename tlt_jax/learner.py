"""The policy update: GRPO on packed rows, one sharded, donated, jitted function.

Parameters and optimizer state are sharded over both mesh axes. An update gathers the parameters
over the slices once, loops over the microbatches that the step has (a number, so the program is
the same for few and many), and scatters gradients back to their shards.

Axes: M microbatches, R rows, W row length, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tlt_jax import losses, policy, sampling, sharding
from tlt_jax.config import LearnerConfig, PolicyConfig
from tlt_jax.packing import PackedBatch
from tlt_jax.types import SamplingParams


@struct.dataclass
class LearnerState:
    """Policy and optimizer, in training layout.

    Parameters are float32 whatever the policy's dtype: small updates would round away in bfloat16.
    """

    params: Any
    opt_state: Any
    step: jax.Array  # [] int32, RL steps taken


class UpdateMetrics(NamedTuple):
    """Weighted means over the batch's response tokens, each [] float32."""

    loss: jax.Array
    kl: jax.Array  # to the reference, nats
    clip_share: jax.Array
    logprob_gap_mean: jax.Array  # |recomputed - behaviour|, nats
    logprob_gap_max: jax.Array
    grad_norm: jax.Array  # before clipping


def schedule(config: LearnerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then constant, linear or cosine decay to zero; counted in updates."""
    warmup = config.warmup_steps * config.updates_per_step
    rest = max(num_steps * config.updates_per_step - warmup, 1)
    after = {
        "constant": optax.constant_schedule(config.learning_rate),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(config.learning_rate, rest),
    }[config.decay]
    rise = optax.linear_schedule(
        config.learning_rate / max(warmup, 1), config.learning_rate, warmup
    )
    return optax.join_schedules([rise, after], [warmup])


def optimizer(config: LearnerConfig, num_steps: int) -> optax.GradientTransformation:
    """AdamW with gradient clipping and the configured schedule."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule(config, num_steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
        ),
    )


def state_shardings(mesh: Mesh, config: PolicyConfig, tx: optax.GradientTransformation) -> Any:
    """Training shardings of a `LearnerState`: moments lie where their parameters lie."""
    specs = policy.param_specs(config)
    params = sharding.tree_shardings(specs, mesh, sharding.TRAIN_RULES)
    shapes = sharding.tree_shapes(specs, jnp.dtype(jnp.float32))
    opt_state = optax.tree_map_params(
        tx,
        lambda _, held: held,
        jax.eval_shape(tx.init, shapes),
        params,
        transform_non_params=lambda _: sharding.replicated(mesh),
    )
    held: dict[str, Any] = {"params": params, "opt_state": opt_state}
    return LearnerState(**held | {"step": sharding.replicated(mesh)})


def init_state(
    mesh: Mesh, config: PolicyConfig, tx: optax.GradientTransformation, params: Any
) -> LearnerState:
    """Learner state at step 0 from policy parameters of any layout."""

    def make(params: Any) -> LearnerState:
        master = sharding.cast(params, jnp.float32)
        return LearnerState(params=master, opt_state=tx.init(master), step=jnp.int32(0))

    return jax.jit(make, out_shardings=state_shardings(mesh, config, tx))(params)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a microbatch over the slices."""
    return NamedSharding(mesh, P(None, sharding.SLICE, None))


def token_log_probs(
    params: Any, config: PolicyConfig, sampler: SamplingParams, batch: PackedBatch
) -> jax.Array:
    """Log-probability [R, W] float32 of each token given those before it in its segment.

    The distribution is the one rollouts sample from: temperature and filters included. A token
    that was sampled had passed the filters, so rounding is not allowed to filter it here. Entry 0
    of each segment has no meaning and weight 0.
    """
    hidden, _ = policy.packed_forward(
        params, config, batch.tokens, batch.positions, batch.segment_ids
    )
    logits = policy.logits(params, hidden[:, :-1])
    targets = batch.tokens[:, 1:]
    chosen = jax.nn.one_hot(targets, config.vocab_size, dtype=bool)
    processed = jnp.where(chosen, logits, sampling.process_logits(logits, sampler))
    return jnp.pad(sampling.log_probs(processed, targets, sampler), [(0, 0), (1, 0)])


def microbatch_loss(
    params: Any,
    reference: Any,
    old: jax.Array | None,
    config: PolicyConfig,
    learner: LearnerConfig,
    sampler: SamplingParams,
    batch: PackedBatch,
) -> tuple[jax.Array, UpdateMetrics]:
    """Weighted loss of one microbatch and its share of the metrics.

    `old` [R, W] are log-probabilities before the step's first update; None says that this is the
    first one, where they equal the current ones and the ratio is one.
    """
    log_probs = token_log_probs(params, config, sampler, batch)
    frozen = jax.lax.stop_gradient(log_probs)
    old = frozen if old is None else old
    compared = frozen
    if learner.kl_coef > 0:
        compared = jax.lax.stop_gradient(token_log_probs(reference, config, sampler, batch))
    terms = losses.grpo(
        log_probs,
        old,
        batch.advantages,
        compared,
        clip_low=learner.clip_low,
        clip_high=learner.clip_high,
        kl_coef=learner.kl_coef,
    )
    loss = terms.loss
    if learner.importance_cap > 0:
        loss = loss * losses.truncated_importance(old, batch.behaviour, learner.importance_cap)
    gap = jnp.where(batch.weights > 0, jnp.abs(old - batch.behaviour), 0.0)

    def mean(x: jax.Array) -> jax.Array:
        return jnp.sum(x * batch.weights)

    total = mean(loss)
    return total, UpdateMetrics(
        loss=total,
        kl=mean(terms.kl),
        clip_share=mean(terms.clipped),
        logprob_gap_mean=mean(gap),
        logprob_gap_max=jnp.max(gap),
        grad_norm=jnp.float32(0),
    )


def _gradient_sums(
    params: Any,
    reference: Any,
    old: jax.Array | None,
    config: PolicyConfig,
    learner: LearnerConfig,
    sampler: SamplingParams,
    batch: PackedBatch,
    count: jax.Array,
    shardings: Any,
) -> tuple[Any, UpdateMetrics]:
    """Float32 gradients and metrics summed over the first `count` microbatches.

    `params` lie whole on every slice; the sums lie in `shardings`, those of the training layout.
    """

    def body(index: jax.Array, carry: Any) -> Any:
        gradients, sums = carry
        before = None if old is None else old[index]
        (_, metrics), new = jax.value_and_grad(microbatch_loss, has_aux=True)(
            params, reference, before, config, learner, sampler, _microbatch(batch, index)
        )
        new = jax.lax.with_sharding_constraint(new, shardings)
        added = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), gradients, new)
        peak = jnp.maximum(sums.logprob_gap_max, metrics.logprob_gap_max)
        summed = jax.tree.map(jnp.add, sums, metrics)._replace(logprob_gap_max=peak)
        return added, summed

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    start = (
        jax.lax.with_sharding_constraint(zeros, shardings),
        UpdateMetrics(*[jnp.float32(0)] * len(UpdateMetrics._fields)),
    )
    gradients, metrics = jax.lax.fori_loop(0, count, body, start)
    return gradients, metrics._replace(grad_norm=optax.global_norm(gradients))


def _microbatch(batch: PackedBatch, index: jax.Array) -> PackedBatch:
    return jax.tree.map(lambda x: x[index], batch)


def _score(
    params: Any, config: PolicyConfig, sampler: SamplingParams, batch: PackedBatch, count: jax.Array
) -> jax.Array:
    """`token_log_probs` of the first `count` microbatches, [M, R, W] float32."""

    def body(index: jax.Array, scores: jax.Array) -> jax.Array:
        scored = token_log_probs(params, config, sampler, _microbatch(batch, index))
        return scores.at[index].set(scored)

    return jax.lax.fori_loop(0, count, body, jnp.zeros_like(batch.behaviour))


def update_program(
    mesh: Mesh, config: PolicyConfig, learner: LearnerConfig, tx: optax.GradientTransformation
) -> Any:
    """Program `(state, reference, sampling params, batch [M, R, W], count []) -> (state,
    UpdateMetrics)`; the state is donated. Only the first `count` microbatches are run.
    """
    whole = sharding.tree_shardings(policy.param_specs(config), mesh, sharding.ROLLOUT_RULES)
    held = state_shardings(mesh, config, tx)

    def gather(state: LearnerState) -> Any:
        return jax.lax.with_sharding_constraint(sharding.cast(state.params, config.dtype), whole)

    def update(state, reference, sampler, batch, count):
        old = None
        if learner.updates_per_step > 1:
            old = _score(gather(state), config, sampler, batch, count)
        for _ in range(learner.updates_per_step):
            gradients, metrics = _gradient_sums(
                gather(state), reference, old, config, learner, sampler, batch, count, held.params
            )
            updates, opt_state = tx.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            state = dataclasses.replace(state, params=params, opt_state=opt_state)
        return dataclasses.replace(state, step=state.step + 1), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(held, sharding.replicated(mesh)))
