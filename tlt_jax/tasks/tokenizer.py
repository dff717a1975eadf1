"""A word-level tokenizer over one fixed vocabulary that every task shares.

Each number from 0 to 99 is a word; a task may write its numbers whole or digit by digit.
"""

import dataclasses
import functools
from collections.abc import Iterable

from tlt_jax.types import UserError

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCAB_SIZE = 128

_WORDS = (
    *(str(number) for number in range(100)),
    *"+-*=:,;()",
    *("try", "no", "yes", "answer", "nums", "goal", "reach", "with", "check", "ok", "retry", "so"),
)


def _padded(words: tuple[str, ...], size: int) -> tuple[str, ...]:
    return (*words, *(f"<unused-{k}>" for k in range(size - len(words))))


VOCABULARY: tuple[str, ...] = _padded((PAD, BOS, EOS, *_WORDS), VOCAB_SIZE)
"""Word of each id. New words replace `<unused-k>` words, so trained policies keep their shape."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Maps words separated by single spaces to ids in [0, vocab_size) and back.

    The first three words are special: they are never encoded from text and never decoded to text.
    """

    words: tuple[str, ...] = VOCABULARY

    def __post_init__(self):
        if self.words[:3] != (PAD, BOS, EOS) or len(set(self.words)) != len(self.words):
            raise UserError(
                f"a tokenizer's words must be distinct and begin with {PAD}, {BOS}, {EOS}; "
                f"these begin with {self.words[:3]}."
            )

    @property
    def pad_id(self) -> int:
        return 0

    @property
    def bos_id(self) -> int:
        return 1

    @property
    def eos_id(self) -> int:
        return 2

    @property
    def vocab_size(self) -> int:
        return len(self.words)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self.words) if index > self.eos_id}

    def encode(self, text: str) -> list[int]:
        """Returns one id per word, without special ids.

        Raises:
          UserError: a word is not in the vocabulary (two spaces in a row make an empty word).
        """
        if not text:
            return []
        ids = self._ids
        try:
            return [ids[word] for word in text.split(" ")]
        except KeyError as error:
            raise UserError(
                f"the word {error.args[0]!r} in {text!r} is not in the vocabulary; text must be "
                f"words from {' '.join(list(ids)[:8])} ... separated by single spaces."
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the words of `ids` up to the first end-of-sequence id, without special words.

        Raises:
          UserError: an id lies outside [0, vocab_size).
        """
        words = []
        for index in map(int, ids):
            if not 0 <= index < self.vocab_size:
                raise UserError(
                    f"token id {index} is outside the vocabulary [0, {self.vocab_size})."
                )
            if index == self.eos_id:
                break
            if index > self.eos_id:
                words.append(self.words[index])
        return " ".join(words)
