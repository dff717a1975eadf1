"""Compares rollout modes side by side: same prompts, keys and weights, in one process.

    python -m tlt_jax.benchmark --config=configs/quickstart.py --workdir=runs/quickstart

Takes the weights of the run in the workdir if it has ended, else those of its warm start. What is
measured is in parts (`config.benchmark.parts`); each prints its tables as soon as it is through,
and goes into `benchmark.json`, `benchmark_PART.csv` and, where there is something to see,
`plots/benchmark_PART.png`. Parts measured by an earlier call stay.

batch     modes on batches of a step's size, and where a round's time goes
tail      the same modes with few sequences live
training  whole RL steps: without a drafter, with one, and with one that idle slices train
queue     four times as many sequences as slots: refilling them, dealing by length, the bandit
grid      every strategy by live rows, "full rows": as if all were live in all rounds (the paper's
          figure 13, tables 1 and 4)
drafts    noise-shared against most likely drafts, coupled against rejection sampling
broken    what a drafter costs that suddenly consists of random numbers or of NaN
memory    compiled programs for one strategy, for all, and for the likely ones in each bucket
          (table 5)
trainer   what drafter training gains by packed rows, what a step loses by checkpoints, and what
          stored features save (figure 17)
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np

from tlt_jax import (
    command_line,
    drafter,
    paces,
    policy,
    pool_price,
    profiling,
    race,
    setup,
    step_price,
    trainer_price,
    validation,
    weights,
)
from tlt_jax.benchmark_parts import PARTS
from tlt_jax.config import RunConfig, nearest
from tlt_jax.race import Subject
from tlt_jax.reporting import benchmark_plots
from tlt_jax.reporting.writers import write_atomically, write_csv
from tlt_jax.types import UserError


def told(finding: dict[str, Any]) -> str:
    """A finding as text."""
    if "profile" in finding:
        return profiling.table(finding["profile"])
    if "sides" in finding:
        return step_price.table(finding)
    if "pools" in finding:
        return pool_price.table(finding["pools"])
    if "rivals" in finding:
        return trainer_price.table(finding)
    if "choice" in finding:
        return f"{race.table(finding)}\n{paces.sentences(finding['choice'])}"
    return race.table(finding)


def load_subject(config: RunConfig, workdir: pathlib.Path) -> Subject:
    """The policy and drafter of the workdir's run, or of the warm start if it has not ended."""
    task, prompts = setup.load_task(config)
    path, frozen = workdir / "policy.safetensors", setup.initial_drafter(config)
    if path.exists():
        dtype, origin = config.policy.dtype, str(workdir)
        specs = drafter.param_specs(config.policy, config.drafter)
        target = weights.load(path, policy.param_specs(config.policy), dtype=dtype)
        draft = weights.load(workdir / "drafter" / "drafter.safetensors", specs, dtype=dtype)
    else:
        origin = config.warm_start_dir or "random initial weights"
        target, draft = setup.initial_policy(config), frozen
    drafters = {
        "trained": draft,
        "frozen": frozen,
        "random": setup.initial_drafter(dataclasses.replace(config, warm_start_dir="")),
        "NaN": jax.tree.map(lambda x: x * np.nan, frozen),
    }
    return Subject(config, prompts, (task.tokenizer.eos_id,), target, drafters, origin, workdir)


def benchmark(config: RunConfig, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures the parts asked for; returns what is written to `benchmark.json`.

    Raises:
      UserError: there is no such part.
    """
    for name in config.benchmark.parts:
        if name not in PARTS:
            hint = nearest(name, PARTS)
            raise UserError(f"config.benchmark.parts has '{name}', which is no part: {hint}")
    subject, path = load_subject(config, workdir), workdir / "benchmark.json"
    print(f"weights: {subject.origin}", flush=True)
    before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results = {name: part for name, part in before.items() if name in PARTS}
    for name in config.benchmark.parts:
        findings = []
        for finding in PARTS[name](subject):
            print(f"{name}: {told(finding)}", flush=True)
            findings.append(finding)
        results[name] = {
            "weights": subject.origin,
            "device": jax.devices()[0].device_kind,
            "slices": config.mesh.slices,
            "repeats": config.benchmark.repeats,
            "findings": findings,
        }
        write_atomically(path, (json.dumps(results, indent=2) + "\n").encode())
        write_csv(workdir / f"benchmark_{name}.csv", [row for f in findings for row in lines(f)])
        benchmark_plots.write(workdir, name, findings)
    return results


def lines(finding: dict[str, Any]) -> list[dict[str, Any]]:
    """A finding as lines of a table: what all modes of a race share, then what each has shown."""
    common, kinds = (
        ("batch", "rows", "temperature", "measured"),
        ("modes", "profile", "pools", "sides", "rivals"),
    )
    shared = {key: finding[key] for key in common if key in finding}
    many = next(finding[key] for key in kinds if key in finding)
    found = [shared | _flat(one) for one in many]
    if "training" in finding:  # of the last side, against the one before
        found[-1] |= finding["training"]
    return found


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Without lists of lists; dictionaries become columns, lists of numbers words."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= value
        elif isinstance(value, list):
            if key != "partings":
                flat[key] = " ".join(f"{number:.6g}" for number in value)
        else:
            flat[key] = value
    return flat


def main(argv: list[str]) -> None:
    config, workdir = command_line.start(
        argv, slices=lambda config: max([config.mesh.slices, *config.benchmark.other_slices])
    )
    validation.validate_benchmark(config)
    jax.config.update("jax_compilation_cache_dir", str((workdir / "xla_cache").absolute()))
    benchmark(config, workdir)
    print(f"wrote {workdir / 'benchmark.json'}", flush=True)


if __name__ == "__main__":
    command_line.run(main)
