"""Datasets on disk, endless prompts, packed demonstrations, and the table of tasks."""

import collections
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tlt_jax.tasks import pipeline
from tlt_jax.tasks.pairs import Pairs
from tlt_jax.tasks.task import get_task
from tlt_jax.types import INVALID, UserError

SMALL = {"num_train": 300, "num_test": 40}
PAIRS = get_task("pairs")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    data_dir = str(tmp_path_factory.mktemp("data"))
    return pipeline.load_source(PAIRS, "mixed", "train", data_dir, **SMALL)


@pytest.fixture(scope="module")
def packed(source):
    return pipeline.pack_demonstrations(source, PAIRS, seed=0, row_length=512)


def _refuse(*args, **kwargs):
    raise AssertionError("the dataset is generated although it exists")


def _examples(source):
    return source.__getitems__(list(range(len(source))))


@pytest.mark.parametrize("name", ["pairs", "countdown"])
def test_both_tasks_make_their_data_and_keep_test_problems_apart(name, tmp_path):
    task = get_task(name)
    assert task.name == name
    splits = [
        _examples(pipeline.load_source(task, "easy", split, str(tmp_path), **SMALL))
        for split in ("train", "test")
    ]
    assert [len(split) for split in splits] == list(SMALL.values())
    # The same numbers in another order are the same problem.
    train, test = ({tuple(sorted(e["prompt"].decode().split())) for e in s} for s in splits)
    assert not train & test


def test_prepared_data_is_reused(tmp_path, monkeypatch):
    first = pipeline.load_source(PAIRS, "mixed", "train", str(tmp_path), **SMALL)
    monkeypatch.setattr(Pairs, "_generate_examples", _refuse)
    again = pipeline.load_source(PAIRS, "mixed", "train", str(tmp_path), **SMALL)
    assert _examples(first) == _examples(again)
    with pytest.raises(AssertionError, match="generated although"):
        pipeline.load_source(PAIRS, "mixed", "train", str(tmp_path), num_train=301, num_test=40)


def test_generation_is_deterministic(source, tmp_path):
    again = pipeline.load_source(PAIRS, "mixed", "train", str(tmp_path), **SMALL)
    assert _examples(source) == _examples(again)


def test_a_generation_that_died_leaves_nothing_behind(source, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Pairs, "demonstrate", staticmethod(lambda rng, prompt: 1 / 0))
        pipeline.load_source(PAIRS, "mixed", "train", str(tmp_path), **SMALL)
    assert not list(tmp_path.rglob("*.array_record*"))
    again = pipeline.load_source(PAIRS, "mixed", "train", str(tmp_path), **SMALL)
    assert _examples(source) == _examples(again)


def test_the_loser_of_a_race_uses_the_dataset_of_the_winner(source, tmp_path, monkeypatch):
    demonstrate = Pairs.demonstrate
    winners = []

    def interrupted(rng, prompt):
        monkeypatch.setattr(Pairs, "demonstrate", staticmethod(demonstrate))
        winners.append(pipeline.load_source(PAIRS, "mixed", "train", str(tmp_path), **SMALL))
        return demonstrate(rng, prompt)

    monkeypatch.setattr(Pairs, "demonstrate", staticmethod(interrupted))
    loser = pipeline.load_source(PAIRS, "mixed", "train", str(tmp_path), **SMALL)
    assert len(winners) == 1
    assert _examples(loser) == _examples(winners[0]) == _examples(source)


def test_an_unwritable_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the dataset pairs/mixed.*name a writable"):
        pipeline.load_source(PAIRS, "mixed", "train", str(tmp_path / "file" / "data"))


@pytest.mark.parametrize(
    ("mix", "split", "sentence"),
    [
        ("mixd", "train", "called 'mixd'; did you mean 'mixed'"),
        ("mixed", "tset", "no split 'tset'; did you mean 'test'"),
    ],
)
def test_unknown_names_get_the_nearest_right_one(mix, split, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        pipeline.load_source(PAIRS, mix, split, str(tmp_path))


def test_an_unknown_task_gets_the_nearest_right_one():
    with pytest.raises(UserError, match="no task 'pears'; did you mean 'pairs'"):
        get_task("pears")


def test_prompts_depend_on_the_index_alone(source):
    dataset = pipeline.prompt_dataset(source, PAIRS, seed=3)
    forwards = [dataset[i]["prompt"] for i in range(2 * len(source))]
    fresh = pipeline.prompt_dataset(source, PAIRS, seed=3)
    assert [fresh[i]["prompt"] for i in reversed(range(2 * len(source)))] == forwards[::-1]


def test_every_epoch_has_every_prompt_in_its_own_order(source):
    count = len(source)
    prompts = sorted(example["prompt"].decode() for example in _examples(source))
    epochs = []
    for seed in (3, 30):
        dataset = pipeline.prompt_dataset(source, PAIRS, seed=seed)
        epochs += [[dataset[e * count + i]["prompt"] for i in range(count)] for e in range(2)]
    assert all(sorted(epoch) == prompts for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_prompt_ids_spell_the_prompt_after_bos(source):
    element = pipeline.prompt_dataset(source, PAIRS, seed=0)[10**9]
    ids = element["prompt_ids"]
    assert ids.dtype == np.int32 and ids[0] == PAIRS.tokenizer.bos_id
    assert len(ids) == 1 + len(element["prompt"].split(" ")) <= PAIRS.max_prompt_tokens
    assert PAIRS.tokenizer.decode(ids) == element["prompt"]


def _segments(packed):
    """Yields (row, columns) of each packed segment, in order."""
    for row, ids in enumerate(packed["segment_ids"]):
        for segment in range(ids.max() + 1):
            yield row, np.flatnonzero(ids == segment)


def test_packed_rows_hold_every_token_once(source, packed):
    tokenizer = PAIRS.tokenizer
    expected: collections.Counter[tuple[int, ...]] = collections.Counter()
    for example in _examples(source):
        text = f"{example['prompt'].decode()} {example['demonstration'].decode()}"
        expected[(tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id)] += 1
    found = collections.Counter(
        tuple(packed["tokens"][row, columns].tolist()) for row, columns in _segments(packed)
    )
    assert found == expected


def test_packed_segments_are_contiguous_and_restart_positions(packed):
    for row, columns in _segments(packed):
        np.testing.assert_array_equal(columns, np.arange(columns[0], columns[0] + len(columns)))
        np.testing.assert_array_equal(packed["positions"][row, columns], np.arange(len(columns)))


def test_the_loss_mask_covers_responses_alone(packed):
    colon = PAIRS.tokenizer.encode(":")[0]
    for row, columns in _segments(packed):
        tokens = packed["tokens"][row, columns].tolist()
        prompt_length = tokens.index(colon) + 1  # a prompt ends with its only colon
        expected = np.arange(len(tokens)) >= prompt_length
        np.testing.assert_array_equal(packed["loss_mask"][row, columns], expected)


def test_packed_padding_is_empty_and_types_are_as_stated(packed):
    padding = packed["segment_ids"] == INVALID
    assert padding.any() and (packed["segment_ids"] >= INVALID).all()
    assert (packed["tokens"][padding] == PAIRS.tokenizer.pad_id).all()
    assert not packed["loss_mask"][padding].any() and not packed["positions"][padding].any()
    assert {name: array.dtype.name for name, array in packed.items()} == {
        "tokens": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "loss_mask": "float32",
    }


def test_packing_is_first_fit(packed):
    """No earlier row had room for the segment that opened a later row."""
    used = (packed["segment_ids"] != INVALID).sum(axis=1)
    opening = (packed["segment_ids"] == 0).sum(axis=1)
    row_length = packed["tokens"].shape[1]
    assert len(used) > 2
    for later in range(1, len(used)):
        assert (used[:later] + opening[later] > row_length).all()


def test_packing_follows_the_seed(source, packed):
    again, other = (
        pipeline.pack_demonstrations(source, PAIRS, seed=seed, row_length=512) for seed in (0, 1)
    )
    np.testing.assert_array_equal(packed["tokens"], again["tokens"])
    assert not np.array_equal(packed["tokens"][0], other["tokens"][0])


def test_a_row_shorter_than_a_demonstration_is_refused(source):
    with pytest.raises(UserError, match="row_length is 32, but the longest demonstration"):
        pipeline.pack_demonstrations(source, PAIRS, seed=0, row_length=32)


def test_tensorflow_is_never_imported(tmp_path):
    program = f"""
import sys
from tlt_jax.tasks import pipeline, task
pairs = task.get_task("pairs")
source = pipeline.load_source(pairs, "easy", "test", {str(tmp_path)!r}, num_train=5, num_test=5)
pipeline.pack_demonstrations(source, pairs, seed=0, row_length=512)
pipeline.prompt_dataset(source, pairs, seed=0)[7]
print("tensorflow" in sys.modules)
"""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"
