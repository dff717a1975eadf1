"""The tokenizer: round trips, special ids, and errors that name what is wrong."""

import pytest

from tlt_jax.tasks.tokenizer import BOS, EOS, PAD, VOCAB_SIZE, VOCABULARY, Tokenizer
from tlt_jax.types import UserError

TOKENIZER = Tokenizer()


def test_every_ordinary_word_makes_the_round_trip():
    text = " ".join(VOCABULARY[3:])
    ids = TOKENIZER.encode(text)
    assert ids == list(range(3, VOCAB_SIZE))
    assert TOKENIZER.decode(ids) == text


def test_vocabulary_has_a_fixed_size_and_distinct_words():
    assert TOKENIZER.vocab_size == VOCAB_SIZE == 128
    assert len(set(VOCABULARY)) == VOCAB_SIZE
    assert [VOCABULARY[i] for i in (TOKENIZER.pad_id, TOKENIZER.bos_id, TOKENIZER.eos_id)] == [
        PAD,
        BOS,
        EOS,
    ]


def test_every_number_below_a_hundred_is_one_word():
    assert [len(TOKENIZER.encode(str(number))) for number in range(100)] == [1] * 100


def test_decode_skips_padding_and_stops_at_the_end():
    ids = [TOKENIZER.pad_id, TOKENIZER.bos_id, *TOKENIZER.encode("try 1"), TOKENIZER.eos_id]
    assert TOKENIZER.decode([*ids, *TOKENIZER.encode("no no")]) == "try 1"


def test_empty_text_is_no_tokens():
    assert TOKENIZER.encode("") == []
    assert TOKENIZER.decode([]) == ""


@pytest.mark.parametrize("text", ["try 1 + banana", f"try {EOS}", "try  1", "100", "04"])
def test_unknown_word_is_named(text):
    unknown = {"try 1 + banana": "banana", f"try {EOS}": EOS, "try  1": ""}.get(text, text)
    with pytest.raises(UserError, match=f"the word '{unknown}' in"):
        TOKENIZER.encode(text)


@pytest.mark.parametrize("index", [-1, VOCAB_SIZE])
def test_decode_refuses_ids_outside_the_vocabulary(index):
    with pytest.raises(UserError, match=f"token id {index} is outside"):
        TOKENIZER.decode([5, index])


@pytest.mark.parametrize("words", [("a", "b", "c"), (PAD, BOS, EOS, "a", "a")])
def test_a_tokenizer_needs_specials_first_and_distinct_words(words):
    with pytest.raises(UserError, match="distinct and begin with"):
        Tokenizer(words)
