"""verify_attention, a chain of trust: hand arithmetic, a numpy loop, the reference, the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.verify_attention import (
    verify_attention,
    verify_attention_reference,
    verify_attention_tpu,
)

_reference = jax.jit(verify_attention_reference)
_kernel = jax.jit(verify_attention_tpu, static_argnames=("block_s", "interpret"))
_interpreted = functools.partial(_kernel, block_s=16, interpret=True)


def _random_case(seed, *, b, t, n, k, s, h, lengths, dtype=jnp.float32):
    """q, k, v of the given axes, the lengths, and a random tree per row as a mask [B, T, T]."""
    rng = np.random.default_rng(seed)
    arrays = [
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((b, t, n, h), (b, k, s, h), (b, k, s, h))
    ]
    masks = jnp.asarray(np.stack([_random_tree(rng, t) for _ in range(b)]))
    return *arrays, jnp.asarray(lengths, jnp.int32), masks


def _random_tree(rng, t):
    """Every node sees itself and its ancestors; parents come before children: [T, T] bool."""
    mask = np.eye(t, dtype=bool)
    for node in range(1, t):
        mask[node] |= mask[rng.integers(0, node)]
    return mask


def _naive(q, k, v, lengths, draft_mask):
    """One query, one head at a time, over the visible positions alone, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    b, t, n, h = q.shape
    group = n // k.shape[1]
    out = np.zeros_like(q)
    for row, token, head in np.ndindex(b, t, n):
        length = int(lengths[row])
        seen = [*range(length), *(length + np.flatnonzero(draft_mask[row, token]))]
        logits = k[row, head // group, seen] @ q[row, token, head] / np.sqrt(h)
        weights = np.exp(logits - logits.max())
        out[row, token, head] = weights @ v[row, head // group, seen] / weights.sum()
    return out


def _chain(b, t):
    return np.broadcast_to(np.tril(np.ones((t, t), bool)), (b, t, t))


@pytest.mark.parametrize("run", [_reference, _interpreted], ids=["reference", "kernel"])
def test_one_query_by_hand(run):
    # H = 4, scale 1/2: the committed position has logit 2 * ln(3) / 2 = ln(3), the query's own
    # has 0. Weights 3/4 and 1/4 on the values 8 and 4: 6 + 1 = 7. Position 2 holds another value.
    q = jnp.zeros((1, 1, 1, 4)).at[0, 0, 0, 0].set(2.0)
    k = jnp.zeros((1, 1, 3, 4)).at[0, 0, 0, 0].set(np.log(3.0))
    v = jnp.array([8.0, 4.0, 1000.0])[None, None, :, None] * jnp.ones(4)
    out = run(q, k, v, jnp.array([1], jnp.int32))
    np.testing.assert_allclose(out, np.full((1, 1, 1, 4), 7.0), rtol=1e-6)


@pytest.mark.parametrize("run", [_reference, _interpreted], ids=["reference", "kernel"])
def test_zero_queries_average_what_the_tree_shows(run):
    # Equal logits average the visible values. Tree 0 -> 1, 0 -> 2 behind two committed positions;
    # position s holds 10 ** s: node 0 sees 0 1 2, node 1 sees 0 1 2 3, node 2 sees 0 1 2 4.
    q = jnp.zeros((1, 3, 1, 2))
    v = (10.0 ** jnp.arange(6))[None, None, :, None] * jnp.ones(2)
    tree = jnp.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    out = run(q, jnp.zeros_like(v), v, jnp.array([2], jnp.int32), tree)
    np.testing.assert_allclose(out[0, :, 0, 0], [111 / 3, 1111 / 4, 10111 / 4], rtol=1e-6)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_reference_equals_numpy_loop(group, tree):
    q, k, v, lengths, masks = _random_case(
        1, b=3, t=5, n=2 * group, k=2, s=24, h=8, lengths=[0, 7, 19]
    )
    out = _reference(q, k, v, lengths, masks if tree else None)
    expected = _naive(q, k, v, lengths, np.asarray(masks) if tree else _chain(3, 5))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", [_reference, _interpreted], ids=["reference", "kernel"])
def test_the_ways_to_write_one_mask_agree(run):
    q, k, v, lengths, _ = _random_case(2, b=2, t=4, n=2, k=1, s=32, h=8, lengths=[3, 28])
    chain = _chain(2, 4)
    no_mask = run(q, k, v, lengths)
    np.testing.assert_array_equal(no_mask, run(q, k, v, lengths, jnp.asarray(chain[0])))
    np.testing.assert_array_equal(no_mask, run(q, k, v, lengths, jnp.asarray(chain)))


@pytest.mark.parametrize("run", [_reference, _interpreted], ids=["reference", "kernel"])
@pytest.mark.parametrize("nodes", [[39], [0, 7, 33], [31, 32]])
def test_some_nodes_of_a_tree_get_what_the_whole_tree_gives_them(run, nodes):
    """A tree of 40 nodes, two words of mask bits, over three blocks of the cache."""
    q, k, v, lengths, masks = _random_case(8, b=2, t=40, n=2, k=1, s=64, h=8, lengths=[24, 3])
    whole = run(q, k, v, lengths, masks)
    some = run(q[:, np.array(nodes)], k, v, lengths, masks[:, np.array(nodes)])
    np.testing.assert_allclose(some, whole[:, np.array(nodes)], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", [_reference, _interpreted], ids=["reference", "kernel"])
@pytest.mark.parametrize("length", [0, 9, 15])
def test_what_a_query_does_not_see_changes_nothing(run, length):
    t, s = 6, 48
    q, k, v, lengths, masks = _random_case(3, b=1, t=t, n=4, k=2, s=s, h=8, lengths=[length])
    before = np.asarray(run(q, k, v, lengths, masks))
    # A hidden node, and then the cache beyond the draft tokens, up to its end.
    for start, stop in [*((length + u, length + u + 1) for u in range(t)), (length + t, s)]:
        new_k, new_v = k.at[:, :, start:stop].set(50.0), v.at[:, :, start:stop].set(-1e4)
        changed = np.asarray(run(q, new_k, new_v, lengths, masks))
        node = start - length
        sees = np.asarray(masks)[0, :, node] if node < t else np.zeros(t, bool)
        np.testing.assert_array_equal(changed[:, ~sees], before[:, ~sees])
        assert np.all(np.any(changed[:, sees] != before[:, sees], axis=(-1, -2)))


@pytest.mark.parametrize("run", [_reference, _interpreted], ids=["reference", "kernel"])
def test_a_nan_reaches_whoever_sees_it(run):
    """A broken cache must not pass for a result, wherever the NaN stands in the row."""
    q, k, v, lengths, _ = _random_case(4, b=3, t=2, n=2, k=1, s=32, h=8, lengths=[20, 20, 20])
    for position in (0, 11, 20):
        out = np.asarray(run(q, k.at[1, 0, position].set(jnp.nan), v, lengths))
        assert np.all(np.isnan(out[1])) and np.all(np.isfinite(out[[0, 2]]))


# float32 differs by the order of sums alone. In bfloat16 both sides round the weights (against
# different maxima) and the result to 8 bits: 2 ** -7 is the last bit of a value in [1, 2).
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-7}


@pytest.mark.parametrize(
    ("dtype", "mask", "axes", "lengths", "block_s"),
    [
        ("float32", "chain", dict(t=1, n=1, k=1, s=16, h=8), [0, 15], 16),
        ("float32", "shared", dict(t=3, n=4, k=2, s=64, h=16), [0, 13, 14, 61], 16),
        ("bfloat16", "shared", dict(t=3, n=4, k=2, s=64, h=16), [0, 13, 14, 61], 16),
        ("float32", "per row", dict(t=8, n=7, k=1, s=48, h=16), [40, 24, 8], 16),
        ("bfloat16", "per row", dict(t=8, n=7, k=1, s=48, h=16), [40, 24, 8], 16),
        ("float32", "per row", dict(t=20, n=2, k=2, s=64, h=8), [0, 44], 16),
        ("float32", "per row", dict(t=40, n=2, k=1, s=256, h=8), [216, 0], 200),
    ],
    ids=["one", "gqa", "gqa-bf16", "rows-56", "rows-56-bf16", "draft-spans-blocks", "two-words"],
)
def test_kernel_equals_reference(dtype, mask, axes, lengths, block_s):
    q, k, v, lengths, masks = _random_case(
        4, b=len(lengths), lengths=lengths, dtype=jnp.dtype(dtype), **axes
    )
    mask = {"chain": None, "shared": masks[0], "per row": masks}[mask]
    out = _kernel(q, k, v, lengths, mask, block_s=block_s, interpret=True)
    expected = _reference(q, k, v, lengths, mask)
    assert out.dtype == expected.dtype == dtype
    out, expected = np.asarray(out, np.float32), np.asarray(expected, np.float32)
    tolerance = _TOLERANCE[dtype]
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


def test_bfloat16_reference_stays_near_the_numpy_loop():
    q, k, v, lengths, masks = _random_case(
        5, b=2, t=4, n=4, k=2, s=64, h=16, lengths=[60, 11], dtype=jnp.bfloat16
    )
    out = np.asarray(_reference(q, k, v, lengths, masks), np.float64)
    expected = _naive(q, k, v, lengths, np.asarray(masks))
    np.testing.assert_allclose(out, expected, rtol=2.0**-7, atol=2.0**-7)


def test_api_runs_the_backend_it_is_told():
    q, k, v, lengths, masks = _random_case(6, b=1, t=2, n=2, k=1, s=16, h=8, lengths=[5])
    out = verify_attention(q, k, v, lengths, masks, backend="reference")
    np.testing.assert_array_equal(out, verify_attention_reference(q, k, v, lengths, masks))
    call = jax.make_jaxpr(functools.partial(verify_attention, backend="tpu"))
    assert "pallas_call" in str(call(q, k, v, lengths, masks))
    with pytest.raises(ValueError, match=r"no backend 'gpu': choose one of 'reference', 'tpu'\."):
        verify_attention(q, k, v, lengths, masks, backend="gpu")


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("q", jnp.zeros((1, 2, 8)), r"q \[B, T, N, H\]"),
        ("q", jnp.zeros((1, 2, 3, 8)), "K dividing N=3"),
        ("q", jnp.zeros((2, 2, 2, 8)), r"one shape \[B=2, K, S, H=8\]"),
        ("v", jnp.zeros((1, 2, 12, 8)), "k and v of one shape"),
        ("k", jnp.zeros((1, 2, 16, 8), jnp.bfloat16), "all float32 or all bfloat16"),
        ("lengths", jnp.zeros(1), r"lengths \[B=1\] int32, got \(1,\) float32"),
        ("lengths", jnp.zeros(2, jnp.int32), r"lengths \[B=1\] int32, got \(2,\) int32"),
        ("draft_mask", jnp.ones((3, 3), bool), r"draft_mask \[T=2, M\]"),
        ("draft_mask", jnp.ones((2, 1), bool), r"2 <= M <= S=16, got \(2, 1\)"),
        ("draft_mask", jnp.ones((2, 17), bool), r"2 <= M <= S=16, got \(2, 17\)"),
        ("draft_mask", jnp.ones((2, 2)), "bool with .* float32"),
    ],
)
def test_api_names_the_argument_that_does_not_fit(argument, value, message):
    arguments = dict(
        q=jnp.zeros((1, 2, 2, 8)),
        k=jnp.zeros((1, 2, 16, 8)),
        v=jnp.zeros((1, 2, 16, 8)),
        lengths=jnp.zeros(1, jnp.int32),
        draft_mask=jnp.ones((2, 2), bool),
    )
    verify_attention(**arguments, backend="reference")
    with pytest.raises(ValueError, match=message):
        verify_attention(**(arguments | {argument: value}), backend="reference")


@pytest.mark.parametrize(("s", "block_s"), [(1000, 512), (48, 0), (48, 12), (256, 100)])
def test_kernel_refuses_a_cache_that_no_block_divides(s, block_s):
    q, cache = jnp.zeros((1, 1, 1, 8)), jnp.zeros((1, 1, s, 8))
    with pytest.raises(ValueError, match=f"S={s} into blocks of block_s={block_s}"):
        verify_attention_tpu(q, cache, cache, jnp.zeros(1, jnp.int32), block_s=block_s)
