"""From a task to arrays: prepared data on disk, endless shuffled prompts, packed demonstrations.

`prompt_dataset(...)[i]` is a function of `i` alone, so a run that resumes at step s reads exactly
the prompts that it would have read without the stop.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np
import tensorflow_datasets as tfds

from tlt_jax.tasks.builder import NUM_TEST, NUM_TRAIN, TaskBuilder
from tlt_jax.tasks.task import Task, unknown_name
from tlt_jax.types import INVALID, UserError


class Source(Protocol):
    """Random access to examples {"prompt": bytes, "demonstration": bytes}."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, bytes]: ...

    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, bytes]]: ...


def load_source(
    task: Task,
    mix: str,
    split: str,
    data_dir: str,
    *,
    num_train: int = NUM_TRAIN,
    num_test: int = NUM_TEST,
) -> Source:
    """Returns the examples of `split`, making the dataset under `data_dir` when it is missing.

    The dataset is written to a temporary directory that is renamed when complete: a process that
    dies or races with another one leaves no half-written dataset behind.

    Args:
      task: where the examples come from.
      mix: name of one of the task's difficulty mixes.
      split: "train" or "test"; no prompt is in both.
      data_dir: root directory of prepared datasets, `~` allowed; a prepared one may be read-only.
      num_train: examples in the training split.
      num_test: examples in the test split. Each pair of sizes is a dataset of its own.

    Raises:
      UserError: the mix or the split does not exist, or `data_dir` cannot be written.
    """
    configs = {config.name: config for config in task.builder_cls.BUILDER_CONFIGS}
    if mix not in configs:
        raise UserError(unknown_name(f"mix of the task {task.name!r} called", mix, configs))
    if split not in ("train", "test"):
        raise UserError(unknown_name("split", split, ("train", "test")))
    config = configs[mix].resized(num_train=num_train, num_test=num_test)
    data_dir = os.path.expanduser(data_dir)

    def make_builder() -> TaskBuilder:
        return task.builder_cls(config=config, data_dir=data_dir, file_format="array_record")

    builder = make_builder()
    if not builder.is_prepared():
        tfds.disable_progress_bar()  # bars of a job of two seconds would only garble logs
        try:
            builder.download_and_prepare()
        except OSError as error:
            builder = make_builder()
            # Another process may have finished first: then its identical dataset is used.
            if not builder.is_prepared():
                raise UserError(
                    f"cannot write the dataset {task.name}/{config.name} under data_dir "
                    f"{data_dir!r} ({error.strerror or error}); name a writable directory."
                ) from error
    return builder.as_data_source(split)


def prompt_dataset(source: Source, task: Task, *, seed: int) -> grain.MapDataset:
    """Endless shuffled prompts with random access; every epoch has an order of its own.

    Args:
      source: examples, from `load_source`.
      task: the task of these examples.
      seed: in [0, 2**32); seeds that differ by less than the number of epochs share epoch orders.

    Returns:
      A dataset of {"prompt": str, "prompt_ids": [T] int32, the leading bos included}; element i
      depends on `i` and `seed` alone.
    """
    tokenizer = task.tokenizer

    def to_prompt(example: dict[str, bytes]) -> dict[str, Any]:
        prompt = example["prompt"].decode()
        ids = np.array([tokenizer.bos_id, *tokenizer.encode(prompt)], np.int32)
        return {"prompt": prompt, "prompt_ids": ids}

    return grain.MapDataset.source(source).shuffle(seed=seed).map(to_prompt).repeat()


def pack_demonstrations(
    source: Source, task: Task, *, seed: int, row_length: int
) -> dict[str, np.ndarray]:
    """Packs one epoch of demonstrations into rows, first fit in shuffled order.

    A segment is `bos prompt response eos`. For R rows of W = `row_length` tokens:

    Returns:
      tokens: [R, W] int32, pad_id where empty.
      segment_ids: [R, W] int32, 0, 1, ... along each row, -1 where empty.
      positions: [R, W] int32, counting from 0 in each segment.
      loss_mask: [R, W] float32, 1 on response tokens and their eos. Index i is about token i as a
        target, so the loss pairs `loss_mask[:, 1:]` with the logits at `[:, :-1]`.

    Raises:
      UserError: a demonstration is longer than a row.
    """
    order = np.random.default_rng(seed).permutation(len(source)).tolist()
    segments = [_segment(example, task) for example in source.__getitems__(order)]
    lengths = [len(prompt) + len(response) for prompt, response in segments]
    if max(lengths, default=0) > row_length:
        raise UserError(
            f"row_length is {row_length}, but the longest demonstration of the task "
            f"{task.name!r} has {max(lengths)} tokens; row_length must be at least that."
        )
    places = _first_fit(lengths, row_length)
    num_rows = max((row + 1 for row, _, _ in places), default=0)
    shape = (num_rows, row_length)
    packed = {
        "tokens": np.full(shape, task.tokenizer.pad_id, np.int32),
        "segment_ids": np.full(shape, INVALID, np.int32),
        "positions": np.zeros(shape, np.int32),
        "loss_mask": np.zeros(shape, np.float32),
    }
    for (prompt, response), length, (row, start, segment) in zip(
        segments, lengths, places, strict=True
    ):
        where = (row, slice(start, start + length))
        packed["tokens"][where] = prompt + response
        packed["segment_ids"][where] = segment
        packed["positions"][where] = np.arange(length)
        packed["loss_mask"][row, start + len(prompt) : start + length] = 1.0
    return packed


def _segment(example: dict[str, bytes], task: Task) -> tuple[list[int], list[int]]:
    """Ids of `bos prompt` and of `response eos`."""
    tokenizer = task.tokenizer
    prompt = tokenizer.encode(example["prompt"].decode())
    response = tokenizer.encode(example["demonstration"].decode())
    return [tokenizer.bos_id, *prompt], [*response, tokenizer.eos_id]


def _first_fit(lengths: Sequence[int], row_length: int) -> list[tuple[int, int, int]]:
    """(row, start, index within the row) of each length: the first row with room takes it."""
    used = np.zeros(len(lengths), np.int64)  # one row each is always enough
    counts = np.zeros(len(lengths), np.int64)
    num_rows = 0
    places = []
    for length in lengths:
        row = int(np.argmax(used[: num_rows + 1] + length <= row_length))
        num_rows = max(num_rows, row + 1)
        places.append((row, int(used[row]), int(counts[row])))
        used[row] += length
        counts[row] += 1
    return places
