"""Packs finished responses into rows for the policy update; host side, numpy only.

Axes: M microbatches, R rows per microbatch, W row length.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tlt_jax.types import INVALID


class PackedBatch(NamedTuple):
    """Rows of several sequences, on the host or on devices.

    Entry i of a row speaks of token i as a *target*.
    """

    tokens: Any  # [M, R, W] int32
    positions: Any  # [M, R, W] int32, restarting with each segment
    segment_ids: Any  # [M, R, W] int32, INVALID where empty
    behaviour: Any  # [M, R, W] float32, log-probability when sampled
    advantages: Any  # [M, R, W] float32
    weights: Any  # [M, R, W] float32, summing to one over the batch; 0 on prompts


def token_weights(lengths: Sequence[int], aggregation: str) -> np.ndarray:
    """Weight of each response token, one number per sequence.

    "token" weighs all tokens of the batch alike (DAPO, arXiv 2503.14476); "sequence" takes the
    mean of each response first, then of the responses (GRPO, arXiv 2402.03300).
    """
    count = np.asarray(lengths, np.float32)
    if aggregation == "token":
        return np.full(len(count), 1.0 / count.sum(), np.float32)
    return (1.0 / (len(count) * count)).astype(np.float32)


def first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Sequence indices of each row: longest first, each to the first row with room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for row, left in enumerate(room):
            if lengths[index] <= left:
                rows[row].append(index)
                room[row] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(row_length - lengths[index])
    return rows


def empty_batch(microbatches: int, rows: int, row_length: int) -> PackedBatch:
    """Microbatches that hold nothing."""
    shape = (microbatches, rows, row_length)
    return PackedBatch(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segment_ids=np.full(shape, INVALID, np.int32),
        behaviour=np.zeros(shape, np.float32),
        advantages=np.zeros(shape, np.float32),
        weights=np.zeros(shape, np.float32),
    )


def pack(
    tokens: Sequence[np.ndarray],
    prompt_lengths: Sequence[int],
    behaviour: Sequence[np.ndarray],
    advantages: Sequence[float],
    *,
    aggregation: str,
    row_length: int,
    rows: int,
) -> PackedBatch:
    """Packs whole sequences (prompt and response) into microbatches of `rows` rows.

    Args:
      tokens: token ids of each sequence, [length].
      prompt_lengths: leading tokens that are prompt.
      behaviour: log-probabilities of each sequence's tokens, [length].
      advantages: one per sequence.
      aggregation: "token" or "sequence".
      row_length: W; at least the longest sequence.
      rows: R.
    """
    responses = [len(t) - p for t, p in zip(tokens, prompt_lengths, strict=True)]
    per_token = token_weights(responses, aggregation)
    plan = first_fit([len(t) for t in tokens], row_length)
    batch = empty_batch(-(-len(plan) // rows), rows, row_length)
    flat = PackedBatch(*(x.reshape(-1, row_length) for x in batch))  # views of `batch`
    for row, members in enumerate(plan):
        start = 0
        for index in members:
            length = len(tokens[index])
            here = slice(start, start + length)
            flat.tokens[row, here] = tokens[index]
            flat.positions[row, here] = np.arange(length)
            flat.segment_ids[row, here] = index
            flat.behaviour[row, here] = behaviour[index]
            flat.advantages[row, here] = advantages[index]
            flat.weights[row, start + prompt_lengths[index] : start + length] = per_token[index]
            start += length
    return batch


def pad_microbatches(batch: PackedBatch, count: int) -> PackedBatch:
    """Lengthens the microbatch axis to `count`, so that every step has the same shapes."""
    missing = count - batch.tokens.shape[0]
    return PackedBatch(*(np.pad(x, [(0, missing), (0, 0), (0, 0)]) for x in batch))


def most_microbatches(sequences: int, longest: int, row_length: int, rows: int) -> int:
    """Microbatches that any batch of `sequences` of up to `longest` tokens fits into.

    First fit leaves at most one row less than half full, so 2 x tokens / W rows suffice; whole
    sequences per row bound it from the other side.
    """
    per_row = row_length // longest
    by_count = -(-sequences // per_row)
    by_tokens = 2 * sequences * longest // row_length + 1
    return -(-min(by_count, by_tokens) // rows)
