"""How long a drafter microbatch takes, measured once in a process.

For the reports; and for the price of a microbatch, where that is not configured (`budget`).
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import budget as budget_lib
from tlt_jax import sharding
from tlt_jax.budget import Block
from tlt_jax.buffer import DrafterBuffer
from tlt_jax.chunk import ChunkKind
from tlt_jax.ngram import Library
from tlt_jax.programs import RolloutPrograms
from tlt_jax.rollout import Carry
from tlt_jax.speculation import RolloutState
from tlt_jax.spot_training import DrafterState
from tlt_jax.types import INVALID

MICROBATCHES = 4
REPEATS = 3


def synthetic_rows(programs: RolloutPrograms, target: Any, *, live: bool) -> RolloutState:
    """Prefilled rows that fill every slot: with room for a whole response, or all ended."""
    config = programs.rollout
    count = programs.slices * programs.first_rows
    limit = config.max_prompt_length + (config.max_response_length if live else 0)
    batch = (
        np.ones((count, config.max_prompt_length), np.int32),
        np.full(count, config.max_prompt_length if live else 1, np.int32),
        np.full(count, limit, np.int32),
        np.arange(count, dtype=np.int32) if live else np.full(count, INVALID, np.int32),
        np.full(count, INVALID, np.int32),
    )
    return programs.prefill(target, jax.device_put(batch, sharding.per_slice(programs.mesh)))


def time_microbatch(programs: RolloutPrograms, target: Any, carry: Carry) -> tuple[Carry, float]:
    """Seconds of a microbatch, 0 without any, and a carry that knows them if they are prices."""
    if carry.drafter is None or carry.buffer is None:
        return carry, 0.0
    seconds = microbatch_seconds(programs, target, carry.drafter, carry.buffer, carry.library)
    if programs.drafter.rounds_per_microbatch:
        return carry, seconds
    budget = budget_lib.time_microbatch(carry.controller.budget, seconds)
    controller = dataclasses.replace(carry.controller, budget=budget)
    return dataclasses.replace(carry, controller=controller), seconds


def microbatch_seconds(
    programs: RolloutPrograms,
    target: Any,
    state: DrafterState,
    buffer: DrafterBuffer,
    library: Library | None = None,
) -> float:
    """Seconds per microbatch when every slice trains at once: (t[4] - t[0]) / 4, median of 3.

    The chunk program itself is timed, with rows that have all ended; results are thrown away and
    the arguments stay as they are.
    """
    rows = programs.compact(synthetic_rows(programs, target, live=False), 0)
    sampler = programs.sampler(jax.random.key(0), (0,))
    bucket = rows.tokens.shape[0] // programs.slices
    kind = ChunkKind(programs.arms(bucket)[0], training=True)
    buffer = dataclasses.replace(buffer, filled=jnp.ones_like(buffer.filled))

    def timed(microbatches: int) -> float:
        block = Block(rounds=1, microbatches=microbatches)
        orders = programs.orders(kind.strategy, rounds=1, index=0, block=block)
        copied = jax.tree.map(lambda x: x.copy(), (state, buffer, library, rows))
        arguments = (target, *copied[:3], sampler, orders, copied[3])
        program = programs.chunk_program(kind, jax.block_until_ready(arguments))
        start = time.monotonic()
        jax.block_until_ready(program(*arguments))
        return time.monotonic() - start

    timed(MICROBATCHES)
    pairs = [(timed(MICROBATCHES), timed(0)) for _ in range(REPEATS)]
    return max(float(np.median([full - empty for full, empty in pairs])) / MICROBATCHES, 0.0)
