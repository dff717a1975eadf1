"""One RL step.

prompts -> rollout (idle slices train the drafter; rewards on host threads while it runs)
        -> advantages -> policy update -> weights to the rollout layout
"""

import concurrent.futures
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tlt_jax import (
    advantages,
    canary,
    learner,
    metrics,
    packing,
    policy,
    rollout,
    sampling,
    sharding,
)
from tlt_jax.choice import Choice
from tlt_jax.config import RunConfig
from tlt_jax.learner import LearnerState
from tlt_jax.program_pool import Recipe
from tlt_jax.programs import RolloutPrograms
from tlt_jax.rollout import Carry, ChunkRecord, Response, RolloutResult
from tlt_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class RunState:
    """Everything that the next step depends on."""

    steps_done: int
    learner: LearnerState
    reference: Any  # policy parameters, rollout layout
    rollout_params: Any  # the policy's current parameters, rollout layout
    carry: Carry

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint holds besides plain numbers; rollout parameters are derived."""
        return {
            "learner": self.learner,
            "reference": self.reference,
            "drafter": self.carry.drafter,
            "buffer": self.carry.buffer,
            "library": self.carry.library,
            "good": self.carry.good,
        }

    def with_arrays(self, *, learner: LearnerState, reference: Any, **carried: Any) -> "RunState":
        """The state with other arrays, named as in `arrays`."""
        carry = dataclasses.replace(self.carry, **carried)
        return dataclasses.replace(self, learner=learner, reference=reference, carry=carry)


@dataclasses.dataclass(frozen=True)
class Machinery:
    """What steps need and do not change."""

    config: RunConfig
    task: Task
    prompts: Any  # grain dataset with random access
    programs: RolloutPrograms
    replay: Mapping[int, Sequence[Choice]] | None  # for the chunks of each step
    reward_threads: concurrent.futures.Executor

    def close(self) -> None:
        """Ends its threads; programs that nobody has begun to compile are left."""
        self.programs.pool.cancel()
        self.reward_threads.shutdown()

    @property
    def stop_tokens(self) -> tuple[int, ...]:
        return (self.task.tokenizer.eos_id,)

    @property
    def tx(self) -> optax.GradientTransformation:
        return learner.optimizer(self.config.learner, self.config.num_steps)

    def step_key(self, step: int) -> jax.Array:
        """Key of a step's rollout; noise further depends on sequence and position."""
        return jax.random.fold_in(jax.random.key(self.config.seed), step)

    def step_prompts(self, step: int) -> list[dict[str, Any]]:
        """A step's prompts, a function of seed and step alone."""
        count = self.config.rollout.prompts_per_step
        return [self.prompts[step * count + i] for i in range(count)]


@dataclasses.dataclass(frozen=True)
class StepOutcome:
    """A step's new state and what it has to tell."""

    state: RunState
    row: dict[str, Any]  # of metrics.jsonl
    chunks: list[ChunkRecord]
    responses: list[Response]  # by sequence


def rl_step(machinery: Machinery, state: RunState) -> StepOutcome:
    """Takes one step; the learner's, drafter's and buffer's old arrays are donated."""
    pool = machinery.programs.pool
    surprises, waited, began = pool.surprises, pool.waited, pool.clock()
    result, rewards, rollout_ended = roll_out(machinery, state)
    rewarded = pool.clock()
    carry, verdict = check_drafter(machinery, state, result.carry)
    batch, count = make_batch(machinery.config, result.responses, rewards)
    learner_state, update = run_update(machinery, state, batch, count)
    told = {name: float(value) for name, value in sharding.to_host(update)._asdict().items()}
    learned = pool.clock()
    rollout_params = jax.block_until_ready(to_rollout_layout(machinery, learner_state.params))
    ended = pool.clock()
    seconds = {
        "compile": pool.waited - waited,
        "rollout": rollout_ended - began,
        "reward_wait": rewarded - rollout_ended,
        "learn": learned - rewarded,
        "reshard": ended - learned,
        "total": ended - began + pool.waited - waited,
    }
    row = {
        "step": state.steps_done,
        **metrics.response_metrics(result.responses, rewards, machinery.stop_tokens),
        **metrics.rollout_metrics(result.chunks, seconds["rollout"]),
        **_update_metrics(machinery.config, told, state.steps_done),
        "draft_acceptance": None if verdict is None else _number(verdict.acceptance),
        "seconds": seconds,
        "compiles": pool.surprises - surprises,
    }
    new_state = dataclasses.replace(
        state,
        steps_done=state.steps_done + 1,
        learner=learner_state,
        rollout_params=rollout_params,
        carry=carry,
    )
    return StepOutcome(new_state, row, result.chunks, result.responses)


def roll_out(machinery: Machinery, state: RunState) -> tuple[RolloutResult, np.ndarray, float]:
    """Responses of the step's prompts and their rewards [sequences] float32.

    Each response is rewarded on a host thread as soon as it has ended, while others go on. The
    last number is the time, by the pool's clock, at which the rollout itself had ended.
    """
    group = machinery.config.rollout.group_size
    asked = [prompt for prompt in machinery.step_prompts(state.steps_done) for _ in range(group)]
    replay = machinery.replay
    waiting: dict[int, concurrent.futures.Future[float]] = {}

    def reward(response: Response) -> None:
        text = machinery.task.tokenizer.decode(response.response.tolist())
        waiting[response.sequence] = machinery.reward_threads.submit(
            machinery.task.reward_fn, asked[response.sequence]["prompt"], text
        )

    result = rollout.run(
        machinery.programs,
        state.rollout_params,
        state.carry,
        [prompt["prompt_ids"] for prompt in asked],
        machinery.step_key(state.steps_done),
        stop_tokens=machinery.stop_tokens,
        replay=None if replay is None else replay.get(state.steps_done, ()),
        on_finished=reward,
    )
    ended = machinery.programs.pool.clock()
    rewards = [waiting[sequence].result() for sequence in range(len(asked))]
    return result, np.asarray(rewards, np.float32), ended


def check_drafter(
    machinery: Machinery, state: RunState, carry: Carry
) -> tuple[Carry, canary.Verdict | None]:
    """Puts the last good drafter in the place of a bad one, and says so; see `canary`."""
    if carry.good is None:
        return carry, None
    arguments = check_arguments(machinery, state, carry)
    program = machinery.programs.pool.get(check_recipe(machinery, arguments))
    drafter, good, told = program(*arguments)
    verdict = sharding.to_host(told)
    if sentence := canary.sentence(verdict):
        print(f"step {state.steps_done}: {sentence}", flush=True)
    return dataclasses.replace(carry, drafter=drafter, good=good), verdict


def check_arguments(machinery: Machinery, state: RunState, carry: Carry) -> tuple[Any, ...]:
    """Arguments of the program that checks the drafter."""
    sampler = jax.device_put(
        sampling.params_of(machinery.config.rollout), sharding.replicated(machinery.programs.mesh)
    )
    return state.rollout_params, carry.drafter, carry.good, carry.buffer, sampler


def check_recipe(machinery: Machinery, arguments: tuple[Any, ...]) -> Recipe:
    """How that program is made."""
    programs = machinery.programs
    return Recipe(
        "canary",
        lambda: canary.check_program(programs.mesh, programs.policy, programs.drafter),
        arguments,
    )


def make_batch(
    config: RunConfig, responses: list[Response], rewards: np.ndarray
) -> tuple[packing.PackedBatch, int]:
    """Packed microbatches of a step, padded to the most there can be, and how many there are."""
    grouped = jnp.asarray(rewards).reshape(-1, config.rollout.group_size)
    advantage = advantages.group_relative(grouped, normalize=config.learner.normalize_advantages)
    packed = packing.pack(
        [r.tokens for r in responses],
        [r.prompt_length for r in responses],
        [r.log_probs for r in responses],
        np.asarray(advantage).reshape(-1).tolist(),
        aggregation=config.learner.aggregation,
        row_length=config.learner.row_length,
        rows=config.learner.microbatch_rows,
    )
    return packing.pad_microbatches(packed, most_microbatches(config)), len(packed.tokens)


def most_microbatches(config: RunConfig) -> int:
    """Microbatches of the largest batch that a rollout can give."""
    return packing.most_microbatches(
        config.rollout.num_sequences,
        config.rollout.max_length,
        config.learner.row_length,
        config.learner.microbatch_rows,
    )


def run_update(
    machinery: Machinery, state: RunState, batch: packing.PackedBatch, count: int
) -> tuple[LearnerState, learner.UpdateMetrics]:
    """The policy update; its metrics are still on the device."""
    arguments = update_arguments(machinery, state, batch, count)
    return machinery.programs.pool.get(update_recipe(machinery, arguments))(*arguments)


def update_arguments(
    machinery: Machinery, state: RunState, batch: packing.PackedBatch, count: int
) -> tuple[Any, ...]:
    """Arguments of the update program, all on the mesh."""
    config, mesh = machinery.config.rollout, machinery.programs.mesh
    sampler = sampling.params_of(config)
    whole = sharding.replicated(mesh)
    return (
        state.learner,
        state.reference,
        jax.device_put(sampler, whole),
        jax.device_put(batch, learner.batch_sharding(mesh)),
        jax.device_put(np.int32(count), whole),
    )


def update_recipe(machinery: Machinery, arguments: tuple[Any, ...]) -> Recipe:
    """How the policy update is made, for the same pool as the rollout's programs."""
    programs = machinery.programs
    return Recipe(
        "update",
        lambda: learner.update_program(
            programs.mesh, programs.policy, machinery.config.learner, machinery.tx
        ),
        arguments,
    )


def to_rollout_layout(machinery: Machinery, params: Any) -> Any:
    """Policy parameters copied from the training layout to the rollout layout."""
    return machinery.programs.pool.get(layout_recipe(machinery, params))(params)


def layout_recipe(machinery: Machinery, params: Any) -> Recipe:
    """How the program of `to_rollout_layout` is made."""
    mesh, config = machinery.programs.mesh, machinery.config
    return Recipe("reshard", lambda: rollout_layout(mesh, config), (params,))


def rollout_layout(mesh: jax.sharding.Mesh, config: RunConfig) -> Any:
    """The jitted function that copies policy parameters of any layout into the rollout layout."""
    specs = policy.param_specs(config.policy)
    shardings = sharding.tree_shardings(specs, mesh, sharding.ROLLOUT_RULES)
    return sharding.resharder(shardings, config.policy.dtype)


def _number(x: Any) -> float | None:
    """A number for JSON, which knows no NaN."""
    return float(x) if np.isfinite(x) else None


def learning_rate(config: RunConfig, step: int) -> float:
    """The policy's learning rate at a step's first update."""
    rate = learner.schedule(config.learner, config.num_steps)
    return float(rate(step * config.learner.updates_per_step))


def _update_metrics(config: RunConfig, told: dict[str, float], step: int) -> dict[str, float]:
    named = {"policy_loss" if name == "loss" else name: value for name, value in told.items()}
    return named | {"learning_rate": learning_rate(config, step)}
