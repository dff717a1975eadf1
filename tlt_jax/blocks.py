"""Long rows in blocks of tokens: what is wide is alive for one block at a time.

For a row of 32,768 tokens the logits of a vocabulary of 152,064 take 20 GB in float32, the scores
of 28 heads 120 GB. So what is made of more numbers than `LIMIT` is made block by block, and the
backward pass makes it again block by block instead of keeping it. Rows for which it fits are one
block, of which everything is kept. Axes: B rows, T tokens.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LIMIT = 2**26
"""Numbers of the widest array of a block: 256 MiB in float32."""


def size(count: int, per_token: int) -> int:
    """Tokens of a block: all `count` if `per_token` numbers for each fit, else a power of two."""
    if count * per_token <= LIMIT:
        return count
    return 1 << (max(LIMIT // per_token, 1).bit_length() - 1)


def over_tokens(function: Callable[..., Any], arrays: tuple[Any, ...], size: int) -> Any:
    """`function(*arrays)`, for at most `size` tokens at a time.

    The blocks are of one length, 5 tokens in blocks of at most 4 are 3 and 3, the last of which is
    filled up with zeros. They are one loop in the compiled program, however many they are.

    Args:
      function: takes and gives arrays [B, t, ...] for any t; a token's result is its own affair.
      arrays: trees of arrays [B, T, ...]. What else the function reads, it closes over.
      size: of a block; T or more for one that keeps what its backward pass needs.
    """
    count = jax.tree.leaves(arrays)[0].shape[1]
    if count <= size:
        return function(*arrays)
    number = -(-count // size)
    length = -(-count // number)

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [number, B, length, ...]
        padded = jnp.pad(x, [(0, 0), (0, number * length - count)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(x.shape[0], number, length, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        joined = jnp.moveaxis(x, 0, 1)
        return joined.reshape(joined.shape[0], number * length, *joined.shape[3:])[:, :count]

    # A loop's two passes cannot be merged into one, so nothing has to be done to prevent it.
    recomputed = jax.checkpoint(function, prevent_cse=False)
    found = jax.lax.map(lambda block: recomputed(*block), jax.tree.map(cut, arrays))
    return jax.tree.map(join, found)
