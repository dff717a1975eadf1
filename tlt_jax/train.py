"""RL training with speculative rollouts and drafter training on idle slices.

    python -m tlt_jax.train --config=configs/quickstart.py --workdir=runs/quickstart

The same command resumes a run that was stopped.
"""

import contextlib
import dataclasses
import pathlib
import time

import jax

from tlt_jax import command_line, kept_config, metrics, setup, weights
from tlt_jax.checkpoint import Checkpoints
from tlt_jax.config import RunConfig
from tlt_jax.controller import Controller
from tlt_jax.drafter_versions import DrafterVersions
from tlt_jax.reporting import plots, summary
from tlt_jax.reporting.writers import (
    JsonlWriter,
    TensorboardWriter,
    progress_line,
)
from tlt_jax.rl_step import Machinery, RunState, StepOutcome, rl_step, to_rollout_layout

# What a resumed run may set anew: it changes no step that is done already.
MAY_CHANGE = ("config.benchmark", "config.checkpoint", "config.num_steps", "config.staleness")


class RunLog:
    """The files that a run writes as it goes; from `first_step` on, older lines are kept."""

    def __init__(self, workdir: pathlib.Path, first_step: int):
        self._metrics = JsonlWriter(workdir / "metrics.jsonl")
        self._decisions = JsonlWriter(workdir / "decisions.jsonl")
        self._metrics.truncate_after(first_step)
        self._decisions.truncate_after(first_step)
        self._tensorboard = TensorboardWriter(workdir / "tensorboard", first_step=first_step)

    def write(
        self, outcome: StepOutcome, *, num_steps: int, start: float, microbatch_seconds: float
    ) -> None:
        """Logs one step, which began `start` seconds into the run, and prints its progress line."""
        row = outcome.row | metrics.idle_metrics(outcome.chunks, microbatch_seconds)
        step = row["step"]
        for record in outcome.chunks:
            values = dataclasses.asdict(record)
            values["start"] += start
            self._decisions.write({"step": step, "target_step": step} | values)
        self._metrics.write(row)
        self._tensorboard.write(step, row)
        print(progress_line(row, num_steps=num_steps), flush=True)

    def close(self) -> None:
        self._metrics.close()
        self._decisions.close()
        self._tensorboard.close()


def train(config: RunConfig, workdir: pathlib.Path) -> RunState:
    """Runs or resumes a run to its last step and writes its reports."""
    kept_config.check(config, workdir, may_change=MAY_CHANGE)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    versions = DrafterVersions(workdir, config.checkpoint)
    machinery, state = setup.start(config)
    with contextlib.closing(machinery), contextlib.closing(versions):
        state = resume(machinery, state, checkpoints)
        kept_config.keep(config, workdir)  # only now: what did not fit can be put right in place
        state = take_steps(config, workdir, machinery, state, checkpoints, versions)
    checkpoints.close()
    weights.save(workdir / "policy.safetensors", state.rollout_params, dtype="float32")
    plots.write_all(workdir)
    summary.write_summary(workdir)
    return state


def take_steps(
    config: RunConfig,
    workdir: pathlib.Path,
    machinery: Machinery,
    state: RunState,
    checkpoints: Checkpoints,
    versions: DrafterVersions,
) -> RunState:
    """All steps that are left, logged; programs are compiled while the first of them runs."""
    log, microbatch_seconds = RunLog(workdir, state.steps_done), None
    began = time.monotonic()
    while state.steps_done < config.num_steps:
        outcome = rl_step(machinery, state)
        state, now = outcome.state, time.monotonic()
        if microbatch_seconds is None:
            state, microbatch_seconds = setup.time_microbatch(machinery, state)
        log.write(
            outcome,
            num_steps=config.num_steps,
            start=now - began - outcome.row["seconds"]["total"],
            microbatch_seconds=microbatch_seconds,
        )
        ended = state.steps_done == config.num_steps
        if ended or state.steps_done % config.checkpoint.every == 0:
            save(checkpoints, config, state)
        if state.carry.drafter and (
            ended or state.steps_done % config.checkpoint.drafter_every == 0
        ):
            versions.save(state.carry.drafter)
    log.close()
    return state


def save(checkpoints: Checkpoints, config: RunConfig, state: RunState) -> None:
    """Begins a checkpoint of the state."""
    record = {
        "steps_done": state.steps_done,
        "seed": config.seed,
        "controller": state.carry.controller.to_record(),
    }
    checkpoints.save(state.steps_done, state.arrays(), record)


def resume(machinery: Machinery, state: RunState, checkpoints: Checkpoints) -> RunState:
    """The state of the newest checkpoint, or `state` where there is none."""
    latest = checkpoints.latest()
    if latest is None:
        return state
    arrays, record = checkpoints.restore(latest, state.arrays())
    print(f"resuming after step {record['steps_done']}", flush=True)
    controller = Controller.from_record(record["controller"])
    state = dataclasses.replace(
        state,
        steps_done=record["steps_done"],
        rollout_params=to_rollout_layout(machinery, arrays["learner"].params),
        carry=dataclasses.replace(state.carry, controller=controller),
    )
    return state.with_arrays(**arrays)


def main(argv: list[str]) -> None:
    config, workdir = command_line.start(argv)
    jax.config.update("jax_compilation_cache_dir", str((workdir / "xla_cache").absolute()))
    train(config, workdir)
    print(f"summary: {workdir / 'summary.md'}   pictures: {workdir / 'plots'}", flush=True)


if __name__ == "__main__":
    command_line.run(main)
