"""Draws the pictures and writes the summary of a run again.

python -m tlt_jax.report runs/quickstart
"""

import pathlib

from tlt_jax import command_line
from tlt_jax.reporting import plots, summary
from tlt_jax.types import UserError


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise UserError("give one workdir, for example python -m tlt_jax.report runs/quickstart.")
    workdir = pathlib.Path(argv[1])
    for path in plots.write_all(workdir):
        print(path)
    print(summary.write_summary(workdir))


if __name__ == "__main__":
    command_line.run(main)
