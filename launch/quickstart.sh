#!/usr/bin/env bash
# From a fresh machine to a finished run: environment, install, then RL training of a small policy.
#
#   bash launch/quickstart.sh [--config.a.b=value ...]
#
# Ctrl-C at any time and call it again: the install and the training both resume where they
# stopped. WORKDIR says where the run is written (default: runs/quickstart in the repository);
# launch/environment.sh explains TLT_JAX_VENV, PYTHON and TLT_JAX_ACCELERATOR.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

choose_workdir runs/quickstart # before the folder changes

prepare_environment
cd "$root"

step="Training in $workdir"
echo "Running: python -m tlt_jax.train --config=configs/quickstart.py --workdir=$workdir $*"
"$venv_python" -m tlt_jax.train --config=configs/quickstart.py --workdir="$workdir" "$@"

echo "Done. Read $workdir/summary.md and look at the pictures in $workdir/plots/"
