"""Both attentions: a naive loop, then packed rows, then the cache step by step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.verify_attention import verify_attention
from tlt_jax import attention, blocks, kv_cache
from tlt_jax.types import INVALID, UserError

B, T, N, K, H = 2, 9, 4, 2, 4
SEGMENTS = np.array([[0, 0, 0, 0, 0, 0, 0, 0, 0], [3, 3, 3, 7, 7, 7, 7, -1, -1]], np.int32)

_cached = jax.jit(functools.partial(attention.cached, backend="reference"))


def _random_qkv(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)


def _naive(q, k, v, segments):
    """One query and one head at a time, over what it may see, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(B, T, N):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] != INVALID] or [t]
        scores = k[b, seen, n // (N // K)] @ q[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights @ v[b, seen, n // (N // K)] / weights.sum()
    return out


def _patched(patch, cut):
    """Cuts queries of `T` tokens as one of `CUTS` says."""
    query_block, size, stretches = cut
    patch.setattr(attention, "QUERY_BLOCK", query_block)
    patch.setattr(attention, "STRETCHES", stretches)
    patch.setattr(blocks, "LIMIT", size * B * N * T)


# Queries of a block whose scores are kept; of one whose scores are made again; stretches of these.
CUTS = {
    "whole": (attention.QUERY_BLOCK, T, 8),
    "kept in 4s": (4, T, 8),
    "kept in 3s": (3, T, 8),
    "forgotten in 2s, stretches of 4": (attention.QUERY_BLOCK, 2, 8),
    "forgotten in 2s, one stretch": (attention.QUERY_BLOCK, 2, 1),
    "forgotten in 4s, stretches of 8": (attention.QUERY_BLOCK, 4, 8),
}


@pytest.fixture(scope="module", params=CUTS)
def cut(request):
    """Rows as long as a block, and of several blocks, kept or made again, the last one not full."""
    with pytest.MonkeyPatch.context() as patch:
        _patched(patch, CUTS[request.param])
        yield request.param


@pytest.fixture(scope="module")
def packed(cut):
    """`attention.packed` on segment ids, jitted."""
    return jax.jit(lambda q, k, v, s: attention.packed(q, k, v, attention.reach(s)))


def test_the_mask_by_hand():
    expected = [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]
    found = attention.packed_mask(attention.reach(jnp.array([[0, 0, 1, 1, INVALID]])))
    assert found.dtype == jnp.bool_
    np.testing.assert_array_equal(found, [expected])


def test_padding_does_not_see_other_padding():
    np.testing.assert_array_equal(
        attention.packed_mask(attention.reach(jnp.full((1, 3), INVALID))),
        np.eye(3, dtype=bool)[None],
    )


def test_one_head_by_hand():
    # Scores of token 1 are 1 * log 3 and 0 at H = 1, so the weights are 3/4 and 1/4.
    q = jnp.array([5.0, 1.0]).reshape(1, 2, 1, 1)
    k = jnp.array([np.log(3.0), 0.0]).reshape(1, 2, 1, 1)
    v = jnp.array([8.0, 4.0]).reshape(1, 2, 1, 1)
    found = attention.packed(q, k, v, attention.reach(jnp.array([[0, 0]])))
    np.testing.assert_allclose(found.ravel(), [8.0, 7.0], rtol=1e-6)


def test_packed_is_the_naive_loop(packed):
    q, k, v = _random_qkv()
    found = packed(q, k, v, SEGMENTS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, _naive(q, k, v, SEGMENTS), atol=2e-6)


def test_a_later_token_or_another_segment_changes_nothing(packed):
    q, k, v = _random_qkv()
    base = packed(q, k, v, SEGMENTS)

    def disturbed(row, position):
        return packed(q, k.at[row, position].add(3.0), v.at[row, position].add(3.0), SEGMENTS)

    for position in range(T):
        other = disturbed(0, position)
        np.testing.assert_array_equal(other[0, :position], base[0, :position])
        assert np.all(other[0, position:] != base[0, position:])
    for position in (0, 1, 2, 7, 8):  # segment 3 and padding
        other = disturbed(1, position)
        np.testing.assert_array_equal(other[1, 3:7], base[1, 3:7])
        np.testing.assert_array_equal(other[0], base[0])


def test_decoding_with_a_cache_is_the_packed_row(packed):
    q, k, v = _random_qkv()
    expected = packed(q, k, v, np.zeros_like(SEGMENTS))
    cache = kv_cache.empty(B, K, T + 3, H, jnp.dtype("float32"))
    for index in range(T):
        one = slice(index, index + 1)
        found, cache = _cached(
            q[:, one], k[:, one], v[:, one], cache, jnp.full((B,), index, jnp.int32)
        )
        np.testing.assert_allclose(found[:, 0], expected[:, index], atol=2e-6)
    np.testing.assert_array_equal(cache.k[:, :, :T], k.swapaxes(1, 2))
    np.testing.assert_array_equal(cache.v[:, :, :T], v.swapaxes(1, 2))


def _own():
    """Two keys and values for each query alone."""
    rng = np.random.default_rng(1)
    k, v = (jnp.asarray(rng.standard_normal((B, T, K, H)), jnp.float32) for _ in range(2))
    return (k, v), (v, k)


def test_entries_that_one_query_alone_sees(cut):
    """Two more keys for each query, as if the cache of every query were its own."""
    q, k, v = _random_qkv()
    own = _own()
    seen = attention.reach(jnp.asarray(SEGMENTS))
    mask = attention.packed_mask(seen)
    found = jax.jit(lambda *x: attention.packed(*x, seen, own=own))(q, k, v)
    for b, t, n in ((0, 0, 1), (0, 5, 3), (1, 4, 0), (1, 8, 2)):
        shared, kv = np.flatnonzero(mask[b, t]), n // (N // K)
        keys = np.stack([*k[b, shared, kv], *(x[b, t, kv] for x, _ in own)]).astype(np.float64)
        values = np.stack([*v[b, shared, kv], *(x[b, t, kv] for _, x in own)])
        weights = np.exp(keys @ np.asarray(q[b, t, n]) / np.sqrt(H))
        expected = weights @ values / weights.sum()
        np.testing.assert_allclose(found[b, t, n], expected, atol=2e-6)


@pytest.mark.parametrize("first", [0, 3], ids="queries from {} on".format)
def test_gradients_do_not_depend_on_blocks(cut, first):
    """Of whole rows and of the queries of a part, each with two keys of its own."""
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((B, T, N, H)), jnp.float32)

    def of_part(tree):
        return jax.tree.map(lambda x: x[:, first:], tree)

    def loss(q, k, v, own):
        whole = attention.reach(jnp.asarray(SEGMENTS))
        seen = attention.Reach(*of_part((whole.segments, whole.last)), whole.key_segments)
        mixed = attention.packed(of_part(q), k, v, seen, own=of_part(own))
        return jnp.sum(mixed * of_part(weights))

    given = (*_random_qkv(), _own())
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*given)
    with pytest.MonkeyPatch.context() as patch:
        _patched(patch, CUTS["whole"])
        expected = jax.grad(loss, argnums=(0, 1, 2, 3))(*given)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.any(np.asarray(other) != 0)
        np.testing.assert_allclose(one, other, atol=5e-6)


def test_a_long_chain_reaches_the_kernel_in_blocks(monkeypatch):
    """The kernel is played by the reference: only how the queries are cut is tested here."""
    calls = []

    def kernel(*arguments, backend):
        assert backend == "tpu"
        calls.append(arguments[0].shape[1])
        return verify_attention(*arguments, backend="reference")

    q, k, v = _random_qkv()
    cache = kv_cache.empty(B, K, T + 3, H, jnp.dtype("float32"))
    lengths = jnp.array([2, 3], jnp.int32)
    expected, _ = _cached(q, k, v, cache, lengths)
    monkeypatch.setattr(attention, "verify_attention", kernel)
    monkeypatch.setattr(attention, "KERNEL_ROWS", 4 * (N // K))
    found, _ = attention.cached(q, k, v, cache, lengths, backend="tpu")
    assert calls == [4, 4, 1]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    tree = jnp.tril(jnp.ones((T, T), bool))
    with pytest.raises(UserError, match=rf"tree of {T} tokens.*verify at most 4 tokens"):
        attention.cached(q, k, v, cache, lengths, draft_mask=tree, backend="tpu")


def test_rows_of_unequal_length_and_what_lies_beyond_them():
    q, k, v = _random_qkv()
    cache = kv_cache.empty(B, K, T + 3, H, jnp.dtype("float32"))
    _, cache = _cached(q, k, v, cache, jnp.zeros((B,), jnp.int32))
    lengths = jnp.array([4, 2], jnp.int32)
    new = slice(5, 8)
    found, written = _cached(q[:, new], k[:, new], v[:, new], cache, lengths)
    for row, length in enumerate((4, 2)):
        keys, values = (jnp.concatenate([x[:, :length], x[:, new]], axis=1)[row] for x in (k, v))
        for index in range(3):
            end = length + index + 1
            scores = np.einsum(
                "ngh,snh->ngs",
                np.asarray(q[row, 5 + index]).reshape(K, N // K, H) / np.sqrt(H),
                keys[:end],
            )
            weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
            expected = np.einsum("ngs,snh->ngh", weights, values[:end]).reshape(N, H)
            np.testing.assert_allclose(found[row, index], expected, atol=2e-6)
        beyond = slice(length + 3, None)
        np.testing.assert_array_equal(written.k[row, :, beyond], cache.k[row, :, beyond])


def test_bfloat16_keeps_its_dtype():
    q, k, v = _random_qkv(jnp.bfloat16)
    found = jax.jit(attention.packed)(q, k, v, attention.reach(jnp.asarray(SEGMENTS)))
    assert found.dtype == jnp.bfloat16
    # Inputs agree exactly; scores, weights and output are rounded to 2^-9 of values below 4.
    np.testing.assert_allclose(np.asarray(found, np.float32), _naive(q, k, v, SEGMENTS), atol=0.03)


@pytest.mark.parametrize("moves", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_loop_that_carries_caches_copies_none_of_them(rows, moves):
    """XLA:CPU did for a single row: 0.7 ms of a round of 1.1."""

    def step(place, carry):
        layers, x = carry
        written, lengths = [], jnp.full((rows,), place, jnp.int32)
        for layer in layers:
            mixed, layer = attention.cached(
                x, x[:, :, :1], x[:, :, :1], layer, lengths, backend="reference"
            )
            x = x + mixed
            written.append(layer)
        if moves:
            node = 1 + (jnp.sum(x, axis=(1, 2, 3)) > 0)  # follows from attention, as it always does
            path = jnp.stack([jnp.zeros_like(lengths), node.astype(jnp.int32)], axis=1)
            written = [kv_cache.move(layer, lengths, path) for layer in written]
        return tuple(written), x

    loop = jax.jit(lambda layers, x: jax.lax.fori_loop(0, 9, step, (layers, x)), donate_argnums=0)
    layers = tuple(kv_cache.empty(rows, 1, 512, 32, jnp.dtype("float32")) for _ in range(2))
    text = loop.lower(layers, jnp.ones((rows, 1, 2, 32))).compile().as_text()
    assert f"f32[{rows},1,512,32]" in text
    assert not re.findall(rf"= f32\[{rows},1,512,32\]\S* copy\(", text)
