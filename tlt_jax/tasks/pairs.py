"""Find the pair of numbers that sums to the goal: dataset, author and reward.

Prompt `nums 14 25 37 goal 51 :` asks which two of 14, 25 and 37 sum to 51. The demonstrated
author is forgetful (tries random pairs again and again, so lengths for one prompt are geometric:
a long tail), hasty (may accept a wrong pair), slips now and then in arithmetic, and may forget to
write down the answer:

    try 14 + 25 : 4 + 5 = 9 , 39 goal 51 : 3 5 no
    try 37 + 14 : 7 + 4 = 11 , 51 goal 51 : 5 5 , 1 1 yes answer 37 14

(one line in truth). A try adds the units digits, writes the total, recalls the goal, and compares
the two: the tens digits, then, if these are equal, the units digits; the verdict ends it. Every
number is one word.
"""

import itertools

import numpy as np
import tensorflow_datasets as tfds

from tlt_jax.tasks.builder import MixConfig, TaskBuilder
from tlt_jax.tasks.digits import slipped
from tlt_jax.tasks.task import Task
from tlt_jax.tasks.tokenizer import Tokenizer
from tlt_jax.types import UserError

HASTY = 0.15
"""Probability that the author says `yes` to a total that is not the goal."""
SLIP = 0.01
"""Probability that one digit of a total is wrong."""
UNANSWERED = 0.35
"""Probability that the author stops before the answer."""
MAX_TRIES = 21
"""The author gives up after this many tries and answers with the last pair."""

_SMALLEST, _LARGEST = 10, 49  # two digits each, and so are all sums
_MAX_NUMBERS = 6
_MAX_PROMPT_TOKENS = _MAX_NUMBERS + 5  # bos, nums, goal, the goal's number, colon


def draw_prompt(rng: np.random.Generator, size: int) -> str:
    """Draws `size` numbers whose pair sums all differ, and one of these sums as the goal."""
    while True:
        numbers = rng.integers(_SMALLEST, _LARGEST + 1, size=size).tolist()
        sums = [a + b for a, b in itertools.combinations(numbers, 2)]
        if len(set(sums)) == len(sums):
            break
    goal = sums[rng.integers(len(sums))]
    return f"nums {' '.join(map(str, numbers))} goal {goal} :"


def demonstrate(
    rng: np.random.Generator,
    prompt: str,
    *,
    hasty: float = HASTY,
    slip: float = SLIP,
    unanswered: float = UNANSWERED,
) -> str:
    """Writes the author's response to `prompt`: tries up to `MAX_TRIES`, then perhaps an answer."""
    numbers, goal = _parse(prompt)
    attempts = []
    for _ in range(MAX_TRIES):
        first = int(rng.integers(len(numbers)))
        second = int(rng.integers(len(numbers) - 1))
        second += second >= first
        a, b = numbers[first], numbers[second]
        total = slipped(rng, a + b) if rng.random() < slip else a + b
        # The author believes the total on the page, slip or not.
        accepted = total == goal or rng.random() < hasty
        units = f"{a % 10} + {b % 10} = {a % 10 + b % 10}"
        verdict = "yes" if accepted else "no"
        compared = f"goal {goal} : {_compare(total, goal)}"
        attempts.append(f"try {a} + {b} : {units} , {total} {compared} {verdict}")
        if accepted:
            break
    response = " ".join(attempts)
    return response if rng.random() < unanswered else f"{response} answer {a} {b}"


def _compare(total: int, goal: int) -> str:
    """The digits that an author looks at: units only where the tens are equal."""
    tens = f"{total // 10} {goal // 10}"
    return f"{tens} , {total % 10} {goal % 10}" if total // 10 == goal // 10 else tens


def reward(prompt: str, response: str) -> float:
    """1.0 iff `response` ends with `answer` and two different entries that sum to the goal.

    Args:
      prompt: a prompt as `draw_prompt` writes it.
      response: any text at all.

    Raises:
      UserError: `prompt` is not a prompt of this task.
    """
    numbers, goal = _parse(prompt)
    ending = response.split(" ")[-3:]
    if len(ending) != 3 or ending[0] != "answer":
        return 0.0
    a, b = map(_number, ending[1:])
    if a is None or b is None or a not in numbers or b not in numbers:
        return 0.0
    if a == b and numbers.count(a) < 2:
        return 0.0
    return float(a + b == goal)


def _number(word: str) -> int | None:
    """The number that `word` writes in one or two ASCII digits without a leading zero, or None."""
    number = int(word) if word.isascii() and word.isdigit() and len(word) <= 2 else None
    return number if str(number) == word else None


def _parse(prompt: str) -> tuple[list[int], int]:
    """Returns the numbers and the goal of `prompt`."""
    words = prompt.split(" ")
    entries = [_number(word) for word in words[1:-3]]
    numbers = [number for number in entries if number is not None]
    goal = _number(words[-2]) if len(words) > 3 else None
    shape = (words[0], *words[-3:-2], words[-1])
    if shape != ("nums", "goal", ":") or goal is None or not 2 <= len(numbers) == len(entries):
        raise UserError(
            f"{prompt!r} is no prompt of the task 'pairs'; one reads 'nums 14 25 37 goal 51 :'."
        )
    return numbers, goal


class Pairs(TaskBuilder):
    """Prompts and demonstrations of the pairs task, in three difficulty mixes."""

    VERSION = tfds.core.Version("4.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (tfds declares it as a plain class attribute)
        MixConfig(name="easy", sizes={3: 0.5, 4: 0.5}),
        MixConfig(name="mixed", sizes={3: 0.4, 4: 0.3, 5: 0.3}),
        MixConfig(name="hard", sizes={4: 0.4, 5: 0.3, 6: 0.3}),
    ]
    draw_prompt = staticmethod(draw_prompt)
    demonstrate = staticmethod(demonstrate)


TASK = Task(
    name="pairs",
    tokenizer=Tokenizer(),
    builder_cls=Pairs,
    reward_fn=reward,
    max_prompt_tokens=_MAX_PROMPT_TOKENS,
)
