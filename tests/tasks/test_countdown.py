"""The countdown task: its evaluator, the rule that rewards, and its author."""

import numpy as np
import pytest

from tlt_jax.tasks import countdown
from tlt_jax.types import UserError

PROMPT = "reach 5 6 with 3 5 7 :"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("3 + 5 * 7", 56),  # from left to right, no precedence
        ("3 - 5", -2),
        ("2 * 3 - 4 + 1", 3),
        ("3 +", None),
        ("+ 3", None),
        ("3 5", None),
        ("3 / 5", None),
        ("3 + 1 2", None),
        ("( 3 + 5 )", None),
        ("3 + 12", None),
        ("3 + x", None),
        ("", None),
    ],
)
def test_evaluate(text, value):
    assert countdown.evaluate(text.split(" ")) == value


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        (PROMPT, "answer 3 + 5 * 7", 1.0),
        (PROMPT, "answer 5 + 3 * 7", 1.0),
        (PROMPT, "answer 3 answer 5 try no answer 3 + 5 * 7", 1.0),
        ("reach 0 8 with 3 5 7 :", "answer 3 + 5", 1.0),  # some of the numbers
        (PROMPT, "answer 3 * 5 + 7", 0.0),  # wrong value
        (PROMPT, "answer 7 * 8", 0.0),  # a number that is not there
        (PROMPT, "answer 7 + 7 * 5 - 7 - 7", 0.0),  # one entry used more than once
        ("reach 4 9 with 3 5 7 :", "answer 7 * 7", 0.0),
        ("reach 4 9 with 7 5 7 :", "answer 7 * 7", 1.0),
        ("reach 0 3 with 3 5 7 :", "answer 3", 0.0),  # nothing combined
        (PROMPT, "answer 3 + 5 * 7 yes", 0.0),  # trailing junk
        (PROMPT, "answer 3 + 5 * 7 ", 0.0),
        (PROMPT, "answer 3 5 + 7 *", 0.0),  # wrong order of words
        (PROMPT, "3 + 5 * 7 answer", 0.0),
        (PROMPT, "myanswer 3 + 5 * 7", 0.0),
        (PROMPT, "answer ³ + 5 * 7", 0.0),
        (PROMPT, "answer 3 + 5 * 7 * 1 * 1", 0.0),
        (PROMPT, "answer 35 + 21", 0.0),  # digits joined into words of the vocabulary
        (PROMPT, "answer", 0.0),
        (PROMPT, "", 0.0),
        (PROMPT, "answer __import__ + 1", 0.0),
    ],
)
def test_reward(prompt, response, expected):
    assert countdown.reward(prompt, response) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "reach 5 6 with 3 :",
        "reach 5 with 3 5 :",
        "reach 56 with 3 5 7 :",
        "reach 5 6 with 3 12 :",
        "reach 5 6 with 3 1 2 x :",
        "with 5 6 reach",
    ],
)
def test_a_malformed_prompt_is_named(prompt):
    with pytest.raises(UserError, match="is no prompt of the task 'countdown'"):
        countdown.reward(prompt, "answer 3 + 5")


@pytest.mark.parametrize("size", [3, 4])
def test_drawn_prompts_can_be_solved_and_fit(size):
    rng = np.random.default_rng(size)
    for _ in range(10):
        prompt = countdown.draw_prompt(rng, size)
        assert len(countdown.TASK.tokenizer.encode(prompt)) + 1 <= countdown.TASK.max_prompt_tokens
        attempts = (countdown.demonstrate(rng, prompt, hasty=0.0, slip=0.0) for _ in range(500))
        assert any(countdown.reward(prompt, response) == 1.0 for response in attempts)


def test_the_longest_prompt_fills_the_stated_room():
    prompt = countdown.draw_prompt(np.random.default_rng(0), 4)
    assert len(countdown.TASK.tokenizer.encode(prompt)) + 1 == countdown.TASK.max_prompt_tokens


def test_each_step_of_a_careful_author_is_worked_out_right():
    rng = np.random.default_rng(1)
    for _ in range(20):
        response = countdown.demonstrate(rng, PROMPT, hasty=0.0, slip=0.0)
        tries, _ = response.split(" answer ")
        for attempt in tries.split("try ")[1:]:
            *steps, verdict = attempt.split()
            value = int(steps[0])
            for k in range(1, len(steps), 5):
                operator, number, equals, tens, units = steps[k : k + 5]
                step = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[operator]
                value = step(value, int(number))
                assert equals == "=" and int(tens + units) == value
            assert verdict == ("yes" if value == 56 else "no")
        assert countdown.reward(PROMPT, response) == float(" yes " in response)


def test_a_slip_spoils_the_answer():
    rng = np.random.default_rng(2)
    prompt = "reach 0 7 with 3 4 :"
    responses = [countdown.demonstrate(rng, prompt, hasty=0.0, slip=1.0) for _ in range(50)]
    believed = [response for response in responses if " yes " in response]
    assert believed
    assert all(countdown.reward(prompt, response) == 0.0 for response in believed)


def test_the_author_gives_up():
    response = countdown.demonstrate(
        np.random.default_rng(3), "reach 9 9 with 1 1 1 :", hasty=0.0, slip=0.0
    )
    assert response.split(" ").count("try") == countdown.MAX_TRIES
    assert " no answer 1 " in response


def test_a_batch_of_mixed_demonstrations_has_a_long_tail_and_room_to_improve(draw_batch):
    lengths, rewards = draw_batch(countdown.TASK, "mixed", 512)
    assert np.percentile(lengths, 99) >= 4 * np.percentile(lengths, 50)
    assert 0.3 < rewards.mean() < 0.6


def test_the_tail_is_there_for_one_fixed_prompt():
    rng = np.random.default_rng(4)
    lengths = [len(countdown.demonstrate(rng, PROMPT).split(" ")) + 1 for _ in range(512)]
    assert np.percentile(lengths, 99) >= 4 * np.percentile(lengths, 50)


def test_harder_mixes_are_harder(draw_batch):
    means = [draw_batch(countdown.TASK, mix, 512)[1].mean() for mix in ("easy", "mixed", "hard")]
    assert means == sorted(means, reverse=True)
