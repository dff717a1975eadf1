"""Strategies: their written form, their sizes by hand, and what is refused."""

import pytest

from tlt_jax.types import Strategy, UserError


@pytest.mark.parametrize(
    ("text", "fields", "candidates", "written_slots"),
    [
        ("plain", (0, 1, 1), 0, 1),
        ("chain-1", (1, 1, 2), 1, 2),
        ("chain-4", (4, 1, 5), 4, 5),
        ("tree-1-3-4", (1, 3, 4), 3, 4),
        ("tree-3-2-7", (3, 2, 7), 2 + 4 + 4, 7),
        # Few are verified, but the drafter feeds 3 levels of 4 nodes.
        ("tree-4-4-5", (4, 4, 5), 4 + 3 * 16, 1 + 3 * 4),
        ("ngram-4", (4, 1, 5), 4, 5),
        ("ngram-3-2-7", (3, 2, 7), 2 + 4 + 4, 7),
    ],
)
def test_a_strategy_is_what_its_name_says(text, fields, candidates, written_slots):
    strategy = Strategy.parse(text)
    assert (strategy.depth, strategy.top_k, strategy.verify_tokens) == fields
    assert (strategy.candidates, strategy.written_slots) == (candidates, written_slots)
    assert strategy.most_committed == strategy.depth + 1
    assert str(strategy) == text and Strategy.parse(str(strategy)) == strategy
    assert strategy.is_plain == (text == "plain")
    assert strategy.is_chain == (text.count("-") <= 1)
    assert strategy.ngram == text.startswith("ngram")
    assert strategy.uses_drafter == text.startswith(("chain", "tree"))


def test_without_a_number_of_tokens_all_nodes_are_verified():
    assert Strategy() == Strategy.parse("plain")
    assert Strategy(4) == Strategy.parse("chain-4")
    assert Strategy(3, 2).verify_tokens == 11


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chain", "there is no strategy 'chain'"),
        ("chain--1", "there is no strategy 'chain--1'"),
        ("plain-0", "there is no strategy"),
        ("tree-4-2", "'tree-6-4-16' .depth 6"),
        ("beam-4", "there is no strategy 'beam-4'"),
        ("tree-2-2-2", "verifies 2 tokens; with depth 2 and top-k 2 it can be 3 to 7"),
        ("tree-2-2-8", "verifies 8 tokens"),
        ("tree-0-4-1", "nothing is drafted, but top-k is 4"),
        ("ngram-0", "nothing is drafted, but .* the n-gram drafter asked for"),
        ("ngram-4-2", "there is no strategy 'ngram-4-2'"),
        ("tree-3-0-4", "top-k 1 .a chain. or more"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        Strategy.parse(text)


def test_a_tree_may_have_the_shape_of_a_chain():
    assert Strategy.parse("tree-3-1-4") == Strategy.parse("chain-3")
