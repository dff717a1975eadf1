"""Reach the goal by combining small numbers with + - *: dataset, author and reward.

Prompt `reach 5 6 with 3 5 7 :` asks for an expression over some of 3, 5 and 7 that is worth 56,
worked out from left to right without precedence. The demonstrated author starts over and over
with a random order and random operators (lengths for one prompt are geometric: a long tail), stops
as soon as the running value is the goal, is hasty, and slips now and then in arithmetic:

    try 7 - 3 = 0 4 * 5 = 2 0 no try 3 + 5 = 0 8 * 7 = 5 6 yes answer 3 + 5 * 7
"""

import collections
from collections.abc import Sequence

import numpy as np
import tensorflow_datasets as tfds

from tlt_jax.tasks.builder import MixConfig, TaskBuilder
from tlt_jax.tasks.digits import from_words, is_digit, slipped, to_words
from tlt_jax.tasks.task import Task
from tlt_jax.tasks.tokenizer import Tokenizer
from tlt_jax.types import UserError

HASTY = 0.12
"""Probability that the author says `yes` to a final value that is not the goal."""
SLIP = 0.005
"""Probability that one digit of a step's value is wrong; the author goes on from that value."""
MAX_TRIES = 24
"""The author gives up after this many tries and answers with the last expression."""

_OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}
_LARGEST_VALUE = 99  # two digits on the page
_MAX_NUMBERS = 4
_MAX_PROMPT_TOKENS = _MAX_NUMBERS + 6  # bos, reach, two goal digits, with, colon


def draw_prompt(rng: np.random.Generator, size: int) -> str:
    """Draws `size` numbers in [1, 9] and a goal that some expression over all of them reaches."""
    while True:
        numbers = rng.integers(1, 10, size=size).tolist()
        goal = numbers[0]
        for number in numbers[1:]:
            goal = _OPERATORS[_draw_operator(rng, goal, number)](goal, number)
        if goal not in numbers:
            break
    shown = " ".join(str(numbers[k]) for k in rng.permutation(size))
    return f"reach {to_words(goal)} with {shown} :"


def demonstrate(
    rng: np.random.Generator, prompt: str, *, hasty: float = HASTY, slip: float = SLIP
) -> str:
    """Writes the author's response to `prompt`: tries up to `MAX_TRIES`, then an answer."""
    numbers, goal = _parse(prompt)
    attempts = []
    for _ in range(MAX_TRIES):
        steps, expression, value = _attempt(rng, numbers, goal, slip=slip)
        accepted = value == goal or rng.random() < hasty
        attempts.append(f"try {steps} {'yes' if accepted else 'no'}")
        if accepted:
            break
    return f"{' '.join(attempts)} answer {expression}"


def evaluate(words: Sequence[str]) -> int | None:
    """Value of `number (operator number)*`, from left to right: 3 + 5 * 7 is 56.

    Returns:
      The value, or None where `words` is not such an expression. Numbers have one digit.
    """
    if len(words) % 2 == 0 or not all(is_digit(word) for word in words[::2]):
        return None
    value = int(words[0])
    for operator, number in zip(words[1::2], words[2::2], strict=True):
        if operator not in _OPERATORS:
            return None
        value = _OPERATORS[operator](value, int(number))
    return value


def reward(prompt: str, response: str) -> float:
    """1.0 iff `response` ends with `answer` and a right expression.

    The expression has two numbers or more, takes each number of the prompt at most as often as it
    stands there, and is worth the goal by `evaluate`.

    Args:
      prompt: a prompt as `draw_prompt` writes it.
      response: any text at all.

    Raises:
      UserError: `prompt` is not a prompt of this task.
    """
    numbers, goal = _parse(prompt)
    words = response.split(" ")
    if "answer" not in words:
        return 0.0
    expression = words[len(words) - words[::-1].index("answer") :]
    if len(expression) < 3 or evaluate(expression) != goal:
        return 0.0
    used = collections.Counter(int(word) for word in expression[::2])
    return float(used <= collections.Counter(numbers))


def _attempt(
    rng: np.random.Generator, numbers: list[int], goal: int, *, slip: float
) -> tuple[str, str, int]:
    """One try: the steps as written, the expression, and the value that the author believes."""
    order = [numbers[k] for k in rng.permutation(len(numbers))]
    value = order[0]
    steps = expression = str(value)
    for number in order[1:]:
        operator = _draw_operator(rng, value, number)
        value = _OPERATORS[operator](value, number)
        if rng.random() < slip:
            value = slipped(rng, value)
        steps += f" {operator} {number} = {to_words(value)}"
        expression += f" {operator} {number}"
        if value == goal:
            break
    return steps, expression, value


def _draw_operator(rng: np.random.Generator, value: int, number: int) -> str:
    """A random operator that keeps the value in [0, 99]; with one-digit numbers there is one."""
    fitting = [
        operator
        for operator, apply in _OPERATORS.items()
        if 0 <= apply(value, number) <= _LARGEST_VALUE
    ]
    return fitting[rng.integers(len(fitting))]


def _parse(prompt: str) -> tuple[list[int], int]:
    """Returns the numbers and the goal of `prompt`."""
    words = prompt.split(" ")
    goal, numbers = from_words(words[1:3]), words[4:-1]
    shape = (words[0], *words[3:4], words[-1])
    digits = len(numbers) >= 2 and all(map(is_digit, numbers))
    if shape != ("reach", "with", ":") or goal is None or not digits:
        raise UserError(
            f"{prompt!r} is no prompt of the task 'countdown'; one reads 'reach 5 6 with 3 5 7 :'."
        )
    return [int(word) for word in numbers], goal


class Countdown(TaskBuilder):
    """Prompts and demonstrations of the countdown task, in three difficulty mixes."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 (tfds declares it as a plain class attribute)
        MixConfig(name="easy", sizes={3: 1.0}),
        MixConfig(name="mixed", sizes={3: 0.6, 4: 0.4}),
        MixConfig(name="hard", sizes={4: 1.0}),
    ]
    draw_prompt = staticmethod(draw_prompt)
    demonstrate = staticmethod(demonstrate)


TASK = Task(
    name="countdown",
    tokenizer=Tokenizer(),
    builder_cls=Countdown,
    reward_fn=reward,
    max_prompt_tokens=_MAX_PROMPT_TOKENS,
)
