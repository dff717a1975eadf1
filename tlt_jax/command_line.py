"""What all command lines share: flags, the config file, devices, the workdir, one-line errors."""

import functools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_dict, config_flags

from tlt_jax import config as config_lib
from tlt_jax import validation
from tlt_jax.types import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, with an optional variant: configs/quickstart.py:tiny."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, logs and plots go.")
PLATFORM = flags.DEFINE_enum(
    "platform", None, ["cpu", "gpu", "tpu"], "What to run on; else what JAX chooses."
)

BACKENDS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # as JAX calls them


def start(
    argv: list[str],
    *,
    slices: Callable[[config_lib.RunConfig], int] = lambda config: config.mesh.slices,
) -> tuple[config_lib.RunConfig, pathlib.Path]:
    """Validated config and a writable workdir; also sets up the devices the config asks for.

    `slices(config)` says how many slices the largest mesh has that will be made.

    Raises:
      UserError: a stray argument, a missing flag, a bad config, a platform that is not here, or a
        workdir that cannot be used.
    """
    if len(argv) > 1:
        raise UserError(f"unexpected argument '{argv[1]}'; flags look like --config.seed=1.")
    if CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/quickstart.py.")
    if not WORKDIR.value:
        raise UserError("--workdir is missing; for example --workdir=runs/quickstart.")
    config = parse(CONFIG.value)
    count = slices(config) * config.mesh.tensor
    if (PLATFORM.value or os.environ.get("JAX_PLATFORMS") or "cpu") == "cpu":
        set_up_host_devices(count, one_core_each=config.mesh.one_core_per_slice)
    if PLATFORM.value:
        use_platform(PLATFORM.value)
    multiply_in_full(config.policy.dtype)
    return config, usable_workdir(WORKDIR.value)


def parse(values: config_dict.ConfigDict) -> config_lib.RunConfig:
    """The validated frozen config of a `ConfigDict`."""
    try:
        plain = _plain(values, "config")
    except OSError as error:  # a config file that cannot be read shows only when it is used
        raise UserError(f"--config: {_one_line(error)}") from error
    return validation.validate(config_lib.from_mapping(config_lib.RunConfig, plain))


def _plain(values: config_dict.ConfigDict, where: str) -> dict[str, Any]:
    """Nested dicts of a `ConfigDict`, references followed."""
    found = {}
    for key in values.keys():  # noqa: SIM118 (a config that failed to load has no iterator)
        try:
            value = values[key]
        except config_dict.RequiredValueError as error:
            name = f"{where}.{key}"
            raise UserError(f"{name} has no value; set it with --{name}=VALUE.") from error
        nested = isinstance(value, config_dict.ConfigDict)
        found[key] = _plain(value, f"{where}.{key}") if nested else value
    return found


def set_up_host_devices(count: int, *, one_core_each: bool) -> None:
    """Makes `count` CPU devices; must run before JAX starts its backend.

    With `one_core_each`, XLA runs each device's matmuls on one thread, so that slices are
    comparable and an idle slice does not lend its core to its neighbour.
    """
    jax.config.update("jax_num_cpu_devices", count)
    if one_core_each:
        given = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{given} --xla_cpu_multi_thread_eigen=false".strip()


def use_platform(platform: str) -> None:
    """Starts JAX's backend for a platform, which may be another than JAX would choose.

    Raises:
      UserError: JAX has none for this platform here.
    """
    jax.config.update("jax_platforms", BACKENDS[platform])
    try:
        jax.devices()
    except RuntimeError as error:
        raise UserError(
            f"--platform={platform}: JAX finds no such device here ({_one_line(error)[:-1]}); "
            f"install requirements-{platform}.txt on a machine that has one, or leave the flag out."
        ) from error


def multiply_in_full(dtype: str) -> None:
    """Makes an accelerator multiply the float32 matrices of a float32 policy in float32.

    It would round their entries, to TF32 on a GPU and to bfloat16 on a TPU, and its tokens would
    part further from those of other row counts than the bound on near-ties says. A precision that
    JAX was told, by `JAX_DEFAULT_MATMUL_PRECISION`, is kept.
    """
    told = jax.config.values["jax_default_matmul_precision"] is not None
    if dtype == "float32" and jax.default_backend() != "cpu" and not told:
        jax.config.update("jax_default_matmul_precision", "highest")


def usable_workdir(path: str) -> pathlib.Path:
    """Makes the workdir if it is missing.

    Raises:
      UserError: it is not a folder, or cannot be made or written.
    """
    workdir = pathlib.Path(path).expanduser()
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir={workdir} is a file; give a folder.")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir} cannot be made ({error.strerror}); give a folder you may write."
        ) from error
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise UserError(f"--workdir={workdir} is not writable; give a folder you may write.")
    return workdir


def run(
    main: Callable[[list[str]], None],
    *,
    rewrite: Callable[[list[str]], list[str]] = lambda argv: argv,
) -> None:
    """Parses flags and runs `main(argv)`; bad input is one sentence on stderr, exit status 2.

    `rewrite` makes the arguments that are parsed from those that were given.
    """

    def parse_flags(argv: list[str]) -> list[str]:
        return _flags(rewrite(argv))

    guarded = functools.partial(_guarded, parse_flags)
    app.run(functools.partial(_guarded, main), flags_parser=guarded)


def _guarded(function: Callable[[list[str]], Any], argv: list[str]) -> Any:
    try:
        return function(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _flags(argv: list[str]) -> list[str]:
    """Arguments that are no flags.

    Raises:
      UserError: an unknown flag or config key, a value of the wrong type, or a config file that is
        missing or knows no such variant.
    """
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        raise UserError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    told = error.args[0] if error.args and isinstance(error.args[0], str) else str(error)
    return " ".join(told.split()).rstrip(".") + "."
