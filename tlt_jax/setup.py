"""Builds what `train` and `benchmark` start from: weights, programs, and a run's first state."""

import collections
import concurrent.futures
import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tlt_jax import (
    advantages,
    calibration,
    canary,
    chunk,
    drafter,
    learner,
    packing,
    policy,
    rl_step,
    sharding,
    spot_training,
    weights,
)
from tlt_jax.budget import Block
from tlt_jax.choice import Choice
from tlt_jax.config import RunConfig
from tlt_jax.programs import RolloutPrograms
from tlt_jax.reporting.writers import read_jsonl
from tlt_jax.rl_step import Machinery, RunState
from tlt_jax.rollout import Carry
from tlt_jax.spot_training import DrafterState
from tlt_jax.tasks import pipeline
from tlt_jax.tasks.task import Task, get_task
from tlt_jax.types import Strategy, UserError

REWARD_THREADS = 2


def initial_policy(config: RunConfig) -> Any:
    """Policy parameters from `warm_start_dir`, or random ones."""
    if not config.warm_start_dir:
        return policy.init(config.policy, jax.random.key(config.seed))
    path = pathlib.Path(config.warm_start_dir) / "policy.safetensors"
    return weights.load(path, policy.param_specs(config.policy), dtype=config.policy.dtype)


def initial_drafter(config: RunConfig) -> Any:
    """Drafter parameters from `warm_start_dir`, or random ones where it has none.

    One that reads the last hidden state alone is widened where the configuration names more.
    """
    path = pathlib.Path(config.warm_start_dir) / "drafter.safetensors"
    if not config.warm_start_dir or not path.exists():
        if config.warm_start_dir:
            print(f"there is no {path}: the drafter begins with random parameters", flush=True)
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        return drafter.init(config.policy, config.drafter, key)
    shape, dtype = config.policy, config.policy.dtype
    if shape.feature_layers and not weights.holds(path, "read"):
        narrow = dataclasses.replace(shape, feature_layers=())
        specs = drafter.param_specs(narrow, config.drafter)
        return drafter.widened(weights.load(path, specs, dtype=dtype), shape)
    return weights.load(path, drafter.param_specs(shape, config.drafter), dtype=dtype)


def load_task(config: RunConfig) -> tuple[Task, Any]:
    """The task and its endless prompt dataset.

    Raises:
      UserError: an unknown task or mix, or prompts that do not fit the policy or the cache.
    """
    task = get_task(config.task.name)
    if task.max_prompt_tokens > config.rollout.max_prompt_length:
        raise UserError(
            f"prompts of task '{task.name}' have up to {task.max_prompt_tokens} tokens, but "
            f"config.rollout.max_prompt_length is {config.rollout.max_prompt_length}."
        )
    if task.tokenizer.vocab_size != config.policy.vocab_size:
        raise UserError(
            f"task '{task.name}' has a vocabulary of {task.tokenizer.vocab_size} tokens, but "
            f"config.policy.vocab_size is {config.policy.vocab_size}."
        )
    source = pipeline.load_source(task, config.task.mix, "train", config.task.data_dir)
    return task, pipeline.prompt_dataset(source, task, seed=config.seed)


def drafter_state(
    tx: optax.GradientTransformation, mesh: jax.sharding.Mesh, params: Any
) -> DrafterState:
    """Version 0 of a drafter that `tx` will train, on every device of the mesh.

    The parameters are copied: the state will be donated, and `params` stays the caller's.
    """
    state = spot_training.init_state(tx, jax.tree.map(jnp.copy, params))
    return jax.device_put(state, sharding.replicated(mesh))


def load_replay(path: str) -> dict[int, list[Choice]] | None:
    """What a run chose for the chunks of each step, by its `decisions.jsonl`; None without a path.

    Raises:
      UserError: there is no such file, or it is no log of decisions.
    """
    if not path:
        return None
    log: dict[int, list[Choice]] = collections.defaultdict(list)
    for record in read_jsonl(path):
        if not {"step", "strategy", "give_up_below", "block"} <= record.keys():
            raise UserError(
                f"config.replay={path} is no log of decisions of this version; give the "
                "decisions.jsonl of a run."
            )
        strategy = Strategy.parse(record["strategy"])
        block = Block(**record["block"])
        log[record["step"]].append(Choice(strategy, "replayed", record["give_up_below"], block))
    return dict(log)


def start(config: RunConfig) -> tuple[Machinery, RunState]:
    """Machinery whose programs are being compiled, and the state before the first step."""
    machinery = make_machinery(config)
    params = initial_policy(config)
    draft = initial_drafter(config) if machinery.programs.drafting else None
    state = first_state(machinery, params, draft)
    order_programs(machinery, state)
    print(f"compiling {len(machinery.programs.pool)} programs as the first step begins", flush=True)
    return machinery, state


def make_machinery(config: RunConfig) -> Machinery:
    """Machinery that has compiled nothing yet."""
    task, prompts = load_task(config)
    drafting = config.rollout.speculate
    programs = RolloutPrograms(
        mesh=sharding.make_mesh(config.mesh),
        policy=config.policy,
        rollout=config.rollout,
        drafter=config.drafter,
        drafting=drafting,
        training=drafting and config.drafter.train,
    )
    return Machinery(
        config=config,
        task=task,
        prompts=prompts,
        programs=programs,
        replay=load_replay(config.replay),
        reward_threads=concurrent.futures.ThreadPoolExecutor(REWARD_THREADS),
    )


def first_state(machinery: Machinery, policy_params: Any, drafter_params: Any) -> RunState:
    """The state before the first step of a run that begins with these parameters.

    Without drafting, `drafter_params` are not looked at.
    """
    config, programs = machinery.config, machinery.programs
    mesh = programs.mesh
    params = rl_step.rollout_layout(mesh, config)(policy_params)
    draft = None
    if programs.drafting:
        draft = drafter_state(spot_training.optimizer(config.drafter), mesh, drafter_params)
    buffer = good = None
    if programs.training:
        assert draft is not None, "there is no drafter to train"
        buffer = chunk.empty_buffers(mesh, config.policy, config.drafter)
        good = canary.begin(draft)
    return RunState(
        steps_done=0,
        learner=learner.init_state(mesh, config.policy, machinery.tx, params),
        reference=jax.tree.map(lambda x: x.copy(), params),
        rollout_params=params,
        carry=Carry(draft, buffer, programs.empty_library(), good=good),
    )


def order_programs(machinery: Machinery, state: RunState) -> None:
    """Has all programs of a run compiled in the background.

    In about the order of their need, but for the policy update, which takes longest. What a step
    computes outside of programs is run once, here and now.
    """
    programs, rows = machinery.programs, machinery.config.learner
    most = rl_step.most_microbatches(machinery.config)
    empty = packing.empty_batch(most, rows.microbatch_rows, rows.row_length)
    update = rl_step.update_arguments(machinery, state, empty, 0)
    wanted = [
        rl_step.update_recipe(machinery, update),
        *programs.recipes(state.rollout_params, *state.carry.arrays),
        rl_step.layout_recipe(machinery, state.learner.params),
    ]
    if state.carry.good is not None:
        check = rl_step.check_arguments(machinery, state, state.carry)
        wanted.append(rl_step.check_recipe(machinery, check))
    programs.pool.order(wanted)
    _warm_up_small_operations(machinery)


def time_microbatch(machinery: Machinery, state: RunState) -> tuple[RunState, float]:
    """Seconds of a drafter microbatch, measured when all programs are compiled; 0 without any.

    Where microbatches are priced by it, the state knows it from then on.
    """
    began, programs = time.monotonic(), machinery.programs
    programs.pool.wait()
    print(
        f"compiled {programs.pool.compiled} programs, after waiting "
        f"{time.monotonic() - began:.0f}s for the last ones",
        flush=True,
    )
    carry, seconds = calibration.time_microbatch(programs, state.rollout_params, state.carry)
    return dataclasses.replace(state, carry=carry), seconds


def _warm_up_small_operations(machinery: Machinery) -> None:
    """Runs what a step computes outside its programs once, on zeros: JAX compiles this as well."""
    config = machinery.config
    shape = (config.rollout.prompts_per_step, config.rollout.group_size)
    advantages.group_relative(
        jnp.zeros(shape).reshape(-1).reshape(shape), normalize=config.learner.normalize_advantages
    )
    machinery.step_key(0)
    for step in (0, config.learner.warmup_steps + 1):
        rl_step.learning_rate(config, step)
