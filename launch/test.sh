#!/usr/bin/env bash
# From a fresh machine to a verdict: environment, install, lint, format, types, layers, tests.
#
#   bash launch/test.sh                          every check, and all tests but those marked slow
#   bash launch/test.sh -m slow                  arguments go to pytest, which then runs alone
#   bash launch/test.sh -m "slow or not slow"    every test
#   bash launch/test.sh -k sampling              the tests whose name holds "sampling"
#   bash launch/test.sh -n 0 -x                  in one process, up to the first failure
#
# launch/environment.sh explains TLT_JAX_VENV, PYTHON and TLT_JAX_ACCELERATOR.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

failed=()

# check COMMAND...: says what is run and how long it took; a failure is kept for the verdict, so
# that one call shows what every check has to say.
check() {
  local started=$SECONDS verdict=passed
  step="Running: $*"
  echo "$step"
  "$venv/bin/$1" "${@:2}" || {
    verdict="failed (exit status $?)"
    failed+=("$*")
  }
  echo "$1 $verdict after $((SECONDS - started)) s"
}

prepare_environment dev
cd "$root"

if (($# == 0)); then
  check ruff check .
  check ruff format --check .
  check mypy
  check lint-imports
fi
# Most of the time goes into compiling, which keeps one core busy: so a process a core, up to eight.
# A file stays in one process, for its tests share what they set up; files go in their order, for
# by count of tests the longest would come last.
check pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "$@"

if ((${#failed[@]} > 0)); then
  verdict=$(printf ', %s' "${failed[@]}")
  fail "${#failed[@]} of the checks failed: ${verdict:2}."
fi
echo "All checks passed."
