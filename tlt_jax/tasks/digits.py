"""Numbers of two digits, written as one word per digit, and an author's slips in a digit."""

from collections.abc import Sequence

import numpy as np


def to_words(number: int) -> str:
    """38 -> "3 8", for numbers in [0, 99]."""
    return f"{number // 10} {number % 10}"


def from_words(words: Sequence[str]) -> int | None:
    """["3", "8"] -> 38; None unless these are exactly two digits."""
    if len(words) == 2 and all(is_digit(word) for word in words):
        return int(words[0] + words[1])
    return None


def is_digit(word: str) -> bool:
    """Whether `word` is one of the ten ASCII digits (`str.isdigit` takes others as well)."""
    return len(word) == 1 and word in "0123456789"


def slipped(rng: np.random.Generator, number: int) -> int:
    """`number` in [0, 99] with one of its two digits replaced: 39 becomes 9, 34, 79 ..."""
    digits = [number // 10, number % 10]
    place = rng.integers(2)
    digits[place] = int(digits[place] + rng.integers(1, 10)) % 10
    return 10 * digits[0] + digits[1]
