"""Versions of the drafter on disk: what is written, what is kept, and that nobody waits for it."""

import threading

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tlt_jax import drafter_versions, weights
from tlt_jax.config import CheckpointConfig
from tlt_jax.drafter_versions import DrafterVersions
from tlt_jax.spot_training import DrafterState

CONFIG = CheckpointConfig(keep=2)


def _state(version):
    return DrafterState({"norm": jnp.full(3, float(version))}, None, jnp.int32(version))


def _saved(workdir, *numbers):
    versions = DrafterVersions(workdir, CONFIG)
    for number in numbers:
        versions.save(_state(number))
    versions.close()
    names = sorted(path.name for path in (workdir / "drafter").iterdir())
    assert names.pop(0) == "drafter.safetensors"
    return [int(name.removeprefix("version_").removesuffix(".safetensors")) for name in names]


def test_the_newest_are_kept_and_the_newest_again_under_a_name_of_its_own(tmp_path):
    assert _saved(tmp_path, 3, 8, 11) == [8, 11]
    for name, number in (("version_00000008", 8.0), ("version_00000011", 11.0), ("drafter", 11.0)):
        held = load_file(tmp_path / "drafter" / f"{name}.safetensors")
        np.testing.assert_array_equal(held["norm"], np.full(3, number, np.float32))


def test_a_run_that_goes_on_from_an_earlier_version_replaces_later_ones(tmp_path):
    assert _saved(tmp_path, 3, 8, 11) == [8, 11]
    assert _saved(tmp_path, 5) == [5]
    assert load_file(tmp_path / "drafter" / "drafter.safetensors")["norm"][0] == 5


def test_the_run_goes_on_while_a_version_is_written(tmp_path, monkeypatch):
    """And what it writes is what the drafter was, whatever becomes of its arrays."""
    allowed, write = threading.Event(), weights.save

    def slow(*arguments, **options):
        assert allowed.wait(20)
        write(*arguments, **options)

    monkeypatch.setattr(drafter_versions.weights, "save", slow)
    versions, state = DrafterVersions(tmp_path, CONFIG), _state(7)
    versions.save(state)
    for array in (state.params["norm"], state.version):
        array.delete()  # as donating it to the next step does
    assert not (tmp_path / "drafter").exists()
    allowed.set()
    versions.close()
    assert load_file(tmp_path / "drafter" / "drafter.safetensors")["norm"][0] == 7


def test_what_goes_wrong_on_the_thread_is_raised(tmp_path):
    (tmp_path / "drafter").write_text("a file where the folder should be")
    versions = DrafterVersions(tmp_path, CONFIG)
    versions.save(_state(1))
    with pytest.raises(OSError, match="drafter"):
        versions.save(_state(2))
