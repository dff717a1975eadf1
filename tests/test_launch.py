"""The launch scripts, run against a stub interpreter: nothing is downloaded or installed.

The stub stands for Python, pip and every tool of the environment. It writes each call to a file,
answers what the `STUB_*` variables tell it to, and `-m venv` copies it into the new environment.
"""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import pytest

from tlt_jax.benchmark_parts import PARTS

REPO = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = [*sorted((REPO / "launch").glob("*.sh")), REPO / ".ci" / "run"]
PYTEST = "pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder"
CHECKS = ["ruff check .", "ruff format --check .", "mypy", "lint-imports", PYTEST]

STUB = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$STUB_CALLS"
case "$(basename "$0") $*" in
  *version_info*) echo "${STUB_VERSION:-3.11}" ;;
  *ensurepip*) exit "${STUB_VENV_STATUS:-0}" ;;
  *"-m venv "*)
    mkdir -p "$3/bin"
    for name in python ruff mypy lint-imports pytest; do cp "$0" "$3/bin/$name"; done ;;
  *"-m pip install "*)
    trap "exit 1" INT # as pip does, which a script could take for an ordinary failure
    echo "pip was here"; sleep "${STUB_PIP_SECONDS:-0}"; exit "${STUB_PIP_STATUS:-0}" ;;
  *"-m pip list "*) echo "${STUB_PACKAGES:-numpy==2.4}" ;;
  *"-m tlt_jax.train "*) echo "trained in $PWD"; exit "${STUB_TRAIN_STATUS:-0}" ;;
  mypy*) exit "${STUB_MYPY_STATUS:-0}" ;;
esac
"""
SHIM_WITH_NOTHING_BEHIND_IT = "#!/usr/bin/env bash\necho 'command not found' >&2\nexit 127\n"


def write_script(path: pathlib.Path, text: str) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# Runs a command that heeds Ctrl-C: tests in the background of a shell hand on that it is ignored.
HEEDING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Sandbox:
    """A copy of the launch scripts and of what they install from, with the stub as its Python."""

    def __init__(self, folder: pathlib.Path):
        self.root = folder / "repo with a space"
        shutil.copytree(REPO / "launch", self.root / "launch")
        for path in [*REPO.glob("requirements*.txt"), REPO / "pyproject.toml"]:
            shutil.copy(path, self.root)
        self.venv = self.root / ".venv"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.path_folder = folder / "bin"
        self.python = write_script(folder / "stub_python", STUB)
        self.call_log = folder / "calls"

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        """Starts a launch script in a folder outside the repository; forgets earlier calls."""
        self.call_log.unlink(missing_ok=True)
        environment = {
            "PATH": f"{self.path_folder}:{os.environ['PATH']}",
            "STUB_CALLS": str(self.call_log),
            "PYTHON": str(self.python),
        }
        return subprocess.Popen(
            [sys.executable, "-c", HEEDING, "bash", str(self.root / "launch" / script), *arguments],
            cwd=self.elsewhere,
            env=environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **variables)
        stdout, stderr = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def calls(self, pattern: str) -> list[str]:
        """The stub's calls of the latest run that match the regular expression `pattern`."""
        if not self.call_log.exists():
            return []
        lines = [line.strip() for line in self.call_log.read_text().splitlines()]
        return [line for line in lines if re.search(pattern, line)]

    def installed(self) -> list[str]:
        """What the latest run asked pip for: the requirement files, or the package itself."""
        wanted = r"(?:--requirement .*?(requirements[\w-]*\.txt)|--editable (.*))"
        found = [re.search(wanted, call) for call in self.calls("pip install")]
        assert all(found)
        return [match[1] or "package" for match in found if match]


@pytest.fixture
def sandbox(tmp_path: pathlib.Path) -> Sandbox:
    return Sandbox(tmp_path)


def assert_one_sentence(result: subprocess.CompletedProcess, *parts: str) -> None:
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.endswith(".\n")
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_ci_runs_the_test_script():
    assert os.access(REPO / ".ci" / "run", os.X_OK)
    assert "bash launch/test.sh" in (REPO / ".ci" / "run").read_text().splitlines()


def test_environment_script_is_not_a_command():
    script = REPO / "launch" / "environment.sh"
    result = subprocess.run(["bash", str(script)], capture_output=True, text=True)
    assert result.returncode == 2
    assert "launch/quickstart.sh" in result.stderr


def test_python_that_is_too_old(sandbox):
    result = sandbox.run("quickstart.sh", STUB_VERSION="3.10")
    assert_one_sentence(result, str(sandbox.python), "Python 3.10;", "Python 3.11 or newer")
    assert not sandbox.venv.exists()


@pytest.mark.parametrize("version", ["3.11", "3.12", "4.0"])
def test_python_that_is_new_enough(sandbox, version):
    assert sandbox.run("quickstart.sh", STUB_VERSION=version).returncode == 0


def test_python_that_does_not_run(sandbox):
    write_script(sandbox.python, SHIM_WITH_NOTHING_BEHIND_IT)
    assert_one_sentence(sandbox.run("quickstart.sh"), str(sandbox.python), "does not run")


def test_python_without_venv_module(sandbox):
    result = sandbox.run("quickstart.sh", STUB_VENV_STATUS="1")
    assert_one_sentence(result, str(sandbox.python), "no venv module")


def test_shim_with_nothing_behind_it_is_skipped(sandbox):
    write_script(sandbox.path_folder / "python3.12", SHIM_WITH_NOTHING_BEHIND_IT)
    write_script(sandbox.path_folder / "python3.11", STUB)
    result = sandbox.run("quickstart.sh", PYTHON="")
    assert result.returncode == 0, result.stderr
    assert sandbox.calls("python3.11 -m venv")


def test_no_python_at_all(sandbox):
    for name in ["python3.12", "python3.11", "python3"]:
        write_script(sandbox.path_folder / name, SHIM_WITH_NOTHING_BEHIND_IT)
    assert_one_sentence(sandbox.run("quickstart.sh", PYTHON=""), "python3.12", "set PYTHON")


def test_environment_of_an_old_python_is_refused(sandbox):
    sandbox.run("quickstart.sh")
    result = sandbox.run("quickstart.sh", STUB_VERSION="3.9")
    assert_one_sentence(result, str(sandbox.venv), "Python 3.9;", "TLT_JAX_VENV")


def test_second_call_installs_nothing(sandbox):
    first = sandbox.run("quickstart.sh")
    assert first.returncode == 0, first.stderr
    assert sandbox.installed() == ["requirements.txt", "package"]
    assert re.search(r"^Installing core .* \d+ s$", first.stdout, re.MULTILINE)

    assert sandbox.run("quickstart.sh").returncode == 0
    assert sandbox.installed() == []
    assert not sandbox.calls("-m venv")


def test_changed_requirements_are_installed_again(sandbox):
    sandbox.run("test.sh")
    assert sandbox.installed() == ["requirements.txt", "requirements-dev.txt", "package"]
    with (sandbox.root / "requirements-dev.txt").open("a") as file:
        file.write("one-more\n")
    sandbox.run("test.sh")
    assert sandbox.installed() == ["requirements-dev.txt"]


def test_requirements_put_back_after_a_failed_install_are_installed_again(sandbox):
    """pip may have changed packages before it failed, so the old stamp must be gone."""
    sandbox.run("quickstart.sh")
    file = sandbox.root / "requirements.txt"
    text = file.read_text()
    file.write_text(text + "one-more\n")
    sandbox.run("quickstart.sh", STUB_PIP_STATUS="1")
    file.write_text(text)
    sandbox.run("quickstart.sh")
    assert sandbox.installed() == ["requirements.txt"]


def test_moved_repository_is_installed_again(sandbox):
    """An environment kept elsewhere must not go on importing the old checkout."""
    venv = str(sandbox.elsewhere / "venv")
    sandbox.run("quickstart.sh", TLT_JAX_VENV=venv)
    sandbox.root = sandbox.root.rename(sandbox.root.parent / "moved")
    sandbox.run("quickstart.sh", TLT_JAX_VENV=venv)
    assert "package" in sandbox.installed()


def test_failing_pip_names_its_log_and_is_retried(sandbox):
    result = sandbox.run("quickstart.sh", STUB_PIP_STATUS="1")
    log = sandbox.venv / "install-core.log"
    assert result.returncode == 1
    assert str(log) in result.stderr
    assert "pip was here" in result.stderr
    assert "pip was here" in log.read_text()
    assert list(sandbox.venv.glob("*.stamp")) == []
    assert not sandbox.calls("tlt_jax.train")

    assert sandbox.run("quickstart.sh").returncode == 0
    assert sandbox.installed() == ["requirements.txt", "package"]
    assert not sandbox.calls("-m venv")


def test_interrupted_install_is_told_and_retried(sandbox):
    process = sandbox.start("quickstart.sh", STUB_PIP_SECONDS="20")
    log = sandbox.venv / "install-core.log"
    deadline = time.monotonic() + 10
    while not (log.exists() and "pip was here" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "exit status 130 in the step 'Installing core" in stderr
    assert stderr.count("\n") == 1

    assert sandbox.run("quickstart.sh").returncode == 0
    assert sandbox.installed() == ["requirements.txt", "package"]


def test_relative_environment_folder_is_meant_from_the_caller(sandbox):
    assert sandbox.run("quickstart.sh", TLT_JAX_VENV="here").returncode == 0
    assert (sandbox.elsewhere / "here" / "bin" / "python").exists()
    assert not sandbox.venv.exists()


def test_accelerator_adds_its_requirements(sandbox):
    sandbox.run("quickstart.sh", TLT_JAX_ACCELERATOR="tpu")
    assert sandbox.installed() == ["requirements.txt", "requirements-tpu.txt", "package"]
    assert f"--constraint {sandbox.root}/requirements.txt" in sandbox.calls("-tpu.txt")[0]


def test_unknown_accelerator(sandbox):
    result = sandbox.run("quickstart.sh", TLT_JAX_ACCELERATOR="cuda")
    assert_one_sentence(result, "TLT_JAX_ACCELERATOR is 'cuda'", "gpu, tpu or unset")


@pytest.mark.parametrize(
    ("workdir", "wanted"),
    [
        (None, "{root}/runs/quickstart"),
        ("mine", "{elsewhere}/mine"),
        ("/abs/mine", "/abs/mine"),
    ],
)
def test_quickstart_trains_from_any_folder(sandbox, workdir, wanted):
    variables = {} if workdir is None else {"WORKDIR": workdir}
    result = sandbox.run("quickstart.sh", "--config.steps=2", **variables)
    assert result.returncode == 0, result.stderr
    workdir = wanted.format(root=sandbox.root, elsewhere=sandbox.elsewhere)
    assert sandbox.calls("tlt_jax.train") == [
        "python -m tlt_jax.train --config=configs/quickstart.py "
        f"--workdir={workdir} --config.steps=2"
    ]
    assert f"trained in {sandbox.root}\n" in result.stdout
    assert f"{workdir}/summary.md" in result.stdout
    assert f"{workdir}/plots/" in result.stdout


def test_workdir_that_is_no_folder(sandbox):
    result = sandbox.run("quickstart.sh", WORKDIR="gs://b/mine")
    assert_one_sentence(result, "WORKDIR is 'gs://b/mine'", "must be a folder")
    assert not sandbox.calls("tlt_jax.train")


def test_failing_training_is_told(sandbox):
    result = sandbox.run("quickstart.sh", STUB_TRAIN_STATUS="3")
    assert result.returncode == 3
    assert result.stderr.count("\n") == 1
    assert "exit status 3 in the step 'Training in" in result.stderr
    assert "summary.md" not in result.stdout


def test_a_gpu_machine_is_checked_from_training_to_benchmark(sandbox):
    write_script(sandbox.path_folder / "nvidia-smi", "#!/usr/bin/env bash\necho 'H200, 570'\n")
    result = sandbox.run("gpu.sh", "--config.num_steps=2", WORKDIR="mine")
    assert result.returncode == 0, result.stderr
    assert sandbox.installed() == ["requirements.txt", "requirements-gpu.txt", "package"]
    given = f"--config=configs/quickstart.py:gpu --workdir={sandbox.elsewhere}/mine"
    training, benchmark = sandbox.calls("-m (pytest|tlt_jax)")
    assert training == f"python -m tlt_jax.train {given} --config.num_steps=2"
    start, parts, end = re.split(r"--config.benchmark.parts=\((.*)\) ", benchmark)
    assert start + end == f"python -m tlt_jax.benchmark {given} --config.num_steps=2"
    # Training on idle slices takes two slices, and this is one device.
    named = {name.strip("'") for name in parts.split(",")}
    assert named == set(PARTS) - {"training"}


def test_a_cuda_that_an_environment_brings_is_kept(sandbox):
    write_script(sandbox.path_folder / "nvidia-smi", "#!/usr/bin/env bash\necho 'H100, 580'\n")
    result = sandbox.run("gpu.sh", STUB_PACKAGES="jax-cuda13-pjrt==0.11.2")  # no plugin of JAX
    assert "requirements-gpu.txt" in sandbox.installed()
    # What these scripts have installed themselves follows the requirements.
    result = sandbox.run("gpu.sh", STUB_PACKAGES="jax-cuda12-plugin==0.10.2")
    assert result.returncode == 0 and "Keeping" not in result.stdout
    (sandbox.venv / "install-gpu.stamp").unlink()
    result = sandbox.run("gpu.sh", STUB_PACKAGES="jax-cuda13-plugin==0.11.2")
    assert result.returncode == 0, result.stderr
    assert f"Keeping the JAX for CUDA that is in {sandbox.venv}" in result.stdout
    assert "requirements-gpu.txt" not in sandbox.installed()


def test_a_machine_without_a_gpu_is_told_before_anything_is_installed(sandbox):
    write_script(sandbox.path_folder / "nvidia-smi", SHIM_WITH_NOTHING_BEHIND_IT)
    result = sandbox.run("gpu.sh")
    assert result.returncode == 1
    assert result.stderr.endswith("run launch/quickstart.sh on a machine without one.\n")
    assert not sandbox.venv.exists()


def test_every_check_runs(sandbox):
    result = sandbox.run("test.sh")
    assert result.returncode == 0, result.stderr
    ran = [
        line.removeprefix("Running: ") for line in result.stdout.splitlines() if "Running" in line
    ]
    assert ran == CHECKS
    for check in CHECKS:
        assert sandbox.calls(f"^{re.escape(check)}$")


def test_failing_check_fails_the_verdict_but_not_the_other_checks(sandbox):
    result = sandbox.run("test.sh", STUB_MYPY_STATUS="2")
    assert_one_sentence(result, "1 of the checks failed: mypy.")
    assert "mypy failed (exit status 2)" in result.stdout
    assert "All checks passed" not in result.stdout
    assert sandbox.calls("^pytest")


def test_arguments_go_to_pytest_alone(sandbox):
    result = sandbox.run("test.sh", "-k", "sampling", "-m", "slow or not slow")
    assert result.returncode == 0, result.stderr
    assert sandbox.calls("^pytest") == [f"{PYTEST} -k sampling -m slow or not slow"]
    assert not sandbox.calls("^(ruff|mypy|lint-imports)")


def requirements(name: str) -> dict[str, str]:
    """Name (in small letters, with its extra) to version range of one requirement file."""
    lines = (REPO / name).read_text().splitlines()
    found = [
        re.fullmatch(r"([\w\[\]-]+)(\S+)", line) for line in lines if line[:1] not in ("", "#")
    ]
    assert all(found), f"{name} holds a line that is no `name>=lower,<upper`."
    return {match[1].lower(): match[2] for match in found if match}


def test_every_requirement_has_both_bounds():
    for path in REPO.glob("requirements*.txt"):
        for package, versions in requirements(path.name).items():
            assert re.fullmatch(r">=[\d.]+,<[\d.]+", versions), f"{path.name}: {package}{versions}"


def test_accelerators_take_the_jax_of_the_core():
    core = requirements("requirements.txt")
    assert requirements("requirements-gpu.txt") == {"jax[cuda12]": core["jax"]}
    assert requirements("requirements-tpu.txt") == {"jax[tpu]": core["jax"]}


def test_core_leaves_out_other_frameworks():
    assert not {"tensorflow", "torch", "torchvision"} & set(requirements("requirements.txt"))


def test_pyproject_reads_its_versions_from_the_requirement_files():
    pyproject = tomllib.loads((REPO / "pyproject.toml").read_text())
    assert not {"dependencies", "optional-dependencies"} & set(pyproject["project"])
    dynamic = pyproject["tool"]["setuptools"]["dynamic"]
    assert dynamic["dependencies"]["file"] == ["requirements.txt"]
    extras = {name: entry["file"] for name, entry in dynamic["optional-dependencies"].items()}
    files = {path.name for path in REPO.glob("requirements-*.txt")}
    assert extras == {re.sub(r"requirements-|\.txt", "", file): [file] for file in files}
