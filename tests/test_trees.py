"""Draft trees by hand, and against a plain recursion over random ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from tlt_jax import trees
from tlt_jax.trees import Candidates

# Depth 3, top-k 2. The pending token has children a and b; each of the best two nodes of a level
# gets two children. Log-probabilities are halves, so that sums are exact.
#
#     a -0.5    a0 -0.5 (-1.0)    a00 -3.0 (-4.0)
#                                 a01 -3.5 (-4.5)
#               a1 -2.0 (-2.5)
#     b -1.0    b0 -0.5 (-1.5)    b00 -0.0 (-1.5)
#                                 b01 -9.0 (-10.5)
#               b1 -5.0 (-6.0)
CANDIDATES = Candidates(
    tokens=jnp.array([[10, 11, 20, 21, 22, 23, 30, 31, 32, 33]]),
    parents=jnp.array([[-1, -1, 0, 0, 1, 1, 2, 2, 4, 4]]),
    log_probs=-jnp.array([[0.5, 1.0, 0.5, 2.0, 0.5, 5.0, 3.0, 3.5, 0.0, 9.0]]),
    scores=-jnp.array([[0.5, 1.0, 1.0, 2.5, 1.5, 6.0, 4.0, 4.5, 1.5, 10.5]]),
)


def _prune(verify_tokens):
    return trees.prune(jnp.array([7]), CANDIDATES, depth=3, verify_tokens=verify_tokens)


def test_the_best_nodes_are_verified_as_a_tree():
    """Of equal scores, b0 and b00, the parent comes first."""
    tree = _prune(6)
    assert tree.tokens.tolist() == [[7, 10, 11, 20, 22, 32]]
    assert tree.parents.tolist() == [[0, 0, 0, 1, 2, 4]]
    assert tree.depths.tolist() == [[0, 1, 1, 2, 2, 3]]
    assert tree.log_probs.tolist() == [[0, -0.5, -1.0, -0.5, -0.5, 0.0]]
    assert tree.mask[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1, 1],
    ]
    assert _prune(5).tokens.tolist() == [[7, 10, 11, 20, 22]]
    assert _prune(11).tokens.tolist() == [[7, *CANDIDATES.tokens[0].tolist()]]


@pytest.mark.parametrize(
    ("taken", "accepted", "path"),
    [
        pytest.param([11, 0, 22, 0, 32, 0], 3, [0, 2, 4, 5], id="to a leaf"),
        pytest.param([11, 0, 22, 0, 9, 0], 2, [0, 2, 4, 0], id="to an inner node"),
        pytest.param([10, 20, 22, 0, 32, 0], 2, [0, 1, 3, 0], id="the other branch agrees too"),
        pytest.param([9, 20, 22, 0, 32, 0], 0, [0, 0, 0, 0], id="none, though deeper ones agree"),
        pytest.param([10, 22, 0, 0, 0, 0], 1, [0, 1, 0, 0], id="a token of another parent"),
    ],
)
def test_the_accepted_path_by_hand(taken, accepted, path):
    tree = _prune(6)
    found = trees.accepted_nodes(tree, jnp.array([taken]))
    assert np.flatnonzero(found[0]).tolist() == sorted({0, *path})
    count, nodes = trees.accepted_path(tree, found, depth=3)
    assert (count.tolist(), nodes.tolist()) == ([accepted], [path])


def test_expected_acceptance_counts_verified_children_of_accepted_nodes():
    tree = _prune(6)
    found = trees.accepted_nodes(tree, jnp.array([[11, 0, 9, 0, 0, 0]]))
    expected = trees.expected_acceptance(tree, found, depth=3)
    np.testing.assert_allclose(expected, [[np.exp(-0.5) + np.exp(-1.0), np.exp(-0.5), 0]])


def test_children_are_ranked_by_noisy_logits_and_scored_by_their_softmax():
    noisy = jnp.log(jnp.array([[[1.0, 6.0, 3.0], [8.0, 1.0, 1.0]]]))
    found = trees.children(
        noisy, jnp.float32(1.0), jnp.array([[4, 2]]), jnp.array([[-1.0, -2.0]]), top_k=2
    )
    assert found.parents.tolist() == [[4, 4, 2, 2]]
    assert found.tokens.tolist() == [[1, 2, 0, 1]]
    np.testing.assert_allclose(jnp.exp(found.log_probs), [[0.6, 0.3, 0.8, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(
        found.scores, found.log_probs - jnp.array([[1.0, 1.0, 2.0, 2.0]]), rtol=1e-6
    )
    sharper = trees.children(
        noisy, jnp.float32(2.0), jnp.array([[4, 2]]), jnp.zeros((1, 2)), top_k=1
    )
    assert sharper.tokens.tolist() == [[1, 0]]
    np.testing.assert_allclose(jnp.exp(sharper.log_probs), [[36 / 46, 64 / 66]], rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_logits_of_a_broken_drafter_still_give_a_tree(bad):
    """Siblings differ and parents are verified: else a wrong path could be accepted."""
    noisy, levels = jnp.full((1, 1, 5), bad), []
    parents, scores = jnp.full((1, 1), -1), jnp.zeros((1, 1))
    for _ in range(3):
        levels.append(trees.children(noisy, jnp.float32(1.0), parents, scores, top_k=2))
        before = sum(level.tokens.shape[1] for level in levels[:-1])
        chosen = trees.best(levels[-1].scores, 2)
        parents, scores = before + chosen, trees.take(levels[-1].scores, chosen)
        noisy = jnp.full((1, 2, 5), bad)
    tree = trees.prune(jnp.array([0]), trees.join(levels), depth=3, verify_tokens=6)
    assert np.all(np.isfinite(tree.log_probs))
    _check_tree(tree)


def _check_tree(tree):
    """Parents come first, masks hold ancestors, siblings have different tokens."""
    for tokens, parents, depths, mask in zip(
        *map(np.asarray, (tree.tokens, tree.parents, tree.depths, tree.mask)), strict=True
    ):
        assert parents[0] == depths[0] == 0
        for node in range(1, len(tokens)):
            parent = parents[node]
            assert parent < node and depths[node] == depths[parent] + 1
            np.testing.assert_array_equal(mask[node], mask[parent] | (np.arange(len(mask)) == node))
            siblings = [other for other in range(1, node) if parents[other] == parent]
            assert tokens[node] not in tokens[siblings]


@pytest.mark.parametrize(("top_k", "verify_tokens"), [(1, 5), (3, 6), (3, 12), (4, 53)])
def test_random_trees_against_a_walk_from_node_to_node(top_k, verify_tokens):
    rng = np.random.default_rng(top_k + verify_tokens)
    rows, depth, vocab = 6, 4, 7
    parents, scores, levels = jnp.full((rows, 1), -1), jnp.zeros((rows, 1)), []
    for _ in range(depth):
        noisy = jnp.asarray(rng.normal(size=(rows, parents.shape[1], vocab)), jnp.float32)
        before = sum(level.tokens.shape[1] for level in levels)
        levels.append(trees.children(noisy, jnp.float32(1.5), parents, scores, top_k=top_k))
        chosen = trees.best(levels[-1].scores, top_k)
        parents, scores = before + chosen, trees.take(levels[-1].scores, chosen)
    joined = trees.join(levels)
    pending = jnp.asarray(rng.integers(0, vocab, rows))
    tree = trees.prune(pending, joined, depth=depth, verify_tokens=verify_tokens)
    _check_tree(tree)
    for row in range(rows):
        wanted = np.argsort(-np.asarray(joined.scores[row]), kind="stable")[: verify_tokens - 1]
        np.testing.assert_array_equal(tree.tokens[row, 1:], joined.tokens[row][np.sort(wanted)])
    taken = rng.integers(0, vocab, tree.tokens.shape)
    taken[0] = -1
    found = trees.accepted_nodes(tree, jnp.asarray(taken))
    count, path = trees.accepted_path(tree, found, depth=depth)
    assert count[0] == 0
    for row in range(rows):
        walked = _walk(np.asarray(tree.tokens[row]), np.asarray(tree.parents[row]), taken[row])
        assert np.flatnonzero(found[row]).tolist() == walked
        assert path[row].tolist() == walked + [0] * (depth + 1 - len(walked))
        assert int(count[row]) == len(walked) - 1


def _walk(tokens, parents, taken):
    """Nodes from the pending token on, each the child whose token the target took."""
    nodes = [0]
    while True:
        onward = [
            node
            for node in range(1, len(tokens))
            if parents[node] == nodes[-1] and tokens[node] == taken[nodes[-1]]
        ]
        if not onward:
            return nodes
        nodes += onward
