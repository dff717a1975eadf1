"""Reproduces an experiment: `python -m tlt_jax.ablate NAME --workdir=DIR [--config.a.b=v]`.

Its configuration is `configs/experiments/NAME.py`, unless `--config=` gives another.

drafter_staleness   frozen and trained drafters, by objective, as the policy drifts (the paper's
                    tables 6 and 7, figure 16)
"""

import pathlib
import sys
from collections.abc import Callable

import jax

from tlt_jax import command_line, staleness
from tlt_jax.config import RunConfig, nearest
from tlt_jax.types import UserError

EXPERIMENTS: dict[str, Callable[[RunConfig, pathlib.Path], None]] = {
    "drafter_staleness": staleness.run
}


def named(argv: list[str]) -> str:
    """The experiment that the command line names.

    Raises:
      UserError: it names none, or one that does not exist.
    """
    if len(argv) < 2 or argv[1].startswith("-"):
        raise UserError(f"name an experiment: {', '.join(EXPERIMENTS)}.")
    if argv[1] not in EXPERIMENTS:
        raise UserError(f"there is no experiment '{argv[1]}': {nearest(argv[1], EXPERIMENTS)}")
    return argv[1]


def with_config(argv: list[str]) -> list[str]:
    """The command line with the experiment's configuration in place of its name."""
    name, rest = named(argv), argv[2:]
    given = any(argument.split("=")[0].lstrip("-") == "config" for argument in rest)
    return [argv[0], *([] if given else [f"--config=configs/experiments/{name}.py"]), *rest]


def main(argv: list[str]) -> None:
    config, workdir = command_line.start(argv)
    jax.config.update("jax_compilation_cache_dir", str((workdir / "xla_cache").absolute()))
    EXPERIMENTS[named(sys.argv)](config, workdir)


if __name__ == "__main__":
    command_line.run(main, rewrite=with_config)
