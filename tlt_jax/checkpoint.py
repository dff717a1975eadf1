"""Checkpoints of a whole run with orbax: written in the background, restored exactly.

One checkpoint holds everything that the next step depends on: policy, optimizer, reference,
drafter, its optimizer and data buffer, and a small record (step, seed, controller state). Sampling
keys and the data position follow from seed and step.
"""

import json
import logging
import pathlib
import zlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from tlt_jax.config import CheckpointConfig
from tlt_jax.program_pool import abstract
from tlt_jax.types import UserError


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a checksum: in JSON a flipped bit is as good a number as any."""
    content = json.dumps(record)
    return {"content": content, "crc32": zlib.crc32(content.encode())}


def _opened(sealed: dict[str, Any]) -> dict[str, Any]:
    """Undoes `_sealed`; raises ValueError or KeyError if it is damaged."""
    if zlib.crc32(sealed["content"].encode()) != sealed["crc32"]:
        raise ValueError("the record does not match its checksum")
    record: dict[str, Any] = json.loads(sealed["content"])
    return record


class Checkpoints:
    """The checkpoints of one workdir, `checkpoints/STEP/`."""

    def __init__(self, workdir: pathlib.Path, config: CheckpointConfig):
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._folder = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=config.keep, enable_async_checkpointing=True
            ),
        )

    def latest(self) -> int | None:
        """Steps done at the newest complete checkpoint, None without one."""
        return self._manager.latest_step()

    def save(self, steps_done: int, arrays: Any, record: dict[str, Any]) -> None:
        """Begins to write a checkpoint; the arrays are copied before this returns."""
        self._manager.save(
            steps_done,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(_sealed(record))
            ),
        )

    def restore(self, steps_done: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Arrays with the shapes and shardings of `like`, and the record.

        Raises:
          UserError: the checkpoint is damaged or of another configuration.
        """
        try:
            restored = self._manager.restore(
                steps_done,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardRestore(abstract(like)),
                    record=ocp.args.JsonRestore(),
                ),
            )
            record = _opened(restored.record)
        except (ValueError, KeyError, OSError, json.JSONDecodeError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error) else repr(error)
            raise UserError(
                f"checkpoint {self._folder / str(steps_done)} cannot be read ({reason}); remove "
                "that folder to go on from the checkpoint before it, or from the start."
            ) from error
        whole = all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored.arrays))
        if not whole or str(jax.tree.structure(restored.arrays)) != str(jax.tree.structure(like)):
            raise UserError(
                f"checkpoint {self._folder / str(steps_done)} cannot be read (it holds other "
                "arrays than this configuration has); remove that folder, or give another "
                "--workdir."
            )
        # A copy: donated buffers must belong to XLA, and restored ones may belong to the reader.
        return jax.tree.map(lambda x: x.copy(), restored.arrays), record

    def wait(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is on disk; nothing can be saved afterwards."""
        self.wait()
        self._manager.close()
