"""The experiment `drafter_staleness`: when does training the drafter during RL pay?

    python -m tlt_jax.ablate drafter_staleness --workdir=runs/drafter_staleness

RL runs of several learning rates, hence drifts of the policy, and seeds. No token depends on the
drafter, so each run serves all drafters: it decodes with the n-gram drafter, whose accept length is
measured as it is, and after each step every trained drafter is judged on the step's sequences by
what it would have drafted there (`draft_replay`). Only then does it learn from them: with the
gradient, the buffer's sampling and the update of spot training, in as many places of the newest
rows as its name says. All begin from the drafter that a run begins with.

A run is a file `runs/rate_RATE_seed_SEED.jsonl` with a line a step. Started again, the command
leaves alone what is complete.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import (
    buffer,
    draft_replay,
    kept_config,
    sampling,
    setup,
    sharding,
    spot_training,
    validation,
)
from tlt_jax.buffer import DrafterBuffer, Microbatch
from tlt_jax.config import DrafterConfig, PolicyConfig, RunConfig
from tlt_jax.draft_replay import Shown
from tlt_jax.reporting import staleness_plots
from tlt_jax.reporting.writers import JsonlWriter, read_jsonl
from tlt_jax.rl_step import rl_step
from tlt_jax.spot_training import DrafterState
from tlt_jax.types import INVALID, SamplingParams, UserError
from tlt_jax.validation import OBJECTIVES

FROZEN = "frozen"
# What may be asked for anew in a workdir: it changes no run that is there.
MAY_CHANGE = (
    "config.benchmark", "config.checkpoint",
    "config.staleness.learning_rates", "config.staleness.seeds",
)  # fmt: skip
LESSON_STREAM = 3_000_000
"""Folded into a run's key for the draws of microbatches; steps, for tokens, stay below."""
REPEATS = 5


@dataclasses.dataclass
class Student:
    """A drafter that is judged, and trained, beside a run."""

    name: str
    policy: PolicyConfig  # its `feature_layers` are those that this drafter reads
    config: DrafterConfig
    updates: int  # after each step; 0: frozen
    device: jax.Device  # trains it
    state: DrafterState


class Lesson(NamedTuple):
    """What all drafters learn from after a step, on the host."""

    heads: Any  # as of `heads`
    rows: DrafterBuffer
    key: jax.Array  # of the draws of microbatches, the same for all


def run(config: RunConfig, workdir: pathlib.Path) -> None:
    """Takes all RL runs that are not complete yet, then draws what came of them.

    Raises:
      UserError: what is asked for does not fit together, or the workdir is another experiment's.
    """
    check(config)
    kept_config.check(config, workdir, may_change=MAY_CHANGE)
    paths = []
    for seed in config.staleness.seeds:
        for rate in config.staleness.learning_rates:
            paths.append(workdir / "runs" / f"rate_{rate:g}_seed_{seed}.jsonl")
            if paths[-1].exists() and len(list(read_jsonl(paths[-1]))) == config.num_steps:
                continue
            paths[-1].unlink(missing_ok=True)
            print(f"learning rate {rate:g}, seed {seed}", flush=True)
            records = follow(config, rate, seed)
            first = next(records)  # what does not fit is told before anything is written
            kept_config.keep(config, workdir)
            with contextlib.closing(JsonlWriter(paths[-1])) as log:
                for record in itertools.chain([first], records):
                    log.write(record)
                    print(progress(record, config.num_steps), flush=True)
            jax.clear_caches()  # a process on CPU may hold only so many programs
    for path in staleness_plots.write(workdir, paths):
        print(f"wrote {path}", flush=True)


def check(config: RunConfig) -> None:
    """Refuses what would fail after hours, or would not be what it is called.

    Raises:
      UserError: the first impossible combination found.
    """
    asked, rollout = config.staleness, config.rollout
    lengths = config.warm_start.row_length, config.drafter.row_length
    for holds, sentence in (
        (
            asked.learning_rates and asked.seeds and asked.drafters and config.num_steps > 0,
            "config.staleness must name learning_rates, seeds and drafters, and config.num_steps "
            "be 1 or more.",
        ),
        (asked.depth >= 1, f"config.staleness.depth is {asked.depth}; it must be 1 or more."),
        (
            len(set(asked.drafters)) == len(asked.drafters),
            f"config.staleness.drafters is {asked.drafters}; name each once.",
        ),
        (
            rollout.speculate and not rollout.rejection and rollout.shared_noise,
            "one rollout serves all drafters in coupled verification alone; leave "
            "config.rollout.speculate and shared_noise True, and verification 'coupled'.",
        ),
        (
            config.drafter.store_features,
            "config.drafter.store_features is False, but drafters learn from stored features here.",
        ),
        (
            config.learner.kl_coef > 0,
            "config.learner.kl_coef is 0, so the policy's drift is not measured; set it above 0.",
        ),
        (
            lengths[0] == lengths[1],
            f"config.warm_start.row_length is {lengths[0]} and config.drafter.row_length "
            f"{lengths[1]}; rows are packed once here, so they must be equal.",
        ),
    ):
        if not holds:
            raise UserError(sentence)
    for name in asked.drafters:
        validation.validate(student_config(config, name))
    validation.validate(run_config(config, asked.learning_rates[0], asked.seeds[0]))


def lessons(name: str, config: DrafterConfig) -> tuple[str, int]:
    """The objective that a drafter of this name learns, and in how many updates after each step.

    Raises:
      UserError: there is no such drafter.
    """
    if name == FROZEN:
        return config.objective, 0
    objective, _, tokens = name.partition("-")
    of_update = config.microbatch_rows * config.microbatch_tokens
    count = int(tokens) if tokens.isdecimal() else 0
    if objective not in OBJECTIVES or count == 0 or count % of_update:
        raise UserError(
            f"config.staleness.drafters has '{name}'; write '{FROZEN}', or an objective "
            f"({', '.join(OBJECTIVES)}) and a multiple of the {of_update} tokens of an update, "
            f"'hass-{of_update}'."
        )
    return objective, count // of_update


def follow(config: RunConfig, rate: float, seed: int) -> Iterator[dict[str, Any]]:
    """One RL run: what each step was like, and how every drafter would have done in it."""
    mesh, sampler = sharding.make_mesh(config.mesh), sampling.params_of(config.rollout)
    students = [
        enrol(config, name, mesh.devices.flat[index % mesh.devices.size])
        for index, name in enumerate(config.staleness.drafters)
    ]
    rows = empty_rows(config)
    machinery, state = setup.start(run_config(config, rate, seed))
    with contextlib.closing(machinery):
        for step in range(config.num_steps):
            target, key = state.rollout_params, machinery.step_key(step)
            outcome = rl_step(machinery, state)
            state = outcome.state
            shown = draft_replay.show(config, mesh, target, key, outcome.responses)
            judged = {student.name: judge(config, student, sampler, shown) for student in students}
            rows = with_newest(rows, shown.batches)
            lesson = Lesson(heads(target), rows, machinery.step_key(LESSON_STREAM + step))
            if step == 0:
                machinery.programs.pool.wait()  # no compiler runs beside what is timed
            learned = study(students, lesson)
            yield {
                "learning_rate": rate,
                "seed": seed,
                "step": step,
                **{name: outcome.row[name] for name in ("kl", "reward_mean", "tokens")},
                "drafters": {name: judged[name] | learned[name] for name in judged}
                | {"n-gram": of_rollout(outcome.row)},
                "prices": prices(students, lesson) if step == 0 else None,
            }


def run_config(config: RunConfig, rate: float, seed: int) -> RunConfig:
    """The RL run itself: n-gram drafts as deep as the others', and no training of a drafter."""
    depth, rollout = config.staleness.depth, config.rollout
    return dataclasses.replace(
        config,
        seed=seed,
        policy=dataclasses.replace(config.policy, feature_layers=()),
        rollout=dataclasses.replace(
            rollout, strategies=(f"ngram-{depth}",) * len(rollout.row_buckets)
        ),
        drafter=dataclasses.replace(config.drafter, objective="eagle", train_depth=1, train=False),
        learner=dataclasses.replace(config.learner, learning_rate=rate),
    )


def student_config(config: RunConfig, name: str) -> RunConfig:
    """What a drafter of this name is configured as; "eagle3" alone reads all feature layers."""
    objective, _ = lessons(name, config.drafter)
    layers = config.policy.feature_layers if objective == "eagle3" else ()
    depth = 1 if objective == "eagle" else config.drafter.train_depth
    return dataclasses.replace(
        config,
        policy=dataclasses.replace(config.policy, feature_layers=layers),
        drafter=dataclasses.replace(config.drafter, objective=objective, train_depth=depth),
    )


def enrol(config: RunConfig, name: str, device: jax.Device) -> Student:
    """A drafter of this name, with the parameters that a run begins with."""
    own = student_config(config, name)
    tx = spot_training.optimizer(own.drafter)
    state = spot_training.init_state(tx, setup.initial_drafter(own))
    _, updates = lessons(name, config.drafter)
    return Student(name, own.policy, own.drafter, updates, device, jax.device_put(state, device))


def heads(target: Any) -> Any:
    """What drafters share with the policy: its embedding and head, on the host."""
    return sharding.to_host({name: target[name] for name in ("embed", "head") if name in target})


def judge(
    config: RunConfig, student: Student, sampler: SamplingParams, shown: Shown
) -> dict[str, Any]:
    """How the drafter would have done in the rollout shown."""
    params = sharding.to_host(student.state.params)
    done = draft_replay.replay(params, student.policy, sampler, shown, depth=config.staleness.depth)
    return {"accept_length": done.accept_length, "accept_by_position": done.accept_by_position}


def study(students: Sequence[Student], lesson: Lesson) -> dict[str, dict[str, Any]]:
    """Trains all drafters, each on its device, and gives their mean losses by name."""
    handed = [hand_out(student, lesson) for student in students]
    # Devices work side by side.
    begun = [take_updates(*given) for given in zip(students, handed, strict=True)]
    for student, (state, _) in zip(students, begun, strict=True):
        student.state = state
    return {
        student.name: {"loss": float(loss) if student.updates else None}
        for student, (_, loss) in zip(students, begun, strict=True)
    }


def prices(students: Sequence[Student], lesson: Lesson) -> dict[str, float]:
    """Seconds that a lesson takes each drafter while the others rest, medians."""
    found: dict[str, list[float]] = {student.name: [] for student in students}
    handed = [hand_out(student, lesson) for student in students]
    for _ in range(REPEATS):
        for student, own in zip(students, handed, strict=True):
            began = time.perf_counter()
            jax.block_until_ready(take_updates(student, own))
            found[student.name].append(time.perf_counter() - began)
    return {name: float(np.median(seconds)) for name, seconds in found.items()}


def hand_out(student: Student, lesson: Lesson) -> Lesson:
    """The lesson on the drafter's device."""
    return jax.block_until_ready(jax.device_put(lesson, student.device))


def take_updates(student: Student, lesson: Lesson) -> tuple[DrafterState, jax.Array]:
    """The drafter's state after its updates, and the mean loss; returns before they are done."""
    if student.updates == 0:
        return student.state, jnp.float32(0)
    return _updated(student.state, *lesson, student.policy, student.config, updates=student.updates)


@functools.partial(jax.jit, static_argnames=("config", "drafter_config", "updates"))
def _updated(
    state: DrafterState,
    target: Any,
    rows: DrafterBuffer,
    key: jax.Array,
    config: PolicyConfig,
    drafter_config: DrafterConfig,
    *,
    updates: int,
) -> tuple[DrafterState, jax.Array]:
    """Updates of one microbatch each, drawn from `rows`; the drafter's state and the mean loss."""
    features = draft_replay.narrow(rows.features, config)
    rows = dataclasses.replace(rows, features=features)
    tx = spot_training.optimizer(drafter_config)

    def body(index: jax.Array, carry: tuple[DrafterState, jax.Array, jax.Array]) -> Any:
        state, loss, weight = carry
        total, _ = spot_training.add_samples(
            spot_training.zero_sum(state.params),
            state.params,
            target,
            config,
            drafter_config,
            rows,
            key,
            first=index,
            count=jnp.int32(1),
        )
        state = spot_training.apply(tx, state, total)
        return state, loss + total.loss, weight + total.weight

    zero = jnp.float32(0)
    state, loss, weight = jax.lax.fori_loop(0, updates, body, (state, zero, zero))
    return state, loss / weight


def empty_rows(config: RunConfig) -> DrafterBuffer:
    """A buffer's rows, none of which holds anything, on the host."""
    return sharding.to_host(buffer.empty(config.drafter, config.policy))


def with_newest(rows: DrafterBuffer, batches: Sequence[Microbatch]) -> DrafterBuffer:
    """Puts the rows of a step's batches before those of earlier steps; the oldest drop out."""
    whole = sharding.to_host(batches)
    held = np.concatenate([np.any(batch.segment_ids != INVALID, axis=1) for batch in whole])

    def put(name: str) -> Any:
        new = np.concatenate([getattr(batch, name) for batch in whole])[held]
        return np.concatenate([new, getattr(rows, name)])[: len(rows.tokens)]

    filled: Any = np.int32(min(rows.filled + held.sum(), len(rows.tokens)))
    return dataclasses.replace(
        rows,
        tokens=put("tokens"),
        features=put("features"),
        segment_ids=put("segment_ids"),
        positions=put("positions"),
        filled=filled,
    )


def of_rollout(row: dict[str, Any]) -> dict[str, Any]:
    """What the run's own drafter did; its shares by position are counted in another way."""
    return {"accept_length": row["accept_length"], "accept_by_position": None, "loss": None}


def progress(record: dict[str, Any], steps: int) -> str:
    """A step in a line."""
    lengths = " ".join(
        f"{name} {held['accept_length']:.2f}" for name, held in record["drafters"].items()
    )
    return (
        f"step {record['step'] + 1}/{steps} | reward {record['reward_mean']:.2f} | "
        f"kl {record['kl']:.3f} | accept {lengths}"
    )
