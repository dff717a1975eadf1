#!/usr/bin/env bash
# The whole check of a machine with an NVIDIA GPU: environment, then a training run and the benchmark
# on one GPU (one slice: drafter training between the steps, not beside them). The benchmark counts
# the responses in which speculation and plain decoding differ there. launch/test.sh runs the tests.
#
#   bash launch/gpu.sh [--config.a.b=value ...]
#
# The arguments go to the training run and to the benchmark. Resumes like quickstart.sh. WORKDIR says
# where the run is written (default: runs/gpu in the repository); launch/environment.sh explains
# TLT_JAX_VENV and PYTHON. Where no package index is reached and an environment has JAX for CUDA:
#
#   PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER_OF_WHEELS TLT_JAX_VENV=ENVIRONMENT bash launch/gpu.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

config=configs/quickstart.py:gpu
choose_workdir runs/gpu # before the folder changes

# run_on_gpu WHAT COMMAND...: one command of the check.
run_on_gpu() {
  step=$1
  shift
  echo "$step: $*"
  JAX_PLATFORMS=cuda "$venv_python" "$@"
}

step="Looking for a GPU"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader ||
  fail "nvidia-smi finds no NVIDIA GPU; run launch/quickstart.sh on a machine without one."
TLT_JAX_ACCELERATOR=gpu prepare_environment
cd "$root"
run_on_gpu "JAX's devices" -c 'import jax; print(jax.__version__, jax.devices())' ||
  fail "JAX finds no CUDA device; does the driver fit the CUDA of requirements-gpu.txt?"

run_on_gpu "Training" -m tlt_jax.train --config=$config --workdir="$workdir" "$@"
run_on_gpu "Benchmark" -m tlt_jax.benchmark --config=$config --workdir="$workdir" \
  --config.benchmark.parts="('batch','tail','queue','grid','drafts','broken','memory','trainer')" "$@"
echo "Done. Read $workdir/summary.md and $workdir/benchmark.json"
