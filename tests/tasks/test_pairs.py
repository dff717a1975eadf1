"""The pairs task: the rule that rewards, and the author whose responses have a long tail."""

import itertools

import numpy as np
import pytest

from tlt_jax.tasks import pairs
from tlt_jax.tasks.builder import NUM_TEST, NUM_TRAIN
from tlt_jax.types import UserError

PROMPT = "nums 1 4 2 5 3 7 goal 5 1 :"
TWICE = "nums 2 5 1 0 2 5 goal 5 0 :"  # never drawn (two equal sums), but the rule is clear


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (PROMPT, "answer 1 4 3 7", 1.0),
        (PROMPT, "answer 3 7 1 4", 1.0),
        (PROMPT, "try 1 4 + 2 5 : 0 9 , 3 9 no answer answer 3 7 1 4", 1.0),
        (PROMPT, "try 1 4 + 3 7 : 1 1 , 5 1 yes", 0.0),  # no answer
        (PROMPT, "answer 1 4 2 5", 0.0),  # wrong sum
        (PROMPT, "answer 2 6 2 5", 0.0),  # right sum of numbers that are not there
        (PROMPT, "answer 1 4 3 7 .", 0.0),  # trailing junk
        (PROMPT, "answer 1 4 3 7 ", 0.0),
        (PROMPT, "answer 1 4 3 7 7", 0.0),
        (PROMPT, "1 4 3 7 answer", 0.0),  # wrong order of words
        (PROMPT, "answer 4 1 7 3", 0.0),  # digits swapped
        (PROMPT, "answer 14 37", 0.0),
        (PROMPT, "answer 1 4 3  7", 0.0),
        (PROMPT, "myanswer 1 4 3 7", 0.0),
        (PROMPT, "answer ¹ 4 3 7", 0.0),
        (PROMPT, "answer ١ 4 3 7", 0.0),  # a digit to int() and to str.isdigit()
        (PROMPT, "answer", 0.0),
        (PROMPT, "", 0.0),
        (PROMPT, "\n\x00 answer answer answer", 0.0),
        ("nums 2 5 1 0 3 0 goal 5 0 :", "answer 2 5 2 5", 0.0),  # one entry used twice
        (TWICE, "answer 2 5 2 5", 1.0),
    ],
)
def test_reward(prompt, response, expected):
    assert pairs.reward(prompt, response) == expected


@pytest.mark.parametrize(
    "prompt",
    ["", "nums", "nums 1 4 goal 5 1 :", "nums 1 4 2 goal 5 1 :", "nums 1 4 2 5 goal 5 x :", "a b"],
)
def test_a_malformed_prompt_is_named(prompt):
    with pytest.raises(UserError, match="is no prompt of the task 'pairs'"):
        pairs.reward(prompt, "answer 1 4 3 7")


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_exactly_one_pair_of_a_drawn_prompt_is_right(size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        prompt = pairs.draw_prompt(rng, size)
        words = prompt.split(" ")
        assert len(pairs.TASK.tokenizer.encode(prompt)) + 1 <= pairs.TASK.max_prompt_tokens
        numbers = [" ".join(words[1 + 2 * k : 3 + 2 * k]) for k in range(size)]
        right = [
            pairs.reward(prompt, f"answer {a} {b}") for a, b in itertools.combinations(numbers, 2)
        ]
        assert sum(right) == 1.0


def test_the_longest_prompt_fills_the_stated_room():
    prompt = pairs.draw_prompt(np.random.default_rng(0), 6)
    assert len(pairs.TASK.tokenizer.encode(prompt)) + 1 == pairs.TASK.max_prompt_tokens


def test_a_patient_author_who_never_slips_is_right_unless_out_of_tries():
    rng = np.random.default_rng(1)
    responses = [pairs.demonstrate(rng, PROMPT, hasty=0.0, slip=0.0) for _ in range(50)]
    solved = [response for response in responses if " yes " in response]
    assert len(solved) > 45
    assert all(pairs.reward(PROMPT, response) == 1.0 for response in solved)


def test_each_try_of_a_careful_author_is_worked_out_right():
    response = pairs.demonstrate(np.random.default_rng(2), PROMPT, hasty=0.0, slip=0.0)
    tries = response.split(" answer ")[0].split("try ")[1:]
    assert tries
    for attempt in tries:
        a1, a0, _, b1, b0, _, u1, u0, _, t1, t0, verdict = attempt.split()
        assert int(u1 + u0) == int(a0) + int(b0)
        assert int(t1 + t0) == int(a1 + a0) + int(b1 + b0)
        assert verdict == ("yes" if t1 + t0 == "51" else "no")


def test_an_author_who_always_slips_never_writes_the_true_total():
    response = pairs.demonstrate(np.random.default_rng(3), PROMPT, hasty=0.0, slip=1.0)
    for attempt in response.split(" answer ")[0].split("try ")[1:]:
        a1, a0, _, b1, b0, _, _, _, _, t1, t0, _ = attempt.split()
        written, true = f"{t1}{t0}", f"{int(a1 + a0) + int(b1 + b0):02d}"
        assert sum(w != t for w, t in zip(written, true, strict=True)) == 1


def test_a_hasty_author_answers_with_the_first_try():
    response = pairs.demonstrate(np.random.default_rng(4), PROMPT, hasty=1.0, slip=0.0)
    words = response.split(" ")
    assert words.count("try") == 1
    assert words[-4:] == [*words[1:3], *words[4:6]]


def test_the_author_gives_up_and_answers_with_the_last_pair():
    impossible = "nums 1 4 2 5 3 7 goal 9 9 :"
    response = pairs.demonstrate(np.random.default_rng(5), impossible, hasty=0.0, slip=0.0)
    words = response.split(" ")
    assert words.count("try") == words.count("no") == pairs.MAX_TRIES
    last = len(words) - 1 - words[::-1].index("try")
    assert words[-5:] == ["answer", *words[last + 1 : last + 3], *words[last + 4 : last + 6]]


def test_a_batch_of_mixed_demonstrations_has_a_long_tail_and_room_to_improve(draw_batch):
    lengths, rewards = draw_batch(pairs.TASK, "mixed", 512)
    assert np.percentile(lengths, 99) >= 4 * np.percentile(lengths, 50)
    assert 0.5 < rewards.mean() < 0.7


@pytest.mark.parametrize(
    ("prompt", "ratio"), [(PROMPT, 3), ("nums 2 1 4 6 4 0 1 7 3 2 goal 3 8 :", 4)]
)
def test_the_tail_is_there_for_one_fixed_prompt(prompt, ratio):
    rng = np.random.default_rng(6)
    lengths = [len(pairs.demonstrate(rng, prompt).split(" ")) + 1 for _ in range(512)]
    assert np.percentile(lengths, 99) >= ratio * np.percentile(lengths, 50)


def test_harder_mixes_are_harder(draw_batch):
    means = [draw_batch(pairs.TASK, mix, 512)[1].mean() for mix in ("easy", "mixed", "hard")]
    assert means == sorted(means, reverse=True)


def test_mixes_have_the_stated_sizes():
    for config in pairs.Pairs.BUILDER_CONFIGS:
        assert sum(config.sizes.values()) == pytest.approx(1.0)
        assert (config.num_train, config.num_test) == (NUM_TRAIN, NUM_TEST)
