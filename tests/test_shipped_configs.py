"""The configs of this repository: each one is valid, and its warm start fits its model."""

import dataclasses
import importlib.util
import pathlib

import pytest

from tlt_jax import command_line, setup, staleness

REPO = pathlib.Path(__file__).resolve().parent.parent
SHIPPED = [
    ("quickstart", ""),
    ("quickstart", "tiny"),
    ("quickstart", "gpu"),
    ("countdown", ""),
    ("experiments/drafter_staleness", ""),
]


def load(name: str, variant: str):
    path = REPO / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


def test_every_config_file_is_tested_here():
    configs = REPO / "configs"
    names = {str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.py")}
    assert names == {name for name, _ in SHIPPED}


@pytest.mark.parametrize(("name", "variant"), SHIPPED)
def test_config_is_valid_and_its_warm_start_fits(name, variant):
    config = command_line.parse(load(name, variant))
    committed = config.warm_start_dir.startswith("configs/")
    made_here = str(REPO / config.warm_start_dir) if committed else ""
    config = dataclasses.replace(config, warm_start_dir=made_here)
    assert setup.initial_policy(config)["embed"].shape == (
        config.policy.vocab_size,
        config.policy.width,
    )
    assert setup.initial_drafter(config)["norm"].shape == (config.policy.width,)


def test_the_experiment_can_be_run():
    staleness.check(command_line.parse(load("experiments/drafter_staleness", "")))


def test_committed_warm_start_is_small():
    files = (REPO / "configs" / "warm_start").rglob("*.safetensors")
    assert 0 < sum(path.stat().st_size for path in files) < 16e6


def test_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="no variant 'gpus'; it has 'tiny' and 'gpu'"):
        load("quickstart", "gpus")
