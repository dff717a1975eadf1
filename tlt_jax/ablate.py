"""Reproduces an experiment: `python -m tlt_jax.ablate NAME --workdir=DIR [--config.a.b=v]`.

Its configuration is `configs/experiments/NAME.py`, unless `--config=` gives another.

drafter_staleness   frozen and trained drafters, by objective, as the policy drifts (to hold against
                    the paper's tables 6 and 7; beside its figure 16)
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
CONFIGS = pathlib.Path("configs/experiments")
HELP = {"help", "helpfull", "helpshort", "helpxml", "h", "?"}


def named(argv: list[str]) -> str:
    """The experiment that the command line names: its first argument that is no flag.

    Raises:
      UserError: it names none, or one that does not exist.
    """
    names = [argument for argument in argv[1:] if not argument.startswith("-")]
    if not names:
        raise UserError(f"name an experiment: {', '.join(EXPERIMENTS)}.")
    if names[0] not in EXPERIMENTS:
        raise UserError(f"there is no experiment '{names[0]}': {nearest(names[0], EXPERIMENTS)}")
    return names[0]


def with_config(argv: list[str]) -> list[str]:
    """The command line with the experiment's configuration in place of its name.

    Raises:
      UserError: as of `named`, or that configuration is not in this folder.
    """
    flags = {argument.split("=")[0].lstrip("-") for argument in argv[1:]}
    if flags & HELP:
        return argv
    name, rest = named(argv), argv[1:]
    rest.remove(name)
    if "config" in flags:
        return [argv[0], *rest]
    path = CONFIGS / f"{name}.py"
    if not path.is_file():
        raise UserError(f"there is no {path} here; call this in the repository's folder.")
    return [argv[0], f"--config={path}", *rest]


def main(argv: list[str]) -> None:
    config, workdir = command_line.start(argv)
    jax.config.update("jax_compilation_cache_dir", str((workdir / "xla_cache").absolute()))
    EXPERIMENTS[named(sys.argv)](config, workdir)


if __name__ == "__main__":
    command_line.run(main, rewrite=with_config)
