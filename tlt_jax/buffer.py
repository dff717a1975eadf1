"""The drafter's data buffer of one slice: finished sequences, packed into a ring of rows.

It has a budget of memory (`DrafterConfig.buffer_megabytes`). A sequence goes to the current row if
it fits, else to the next row, which is cleared first; so what is dropped first is the oldest row,
whole. A step's longest sequences end last, hence they are the newest entries when the next step
begins: training in that step's early tail sees the long sequences of the step before (one-step-off
sampling) although its own are not finished yet.

Axes: R rows, W row length, F feature width, S sequence length, M microbatch rows.
"""

import jax
import jax.numpy as jnp
from flax import struct

from tlt_jax.config import DrafterConfig, PolicyConfig
from tlt_jax.types import INVALID


@struct.dataclass
class DrafterBuffer:
    """A frozen ring of packed rows."""

    tokens: jax.Array  # [R, W] int32
    features: jax.Array | None  # [R, W, F], target features; None where they are not stored
    segment_ids: jax.Array  # [R, W] int32, INVALID where empty
    positions: jax.Array  # [R, W] int32, restarting with each segment
    row: jax.Array  # [] int32, the row being filled
    used: jax.Array  # [] int32, tokens used of it
    segments: jax.Array  # [] int32, segments ever inserted
    filled: jax.Array  # [] int32, rows that hold anything


@struct.dataclass
class Microbatch:
    """Packed rows, and which part of each is trained; the rest is what that part sees."""

    tokens: jax.Array  # [M, W] int32
    features: jax.Array | None  # [M, W, F]; None where the target has to make them
    segment_ids: jax.Array  # [M, W] int32
    positions: jax.Array  # [M, W] int32
    starts: jax.Array  # [M] int32, the part's first token


def empty(config: DrafterConfig, policy: PolicyConfig) -> DrafterBuffer:
    """A buffer that holds nothing, with as many rows as its budget has room for."""
    shape = (config.buffer_rows(policy), config.row_length)
    width, dtype = policy.feature_width, jnp.dtype(policy.dtype)
    return DrafterBuffer(
        tokens=jnp.zeros(shape, jnp.int32),
        features=jnp.zeros((*shape, width), dtype) if config.store_features else None,
        segment_ids=jnp.full(shape, INVALID, jnp.int32),
        positions=jnp.zeros(shape, jnp.int32),
        row=jnp.int32(0),
        used=jnp.int32(0),
        segments=jnp.int32(0),
        filled=jnp.int32(0),
    )


def insert(
    buffer: DrafterBuffer, tokens: jax.Array, features: jax.Array | None, length: jax.Array
) -> DrafterBuffer:
    """Appends one sequence.

    Args:
      buffer: the ring.
      tokens: [S] int32.
      features: [S, F], h[0] .. h[length - 1] valid; None for a ring that stores none.
      length: [] int32, tokens to store; 0 stores nothing. At most W.
    """
    rows, row_length = buffer.tokens.shape
    fits = buffer.used + length <= row_length
    row = jnp.where(fits, buffer.row, (buffer.row + 1) % rows)
    start = jnp.where(fits, buffer.used, 0)
    index = jnp.arange(row_length) - start  # [W], place in the new segment
    here = (index >= 0) & (index < length)
    source = jnp.clip(index, 0, tokens.shape[0] - 1)
    kept_segments = jnp.where(fits, buffer.segment_ids[row], INVALID)

    def put(whole: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
        chosen = jnp.where(here.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)
        return jax.lax.dynamic_update_index_in_dim(whole, chosen.astype(whole.dtype), row, 0)

    return DrafterBuffer(
        tokens=put(buffer.tokens, tokens[source], buffer.tokens[row]),
        features=jax.tree.map(
            lambda whole, new: put(whole, new[source], whole[row]), buffer.features, features
        ),
        segment_ids=put(
            buffer.segment_ids, jnp.full((row_length,), buffer.segments), kept_segments
        ),
        positions=put(buffer.positions, index, buffer.positions[row]),
        row=row,
        used=start + length,
        segments=buffer.segments + (length > 0),
        filled=jnp.where(length > 0, jnp.maximum(buffer.filled, row + 1), buffer.filled),
    )


def insert_each(
    buffer: DrafterBuffer,
    tokens: jax.Array,
    features: jax.Array | None,
    lengths: jax.Array,
    wanted: jax.Array,
) -> DrafterBuffer:
    """Appends the wanted ones of B rows in order.

    Args:
      buffer: the ring.
      tokens: [B, S] int32.
      features: [B, S, F], or None as of `insert`.
      lengths: [B] int32, tokens to store of each; at most W.
      wanted: [B] bool.
    """

    def more(carry: tuple[DrafterBuffer, jax.Array]) -> jax.Array:
        return jnp.any(carry[1])

    def body(carry: tuple[DrafterBuffer, jax.Array]) -> tuple[DrafterBuffer, jax.Array]:
        ring, left = carry
        row = jnp.argmax(left)
        own = jax.tree.map(lambda x: x[row], features)
        return insert(ring, tokens[row], own, lengths[row]), left.at[row].set(False)

    return jax.lax.while_loop(more, body, (buffer, wanted))[0]


def newest(buffer: DrafterBuffer, *, rows: int, tokens: int) -> Microbatch:
    """The last `tokens` tokens of the `rows` rows that were written last; some may hold nothing."""
    chosen = (buffer.row - jnp.arange(rows)) % buffer.tokens.shape[0]
    used = jnp.sum(buffer.segment_ids[chosen] != INVALID, axis=1, dtype=jnp.int32)
    return _microbatch(buffer, chosen, jnp.maximum(used - tokens, 0))


def sample(buffer: DrafterBuffer, key: jax.Array, *, rows: int, tokens: int) -> Microbatch:
    """Draws a part of `tokens` tokens of each of `rows` filled rows, with replacement.

    A row's parts are its consecutive `tokens`-token pieces that hold anything. The row comes along
    whole: the drafter has seen a sequence from its beginning whenever it drafts, and trained on
    pieces without one it learns another task and drafts worse. The buffer must hold something.
    """
    row_key, part_key = jax.random.split(key)
    chosen = jax.random.randint(row_key, (rows,), 0, jnp.maximum(buffer.filled, 1))
    used = jnp.sum(buffer.segment_ids[chosen] != INVALID, axis=1)
    parts = jnp.maximum(-(-used // tokens), 1)
    return _microbatch(buffer, chosen, tokens * jax.random.randint(part_key, (rows,), 0, parts))


def _microbatch(buffer: DrafterBuffer, chosen: jax.Array, starts: jax.Array) -> Microbatch:
    """Rows of the ring, and where in each the part that counts begins; both [M] int32."""
    return Microbatch(
        tokens=buffer.tokens[chosen],
        features=None if buffer.features is None else buffer.features[chosen],
        segment_ids=buffer.segment_ids[chosen],
        positions=buffer.positions[chosen],
        starts=starts,
    )
