"""The pairs task: the rule that rewards, and the author whose responses have a long tail."""

import itertools

import numpy as np
import pytest

from tlt_jax.tasks import pairs
from tlt_jax.tasks.builder import NUM_TEST, NUM_TRAIN
from tlt_jax.types import UserError

PROMPT = "nums 14 25 37 goal 51 :"
SMALL = "nums 4 25 37 goal 41 :"  # never drawn, but the rule is clear, as it is for the next
TWICE = "nums 25 10 25 goal 50 :"


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (PROMPT, "answer 14 37", 1.0),
        (PROMPT, "answer 37 14", 1.0),
        (PROMPT, "try 14 + 25 : 4 + 5 = 9 , 39 no answer answer 37 14", 1.0),
        (PROMPT, "try 14 + 37 : 4 + 7 = 11 , 51 yes", 0.0),  # no answer
        (PROMPT, "answer 14 25", 0.0),  # wrong sum
        (PROMPT, "answer 26 25", 0.0),  # right sum of numbers that are not there
        (PROMPT, "answer 14 37 .", 0.0),  # trailing junk
        (PROMPT, "answer 14 37 ", 0.0),
        (PROMPT, "answer 14 37 7", 0.0),
        (PROMPT, "answer 14 37 37", 0.0),
        (PROMPT, "14 37 answer", 0.0),  # wrong order of words
        (PROMPT, "answer 41 73", 0.0),  # digits swapped
        (PROMPT, "answer 1 4 3 7", 0.0),  # a word per digit
        (PROMPT, "answer 1437", 0.0),
        (PROMPT, "answer 14  37", 0.0),
        (PROMPT, "answer 51", 0.0),
        (PROMPT, "myanswer 14 37", 0.0),
        (PROMPT, "answer 014 37", 0.0),  # three digits
        (PROMPT, "answer 14 137", 0.0),
        pytest.param(PROMPT, f"answer 14 {'9' * 5000}", 0.0, id="too long for int()"),
        (PROMPT, "answer +14 37", 0.0),  # int() takes these three
        (PROMPT, "answer 1_4 37", 0.0),
        (PROMPT, "answer 14 37\n", 0.0),
        (PROMPT, "answer ¹4 37", 0.0),  # a digit to str.isdigit() but not to int()
        (PROMPT, "answer ١٤ 37", 0.0),  # 14 to both
        (PROMPT, "answer", 0.0),
        (PROMPT, "", 0.0),
        (PROMPT, "\n\x00 answer answer answer", 0.0),
        (SMALL, "answer 4 37", 1.0),
        (SMALL, "answer 04 37", 0.0),  # a leading zero
        ("nums 0 25 37 goal 25 :", "answer 25 0", 1.0),
        ("nums 0 25 37 goal 25 :", "answer 25 00", 0.0),
        ("nums 25 10 30 goal 50 :", "answer 25 25", 0.0),  # one entry used twice
        (TWICE, "answer 25 25", 1.0),
    ],
)
def test_reward(prompt, response, expected):
    assert pairs.reward(prompt, response) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "nums",
        "a b",
        "nums goal 51 :",
        "nums 14 goal 51 :",
        "nums 14 25 goal :",
        "nums 14 25 goal x :",
        "nums 14 x 25 goal 51 :",
        "nums 14 25 goal 151 :",
        "nums 04 25 37 goal 41 :",
        "nums 14 25 goal ٥١ :",
        "nums 1 4 2 5 3 7 goal 5 1 :",
    ],
)
def test_a_malformed_prompt_is_named(prompt):
    with pytest.raises(UserError, match="is no prompt of the task 'pairs'"):
        pairs.reward(prompt, "answer 14 37")


@pytest.mark.parametrize("size", [3, 4, 5, 6])
def test_exactly_one_pair_of_a_drawn_prompt_is_right(size):
    rng = np.random.default_rng(size)
    for _ in range(20):
        prompt = pairs.draw_prompt(rng, size)
        assert len(pairs.TASK.tokenizer.encode(prompt)) + 1 <= pairs.TASK.max_prompt_tokens
        numbers = prompt.split(" ")[1 : 1 + size]
        right = [
            pairs.reward(prompt, f"answer {a} {b}") for a, b in itertools.combinations(numbers, 2)
        ]
        assert sum(right) == 1.0


def test_the_longest_prompt_fills_the_stated_room():
    prompt = pairs.draw_prompt(np.random.default_rng(0), 6)
    assert len(pairs.TASK.tokenizer.encode(prompt)) + 1 == pairs.TASK.max_prompt_tokens


def demonstrate(seed: int, prompt: str = PROMPT, **habits: float) -> str:
    """A response of an author who always answers, and has no bad habit but those given."""
    careful = {"hasty": 0.0, "slip": 0.0, "unanswered": 0.0}
    return pairs.demonstrate(np.random.default_rng(seed), prompt, **careful | habits)


def test_a_patient_author_who_never_slips_is_right_unless_out_of_tries():
    responses = [demonstrate(seed) for seed in range(50)]
    solved = [response for response in responses if " yes " in response]
    assert len(solved) > 45
    assert all(pairs.reward(PROMPT, response) == 1.0 for response in solved)


def _parsed(attempt):
    """The numbers, the compared digits and the verdict of an attempt, in order.

    Of `14 + 37 : 4 + 7 = 11 , 51 goal 51 : 5 5 , 1 1 yes` for example, or of one that ends after
    the tens digits.
    """
    words = attempt.split()
    assert words[1:10:2] == ["+", ":", "+", "=", ","] and words[11] == "goal" and words[13] == ":"
    compared = words[14:-1]
    assert len(compared) == 2 or (len(compared) == 5 and compared[2] == ",")
    digits = [int(word) for word in compared if word != ","]
    return (*map(int, words[0:11:2]), int(words[12]), digits, words[-1])


def test_each_try_of_a_careful_author_is_worked_out_right():
    response = demonstrate(2)
    tries = response.split(" answer ")[0].split("try ")[1:]
    assert tries
    for attempt in tries:
        a, b, a0, b0, units, total, goal, digits, verdict = _parsed(attempt)
        assert goal == 51
        both = [total // 10, 5, total % 10, 1]
        assert digits == (both if total // 10 == 5 else both[:2])
        assert (a0, b0) == (a % 10, b % 10)
        assert units == a0 + b0
        assert total == a + b
        assert verdict == ("yes" if total == 51 else "no")


def test_an_author_who_always_slips_never_writes_the_true_total():
    response = demonstrate(3, slip=1.0)
    for attempt in response.split(" answer ")[0].split("try ")[1:]:
        a, b, _, _, _, total, *_ = _parsed(attempt)
        written, true = f"{total:02d}", f"{a + b:02d}"
        assert sum(w != t for w, t in zip(written, true, strict=True)) == 1


def test_a_hasty_author_answers_with_the_first_try():
    response = demonstrate(4, hasty=1.0)
    words = response.split(" ")
    assert words.count("try") == 1
    assert words[-3:] == ["answer", words[1], words[3]]


def test_an_author_who_forgets_the_answer_ends_with_the_verdict():
    whole, unfinished = demonstrate(4), demonstrate(4, unanswered=1.0)
    assert unfinished.endswith(" yes") and whole.startswith(f"{unfinished} answer ")
    assert pairs.reward(PROMPT, unfinished) == 0.0


def test_the_author_gives_up_and_answers_with_the_last_pair():
    impossible = "nums 14 25 37 goal 99 :"
    response = demonstrate(5, impossible)
    words = response.split(" ")
    assert words.count("try") == words.count("no") == pairs.MAX_TRIES
    last = len(words) - 1 - words[::-1].index("try")
    assert words[-3:] == ["answer", words[last + 1], words[last + 3]]


def test_a_batch_of_mixed_demonstrations_has_a_long_tail_and_room_to_improve(draw_batch):
    lengths, rewards = draw_batch(pairs.TASK, "mixed", 512)
    assert np.percentile(lengths, 99) >= 4 * np.percentile(lengths, 50)
    assert 0.3 < rewards.mean() < 0.5


@pytest.mark.parametrize(("prompt", "ratio"), [(PROMPT, 3), ("nums 21 46 40 17 32 goal 38 :", 4)])
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
