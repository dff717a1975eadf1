"""The command line as a user meets it: one sentence, exit status 2, and never a traceback."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import pytest
from ml_collections import config_dict

from tlt_jax import command_line
from tlt_jax.config import RunConfig
from tlt_jax.types import UserError

REPO = pathlib.Path(__file__).resolve().parent.parent

PROGRAM = """
from tlt_jax import command_line

def main(argv):
    config, workdir = command_line.start(argv)
    import jax
    print(config.rollout.temperature, workdir, jax.device_count())

command_line.run(main)
"""

CONFIG = """
import dataclasses
from ml_collections import config_dict
from tlt_jax.config import RunConfig

def get_config(variant=""):
    config = config_dict.ConfigDict(dataclasses.asdict(RunConfig()))
    if variant == "unset":
        config.seed = config_dict.placeholder(int)
    return config
"""


@pytest.fixture
def run(tmp_path):
    """Function (*arguments) -> finished process of a command line, run in `tmp_path`."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "config.py").write_text(CONFIG)

    def start(*arguments):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(REPO)}
        environment.pop("XLA_FLAGS", None)
        return subprocess.run(
            [sys.executable, "program.py", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    return start


def test_a_platform_can_be_asked_for(run, tmp_path):
    done = run("--config=config.py", f"--workdir={tmp_path}/new", "--platform=cpu")
    assert done.returncode == 0, done.stderr
    said = _one_sentence(run("--config=config.py", f"--workdir={tmp_path}/no", "--platform=tpu"))
    assert said.startswith("error: --platform=tpu: JAX finds no such device here (")
    assert not (tmp_path / "no").exists()
    said = _one_sentence(run("--config=config.py", f"--workdir={tmp_path}/no", "--platform=npu"))
    assert "npu" in said and "cpu|gpu|tpu" in said


@pytest.mark.parametrize(
    "backend,dtype,told,expected",
    [
        ("gpu", "float32", None, "highest"),
        ("tpu", "float32", None, "highest"),
        ("gpu", "float32", "tensorfloat32", "tensorfloat32"),
        ("gpu", "bfloat16", None, None),
        ("cpu", "float32", None, None),
    ],
)
def test_an_accelerator_multiplies_float32_in_full(monkeypatch, backend, dtype, told, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    before = jax.config.jax_default_matmul_precision
    try:
        jax.config.update("jax_default_matmul_precision", told)
        command_line.multiply_in_full(dtype)
        assert jax.config.jax_default_matmul_precision == expected
    finally:
        jax.config.update("jax_default_matmul_precision", before)


def test_a_command_line_on_an_accelerator_does_so(run, tmp_path):
    program = PROGRAM.replace("jax.device_count()", "jax.config.jax_default_matmul_precision")
    pretence = "import jax\njax.default_backend = lambda: 'gpu'\n"
    (tmp_path / "program.py").write_text(pretence + program)
    done = run("--config=config.py", f"--workdir={tmp_path}/new")
    assert done.stdout.split()[-1] == "highest", done.stderr


def _one_sentence(done):
    assert "Traceback" not in done.stderr, done.stderr
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def test_a_sound_command_line(run, tmp_path):
    done = run(
        "--config=config.py",
        "--config.rollout.temperature=0.5",
        "--config.mesh.slices=4",
        "--config.learner.microbatch_rows=4",
        f"--workdir={tmp_path}/runs/new",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0.5", f"{tmp_path}/runs/new", "4"]  # four slices, four devices
    assert (tmp_path / "runs" / "new").is_dir()


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("--config.rolout.temperature=1", "rollout"),
        ("--config.rollout.temperatur=1", "temperature"),
    ],
)
def test_a_misspelt_key_names_the_nearest(run, tmp_path, override, nearest):
    sentence = _one_sentence(run("--config=config.py", override, f"--workdir={tmp_path}/w"))
    assert f"'{nearest}'" in sentence or f'"{nearest}"' in sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=config.py", "--config.mesh.tensor=3"], ["config.mesh.tensor=3"]),
        (["--config=config.py:unset"], ["config.seed has no value", "--config.seed=VALUE"]),
        (["--config=nothing.py"], ["nothing.py"]),
        ([], ["--config is missing"]),
        (["--config=config.py", "stray"], ["'stray'", "--config.seed=1"]),
    ],
)
def test_a_bad_command_line_is_told_in_a_sentence(run, tmp_path, arguments, words):
    sentence = _one_sentence(run(*arguments, f"--workdir={tmp_path}/w"))
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--config.rollout.temperature=hot", ["--config.rollout.temperature=hot", "float"]),
        ("--workdr=here", ["'workdr'", "workdir"]),
    ],
)
def test_what_absl_cannot_read_is_told_by_absl(run, argument, words):
    done = run("--config=config.py", argument)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert all(word in done.stderr.splitlines()[0] for word in words), done.stderr


def test_a_missing_workdir_flag_is_told_in_a_sentence(run):
    assert "--workdir is missing" in _one_sentence(run("--config=config.py"))


def _default(**changes):
    config = config_dict.ConfigDict(dataclasses.asdict(RunConfig()))
    config.update(changes)
    return config


def test_the_config_file_and_the_dataclass_say_the_same():
    assert command_line.parse(_default()) == RunConfig()


@pytest.mark.parametrize(
    "placeholder", [config_dict.placeholder(int), config_dict.required_placeholder(int)]
)
def test_an_unset_placeholder_fails(placeholder):
    config = _default()
    del config.seed
    config.seed = placeholder
    with pytest.raises(UserError, match=r"config\.seed has no value"):
        command_line.parse(config)


def test_a_reference_between_keys_follows_its_origin():
    config = _default()
    config.learner.row_length = config.drafter.get_ref("row_length")
    config.drafter.row_length = 640
    assert command_line.parse(config).learner.row_length == 640


def test_parse_validates():
    config = _default()
    config.rollout.group_size = 1
    with pytest.raises(UserError, match=r"config\.rollout\.group_size"):
        command_line.parse(config)


def test_a_workdir_is_made_or_taken(tmp_path):
    for path in (tmp_path / "a" / "b", tmp_path / "a" / "b", tmp_path):
        assert command_line.usable_workdir(str(path)) == path
        assert path.is_dir()


def test_a_workdir_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command_line.usable_workdir("~/runs") == tmp_path / "runs"


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        command_line.usable_workdir(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be made \(.*\); give a folder"):
        command_line.usable_workdir(str(tmp_path / "file" / "below"))


def test_a_workdir_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(UserError, match="is not writable; give a folder"):
        command_line.usable_workdir(str(tmp_path))


def test_a_workdir_that_cannot_be_made(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be made \(Permission denied\)"):
        command_line.usable_workdir(str(tmp_path / "new"))


def test_other_errors_are_not_hidden():
    def broken(_):
        raise ValueError("a defect of the program")

    with pytest.raises(ValueError, match="a defect of the program"):
        command_line._guarded(broken, [])
