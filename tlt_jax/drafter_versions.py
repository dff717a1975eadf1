"""The drafter on disk while a run goes on: its parameters alone, by version, ready to be used.

A checkpoint (`checkpoint`) holds all that a run needs to go on; this is what others can take while
it runs. Writing happens on a thread: what a step waits for is a copy on the device.
"""

import concurrent.futures
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from tlt_jax import weights
from tlt_jax.config import CheckpointConfig
from tlt_jax.spot_training import DrafterState

NEWEST = "drafter.safetensors"


class DrafterVersions:
    """The files of one workdir: `drafter/version_NUMBER.safetensors`, and the newest one again."""

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig):
        self._folder = workdir / "drafter"
        self._keep = config.keep
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future[None] | None = None

    def save(self, state: DrafterState) -> None:
        """Begins to write a version; the parameters are copied before this returns.

        Versions above it are removed: they are of a run that went on from an earlier checkpoint.
        Raises what went wrong with the one before.
        """
        self.wait()
        if jax.process_index() != 0:
            return
        params = jax.tree.map(jnp.copy, state.params)
        self._writing = self._thread.submit(self._write, params, jnp.copy(state.version))

    def close(self) -> None:
        """Waits until everything is on disk; nothing can be saved afterwards."""
        self.wait()
        self._thread.shutdown()

    def wait(self) -> None:
        """Waits until everything is on disk; raises what went wrong."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def _write(self, params: Any, version: jax.Array) -> None:
        number = int(version)
        path = self._folder / f"version_{number:08d}.safetensors"
        weights.save(path, params, dtype="float32")
        partial = self._folder / f"{NEWEST}.partial"
        shutil.copyfile(path, partial)
        partial.replace(self._folder / NEWEST)
        numbers = sorted(self._numbers())
        redone = [other for other in numbers if other > number]
        for other in redone + numbers[: len(numbers) - len(redone)][: -self._keep]:
            (self._folder / f"version_{other:08d}.safetensors").unlink()

    def _numbers(self) -> list[int]:
        found = (
            re.fullmatch(r"version_(\d+)\.safetensors", p.name) for p in self._folder.iterdir()
        )
        return [int(match[1]) for match in found if match]
