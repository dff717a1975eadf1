"""How long a drafter microbatch takes, measured once per run for the reports.

Nothing is decided from it: an idle slice's microbatches are priced in rounds, by configuration.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax import sharding
from tlt_jax.buffer import DrafterBuffer
from tlt_jax.ngram import Library
from tlt_jax.programs import RolloutPrograms
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
    kind = programs.kind(bucket, programs.arms(bucket)[0], training=True)
    buffer = dataclasses.replace(buffer, filled=jnp.ones_like(buffer.filled))

    def timed(microbatches: int) -> float:
        orders = programs.orders(kind.strategy, rounds=microbatches * kind.block, index=0)
        copied = jax.tree.map(lambda x: x.copy(), (state, buffer, library, rows))
        arguments = (target, *copied[:3], sampler, orders, copied[3])
        program = programs.chunk_program(kind, jax.block_until_ready(arguments))
        start = time.monotonic()
        jax.block_until_ready(program(*arguments))
        return time.monotonic() - start

    timed(MICROBATCHES)
    pairs = [(timed(MICROBATCHES), timed(0)) for _ in range(REPEATS)]
    return max(float(np.median([full - empty for full, empty in pairs])) / MICROBATCHES, 0.0)
