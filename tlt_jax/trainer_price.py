"""What the drafter's trainer gains by its features (the paper's figure 17).

packing      a pass over the same sequences in packed rows and in padded batches
checkpoints  how long a step is held up by saving everything, and by saving the drafter alone
features     a microbatch of a buffer that stores features, and of one that does not

Rivals take turns after an untimed pass each, every repeat beginning with another one.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import packing, policy, setup, spot_training
from tlt_jax.buffer import DrafterBuffer, Microbatch
from tlt_jax.checkpoint import Checkpoints
from tlt_jax.config import RunConfig
from tlt_jax.drafter_versions import DrafterVersions
from tlt_jax.program_pool import ProgramPool
from tlt_jax.race import Mode, Subject, draw_batch, make_runner
from tlt_jax.rl_step import RunState
from tlt_jax.spot_training import DrafterState, GradientSum
from tlt_jax.types import INVALID

STEPS = 4  # as many batches of a step's size are trained on
MICROBATCHES = 8  # drawn from a buffer in one go, in one program

Rivals = Mapping[str, Callable[[], float]]
"""What takes turns; each call does the work once and gives the seconds that count."""


class Sequences(NamedTuple):
    """What a drafter learns from, one entry per sequence; its last token has no features."""

    tokens: Sequence[np.ndarray]  # [length] int32
    features: Sequence[np.ndarray] | None  # [length, F]; None before the policy has made them


def measure(subject: Subject) -> Iterator[dict[str, Any]]:
    """Yields what is found about packing, checkpoints and features, one after another.

    Each holds "measured", one of these words, and "rivals": for each "rival" its "seconds" (median,
    least, largest, all), "times", which are those of the first rival in the same repeat (median,
    least, largest), and what `race_packing`, `race_checkpoints` or `race_features` say of it.
    """
    sequences = with_features(subject.config, subject.target, sample(subject))
    yield race_packing(subject, sequences)
    yield race_checkpoints(subject)
    yield race_features(subject, sequences)


def race_packing(subject: Subject, sequences: Sequences) -> dict[str, Any]:
    """Seconds of an update by the gradient of all sequences, and what they hold and make a second.

    Padded batches are of as many sequences as a packed microbatch has rows. "filled" is the share
    of places that hold a token.
    """
    config = subject.config
    state, target = _on_one_device(subject)
    sides = {"packed rows": packed(config, sequences), "padded batches": padded(config, sequences)}
    rivals = {
        name: functools.partial(_seconds, update, state, target, side, config)
        for name, side in sides.items()
    }
    samples, tokens = len(sequences.tokens), sum(map(len, sequences.tokens))
    found = _raced("packing", rivals, config.benchmark.repeats)
    for row in found["rivals"]:
        side = sides[row["rival"]]
        row |= {
            "samples": samples,
            "tokens": tokens,
            "microbatches": len(side),
            "filled": tokens / sum(microbatch.tokens.size for microbatch in side),
            "samples_per_second": samples / row["seconds"],
            "tokens_per_second": tokens / row["seconds"],
        }
    return found


def race_checkpoints(subject: Subject) -> dict[str, Any]:
    """Seconds that the caller is held up, and the megabytes (10^6 bytes) of arrays that are saved.

    Whatever is written in the background has been written before the next rival begins.
    """
    state, keep = _first_state(subject), subject.config.checkpoint
    drafter = state.carry.drafter
    assert drafter is not None, "there is no drafter to save"
    with tempfile.TemporaryDirectory(dir=subject.folder, prefix="saved_") as name:
        folder = pathlib.Path(name)
        with (
            contextlib.closing(Checkpoints(folder, keep)) as checkpoints,
            contextlib.closing(DrafterVersions(folder, keep)) as versions,
        ):
            rivals = _savers(state, drafter, checkpoints, versions)
            found = _raced("checkpoints", rivals, subject.config.benchmark.repeats)
    for row in found["rivals"]:
        saved = drafter.params if row["rival"] == "selective" else state.arrays()
        row["megabytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(saved)) / 1e6
    return found


def _savers(
    state: RunState, drafter: DrafterState, checkpoints: Checkpoints, versions: DrafterVersions
) -> Rivals:
    """Ways to save, each as `train` does it; they give the seconds until the caller goes on."""
    arrays, steps = state.arrays(), itertools.count(1)
    record = {"controller": state.carry.controller.to_record()}

    def save_all() -> None:
        done = next(steps)
        checkpoints.save(done, arrays, {"steps_done": done} | record)

    def save_and_wait() -> None:
        save_all()
        checkpoints.wait()

    def held_up(save: Callable[[], None]) -> float:
        seconds = _seconds(save)
        checkpoints.wait()
        versions.wait()
        return seconds

    return {
        "synchronous": functools.partial(held_up, save_and_wait),
        "asynchronous": functools.partial(held_up, save_all),
        "selective": functools.partial(held_up, functools.partial(versions.save, drafter)),
    }


def race_features(subject: Subject, sequences: Sequences) -> dict[str, Any]:
    """Seconds of one microbatch, drawn as an idle slice draws it, and megabytes of a buffer row."""
    key, (state, target) = jax.random.key(subject.config.seed), _on_one_device(subject)
    rivals, megabytes = {}, {}
    for name, stored in (("stored", True), ("recomputed", False)):
        drafter = dataclasses.replace(subject.config.drafter, store_features=stored)
        config = dataclasses.replace(subject.config, drafter=drafter)
        buffer = jax.block_until_ready(filled_buffer(config, sequences))
        rivals[name] = functools.partial(
            _seconds, draw_and_add, state.params, target, buffer, key, config
        )
        megabytes[name] = drafter.row_megabytes(config.policy)
    found = _raced("features", rivals, subject.config.benchmark.repeats, parts=MICROBATCHES)
    for row in found["rivals"]:
        row["megabytes"] = megabytes[row["rival"]]
    return found


def _seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """How long it takes until the results of `work` are there."""
    start = time.perf_counter()
    jax.block_until_ready(work(*arguments))
    return time.perf_counter() - start


def _raced(measured: str, rivals: Rivals, repeats: int, *, parts: int = 1) -> dict[str, Any]:
    """Lets rivals take turns and gathers a row for each; seconds are of one of `parts` parts."""
    names, seconds = list(rivals), {name: list[float]() for name in rivals}
    for run in rivals.values():
        run()  # compiles
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(rivals[name]() / parts)
    rows = []
    for name in names:
        times = np.array(seconds[name]) / np.array(seconds[names[0]])
        rows.append(
            {
                "rival": name,
                "seconds": float(np.median(seconds[name])),
                "seconds_min": min(seconds[name]),
                "seconds_max": max(seconds[name]),
                "seconds_all": seconds[name],
                "times": float(np.median(times)),
                "times_min": float(times.min()),
                "times_max": float(times.max()),
            }
        )
    return {"measured": measured, "rivals": rows}


def sample(subject: Subject) -> Sequences:
    """The policy's sequences in `STEPS` batches of a step's size, by plain decoding."""
    config = subject.config
    plain = dataclasses.replace(config.rollout, speculate=False)
    runner = make_runner(Mode("plain", plain, config.mesh.slices), subject, ProgramPool())
    responses = [
        response
        for index in range(STEPS)
        for response in runner.run_untimed(*draw_batch(subject, plain, index))
    ]
    # The policy was never fed the last token, so a rollout has no features of it.
    return Sequences([response.tokens[:-1] for response in responses], None)


def with_features(config: RunConfig, target: Any, sequences: Sequences) -> Sequences:
    """The sequences with the policy's features, made here once and for all."""
    features = []
    for index, tokens in enumerate(sequences.tokens):
        row = lay_out(sequences, [[index]], config.drafter.row_length)
        features.append(np.asarray(_policy_features(target, row, config))[0, : len(tokens)])
    return sequences._replace(features=features)


@functools.partial(jax.jit, static_argnames="config")
def _policy_features(target: Any, rows: Microbatch, config: RunConfig) -> jax.Array:
    _, features = policy.packed_forward(
        target, config.policy, rows.tokens, rows.positions, rows.segment_ids
    )
    return features


def packed(config: RunConfig, sequences: Sequences) -> list[Microbatch]:
    """Microbatches of rows as long as the buffer's, by first fit."""
    length = config.drafter.row_length
    plan = packing.first_fit([len(tokens) for tokens in sequences.tokens], length)
    return [lay_out(sequences, rows, length) for rows in _groups(plan, config)]


def padded(config: RunConfig, sequences: Sequences) -> list[Microbatch]:
    """Microbatches of one sequence a row, in random order.

    A batch is padded to its longest sequence, and on to the next of the rollout's length buckets:
    every length would be a program of its own.
    """
    order = np.random.default_rng(config.seed).permutation(len(sequences.tokens))
    microbatches = []
    for rows in _groups([[int(index)] for index in order], config):
        longest = max(len(sequences.tokens[index]) for members in rows for index in members)
        length = min(bucket for bucket in config.rollout.length_buckets if bucket >= longest)
        microbatches.append(lay_out(sequences, rows, length))
    return microbatches


def _groups(plan: list[list[int]], config: RunConfig) -> Iterator[list[list[int]]]:
    """Rows of a microbatch at a time; the last one is filled up with rows of nothing."""
    size = config.warm_start.batch_rows
    for first in range(0, len(plan), size):
        rows = plan[first : first + size]
        yield rows + [[]] * (size - len(rows))


def lay_out(sequences: Sequences, plan: Sequence[Sequence[int]], length: int) -> Microbatch:
    """Rows of `length` tokens, each with the sequences that `plan` names for it, on one device."""
    shape = (len(plan), length)
    tokens, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segment_ids, features = np.full(shape, INVALID, np.int32), None
    if sequences.features is not None:
        first = sequences.features[0]
        features = np.zeros((*shape, first.shape[1]), first.dtype)
    for row, members in enumerate(plan):
        start = 0
        for index in members:
            count = len(sequences.tokens[index])
            here = row, slice(start, start + count)
            tokens[here], positions[here] = sequences.tokens[index], np.arange(count)
            segment_ids[here] = index
            if features is not None and sequences.features is not None:
                features[here] = sequences.features[index]
            start += count
    starts = np.zeros(len(plan), np.int32)
    return Microbatch(*jax.device_put((tokens, features, segment_ids, positions, starts)))


def gradient_sum(
    params: Any, target: Any, microbatches: Sequence[Microbatch], config: RunConfig
) -> GradientSum:
    """The gradient of all microbatches, every token of them trained."""
    total = spot_training.zero_sum(params)
    for microbatch in microbatches:
        total = _add(total, params, target, microbatch, config)
    return total


@functools.partial(jax.jit, static_argnames="config", donate_argnums=0)
def _add(
    total: GradientSum, params: Any, target: Any, microbatch: Microbatch, config: RunConfig
) -> GradientSum:
    whole = config.drafter.on_whole_rows(microbatch.tokens.shape[1])
    return spot_training.add_microbatch(total, params, target, config.policy, whole, microbatch)


def update(
    state: DrafterState, target: Any, microbatches: Sequence[Microbatch], config: RunConfig
) -> DrafterState:
    """One update by the gradient of all microbatches; `state` stays."""
    return _apply(state, gradient_sum(state.params, target, microbatches, config), config)


@functools.partial(jax.jit, static_argnames="config")
def _apply(state: DrafterState, total: GradientSum, config: RunConfig) -> DrafterState:
    return spot_training.apply(spot_training.optimizer(config.drafter), state, total)


def filled_buffer(config: RunConfig, sequences: Sequences) -> DrafterBuffer:
    """The data buffer of a slice with all sequences in it, however many rows that takes."""
    length = config.drafter.row_length
    plan = packing.first_fit([len(tokens) for tokens in sequences.tokens], length)
    rows = lay_out(sequences, plan, length)
    return DrafterBuffer(
        tokens=rows.tokens,
        features=rows.features if config.drafter.store_features else None,
        segment_ids=rows.segment_ids,
        positions=rows.positions,
        row=jnp.int32(len(plan) - 1),
        used=jnp.sum(rows.segment_ids[-1] != INVALID),
        segments=jnp.int32(len(sequences.tokens)),
        filled=jnp.int32(len(plan)),
    )


@functools.partial(jax.jit, static_argnames="config")
def draw_and_add(
    params: Any, target: Any, buffer: DrafterBuffer, key: jax.Array, config: RunConfig
) -> GradientSum:
    """The gradient of `MICROBATCHES` random microbatches of a buffer."""

    total, _ = spot_training.add_samples(
        spot_training.zero_sum(params),
        params,
        target,
        config.policy,
        config.drafter,
        buffer,
        key,
        first=jnp.int32(0),
        count=jnp.int32(MICROBATCHES),
    )
    return total


def _on_one_device(subject: Subject) -> tuple[DrafterState, Any]:
    """The trained drafter, about to be trained on, and the policy's parameters."""
    tx = spot_training.optimizer(subject.config.drafter)
    state = spot_training.init_state(tx, subject.drafters["trained"])
    return jax.block_until_ready(jax.device_put((state, subject.target), jax.devices()[0]))


def _first_state(subject: Subject) -> RunState:
    """Everything that a run with these weights has to keep, its drafter in training."""
    config = subject.config
    machinery = setup.make_machinery(
        dataclasses.replace(
            config,
            rollout=dataclasses.replace(config.rollout, speculate=True),
            drafter=dataclasses.replace(config.drafter, train=True),
        )
    )
    state = setup.first_state(machinery, subject.target, subject.drafters["trained"])
    machinery.close()
    jax.block_until_ready(state.arrays())
    return state


_TITLES = {
    "packing": "an update of the drafter by the same sequences",
    "checkpoints": "how long a step is held up by saving",
    "features": "one microbatch of the drafter",
}
_FURTHER = {
    "packing": {"samples/s": "samples_per_second", "tokens/s": "tokens_per_second"},
    "checkpoints": {"MB": "megabytes"},
    "features": {"MB per row": "megabytes"},
}


def table(finding: Mapping[str, Any]) -> str:
    """A finding as aligned text."""
    measured = finding["measured"]
    further = _FURTHER[measured]
    lines = [
        _TITLES[measured],
        f"{'':<16}{'ms':>9}{'(min-max)':>20}{'times (min-max)':>24}"
        + "".join(f"{name:>12}" for name in further),
    ]
    for row in finding["rivals"]:
        spread = f"({1e3 * row['seconds_min']:.2f}-{1e3 * row['seconds_max']:.2f})"
        times = f"{row['times']:.3f} ({row['times_min']:.3f}-{row['times_max']:.3f})"
        lines.append(
            f"{row['rival']:<16}{1e3 * row['seconds']:>9.2f}{spread:>20}{times:>24}"
            + "".join(f"{row[key]:>12.4g}" for key in further.values())
        )
    return "\n".join(lines)
