# Makes the Python environment that the scripts of this folder work in; sourced, never run.
#
#   prepare_environment [dev]      afterwards "$venv_python" is the environment's interpreter
#   choose_workdir FOLDER          sets workdir to WORKDIR, or to FOLDER of the repository
#
# TLT_JAX_VENV         where the environment lives (default: .venv in the repository root)
# PYTHON               the interpreter that makes it (default: the first of python3.12, python3.11
#                      and python3 that runs and is Python 3.11 or newer)
# TLT_JAX_ACCELERATOR  gpu or tpu: installs requirements-gpu.txt or requirements-tpu.txt too
#
# An environment that had JAX for CUDA before these scripts came to it keeps that one.
#
# A step is skipped when its stamp, written after the step has ended, still fits the files it
# depends on: a second call costs about a second, an interrupted one resumes where it stopped.

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
  echo "launch/environment.sh is sourced; run launch/quickstart.sh, launch/test.sh or launch/gpu.sh." >&2
  exit 2
fi

root=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${TLT_JAX_VENV:-$root/.venv}
[[ $venv == /* ]] || venv=$PWD/$venv
venv_python=$venv/bin/python
step="starting" # what is being done, for the sentence on an unexpected end

# Tells the failure in one sentence and ends the script.
fail() {
  trap - EXIT
  echo "$(basename "$0"): $*" >&2
  exit 1
}

# Says a sentence when a command ends the script without having gone through `fail`.
tell_unexpected_end() {
  local status=$?
  ((status == 0)) || echo "$(basename "$0"): ended with exit status $status in the step '$step'; run it again to resume." >&2
}
trap tell_unexpected_end EXIT
# Without this, a command that handles Ctrl-C itself (pip, pytest) would be followed by the next.
trap 'exit 130' INT

# A relative WORKDIR is meant from the folder of the caller.
choose_workdir() {
  workdir=${WORKDIR:-$root/$1}
  [[ $workdir != *://* ]] || fail "WORKDIR is '$workdir'; it must be a folder, mount the bucket first."
  [[ $workdir == /* ]] || workdir=$PWD/$workdir
}

# Prints "3.11" for an interpreter that really runs; fails for a shim that has nothing behind it.
python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

is_supported() { # is_supported 3.11
  local major=${1%%.*} minor=${1#*.}
  ((major > 3 || (major == 3 && minor >= 11)))
}

# Sets base_python to the interpreter that makes the environment.
find_python() {
  local candidate version
  base_python=
  if [[ -n ${PYTHON:-} ]]; then
    version=$(python_version "$PYTHON") || fail "PYTHON=$PYTHON does not run; set PYTHON to a Python 3.11 or newer."
    is_supported "$version" || fail "PYTHON=$PYTHON is Python $version; Python 3.11 or newer is needed."
    base_python=$PYTHON
  else
    for candidate in python3.12 python3.11 python3; do
      version=$(python_version "$candidate") && is_supported "$version" || continue
      base_python=$candidate
      break
    done
    [[ -n $base_python ]] ||
      fail "none of python3.12, python3.11 and python3 is a Python 3.11 or newer that runs; install one or set PYTHON to its path."
  fi
  "$base_python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$base_python has no venv module; install it (Debian and Ubuntu: apt install python3-venv) or set PYTHON to another Python."
}

# run_step NAME "What it does" COMMAND...: one line with the time, the output in a log.
run_step() {
  local name=$1 log=$venv/install-$1.log started=$SECONDS
  step=$2
  shift 2
  printf '%s ... ' "$step"
  if ! "$@" >"$log" 2>&1; then
    echo "failed after $((SECONDS - started)) s"
    fail "$step failed; the whole output is in $log, its last lines are:"$'\n'"$(tail -n 15 "$log")"
  fi
  echo "$((SECONDS - started)) s"
}

# install_once NAME FILE PIP-ARGUMENT...: pip install, unless it has been done for this FILE in this
# place. The stamp is written last, so that an interrupted install is done again.
install_once() {
  local name=$1 stamp=$venv/install-$1.stamp wanted
  wanted=$({ echo "$root" && cat "$root/$2"; } | cksum)
  if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    return
  fi
  rm -f "$stamp"
  run_step "$name" "Installing $name ($2) into $venv" "$venv_python" -m pip install --no-input "${@:3}"
  echo "$wanted" >"$stamp"
}

# Whether somebody else has put JAX's plugin for NVIDIA GPUs into the environment, for any CUDA.
brings_cuda() {
  [[ ! -f $venv/install-gpu.stamp ]] &&
    "$venv_python" -m pip list --format=freeze 2>/dev/null | grep '^jax-cuda.*-plugin==' >/dev/null
}

make_venv() {
  local version
  if "$venv_python" -m pip --version >/dev/null 2>&1; then
    version=$(python_version "$venv_python")
    is_supported "$version" ||
      fail "the environment $venv is Python $version; Python 3.11 or newer is needed: remove it or set TLT_JAX_VENV to another folder."
    echo "Using the environment $venv (Python $version)"
    return
  fi
  find_python
  mkdir -p "$venv" || fail "the folder $venv cannot be made; set TLT_JAX_VENV to a folder that can."
  run_step environment "Making the environment $venv with $base_python" "$base_python" -m venv "$venv"
  "$venv_python" -m pip --version >/dev/null 2>&1 ||
    fail "the environment $venv does not run; remove it or set TLT_JAX_VENV to another folder, then run this again."
}

prepare_environment() {
  local accelerator=${TLT_JAX_ACCELERATOR:-} constraint=$root/requirements.txt extra
  [[ $accelerator == "" || $accelerator == gpu || $accelerator == tpu ]] ||
    fail "TLT_JAX_ACCELERATOR is '$accelerator'; it must be gpu, tpu or unset (CPU)."
  make_venv
  install_once core requirements.txt --requirement "$root/requirements.txt"
  # The constraint keeps what an extra pulls in inside the ranges of the core requirements.
  for extra in $accelerator "$@"; do
    if [[ $extra == gpu ]] && brings_cuda; then
      echo "Keeping the JAX for CUDA that is in $venv"
      continue
    fi
    install_once "$extra" "requirements-$extra.txt" \
      --requirement "$root/requirements-$extra.txt" --constraint "$constraint"
  done
  install_once package pyproject.toml --no-deps --editable "$root"
}
