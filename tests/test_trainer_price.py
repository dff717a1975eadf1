"""What the drafter's trainer gains: rivals do the same work, and what they say of it adds up."""

import pathlib
import time

import jax
import numpy as np
import pytest
import toy_run

from tlt_jax import benchmark, setup, trainer_price
from tlt_jax.race import Subject
from tlt_jax.reporting import benchmark_plots
from tlt_jax.trainer_price import Sequences

LENGTHS = (3, 39, 17, 5, 22, 8, 30, 4, 11, 26)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    config = toy_run.changed(
        toy_run.CONFIG,
        policy={"num_layers": 1},
        task={"data_dir": str(folder / "data")},
        rollout={"max_response_length": 24, "length_buckets": (48, 72)},
        warm_start={"batch_rows": 4},
        benchmark={"repeats": 3},
    )
    task, prompts = setup.load_task(config)
    target, draft = setup.initial_policy(config), setup.initial_drafter(config)
    stop_tokens = (task.tokenizer.eos_id,)
    return Subject(config, prompts, stop_tokens, target, {"trained": draft}, "", folder)


@pytest.fixture(scope="module")
def sequences(subject):
    """Sequences of `LENGTHS` random tokens, with features."""
    rng = np.random.default_rng(0)
    tokens = [rng.integers(0, subject.config.policy.vocab_size, length) for length in LENGTHS]
    return trainer_price.with_features(subject.config, subject.target, Sequences(tokens, None))


def _sums(subject, microbatches):
    params = subject.drafters["trained"]
    return trainer_price.gradient_sum(params, subject.target, microbatches, subject.config)


def test_packed_rows_and_padded_batches_give_the_same_gradient(subject, sequences):
    packed = trainer_price.packed(subject.config, sequences)
    padded = trainer_price.padded(subject.config, sequences)
    assert [rows.tokens.shape for rows in packed] == [(4, 72)]
    assert {rows.tokens.shape for rows in padded} == {(4, 48)} and len(padded) == 3
    one, other = (_sums(subject, side) for side in (packed, padded))
    assert one.weight == other.weight == sum(LENGTHS) - len(LENGTHS)
    assert one.loss == pytest.approx(float(other.loss), rel=1e-5)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one.gradients))
    assert scale > 1e-2
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale),
        one.gradients,
        other.gradients,
    )


def test_a_batch_is_padded_to_its_own_longest_sequence(subject):
    """To the next bucket, that is: 48 as long as nothing is longer."""
    order = np.random.default_rng(subject.config.seed).permutation(8)
    lengths = np.full(8, 5)
    lengths[order[6]] = 50
    sequences = Sequences([np.ones(length, np.int32) for length in lengths], None)
    shapes = [rows.tokens.shape for rows in trainer_price.padded(subject.config, sequences)]
    assert shapes == [(4, 48), (4, 72)]


def test_features_stored_and_recomputed_give_the_same_gradient(subject, sequences):
    sums = []
    for stored in (True, False):
        config = toy_run.changed(subject.config, drafter={"store_features": stored})
        buffer = trainer_price.filled_buffer(config, sequences)
        assert (buffer.features is not None) == stored
        arguments = subject.drafters["trained"], subject.target, buffer, jax.random.key(0), config
        sums.append(trainer_price.draw_and_add(*arguments))
    assert sums[0].weight == sums[1].weight > 0
    assert sums[0].loss == pytest.approx(float(sums[1].loss), rel=1e-5)


@pytest.fixture(scope="module")
def findings(subject):
    return {found["measured"]: found for found in trainer_price.measure(subject)}


def _rows(findings, measured):
    return {row["rival"]: row for row in findings[measured]["rivals"]}


def test_times_are_those_of_the_same_repeat(subject, findings):
    for found in findings.values():
        first, *others = found["rivals"]
        assert first["times"] == first["times_min"] == first["times_max"] == 1
        for row in others:
            assert len(row["seconds_all"]) == subject.config.benchmark.repeats
            ratios = np.array(row["seconds_all"]) / np.array(first["seconds_all"])
            assert row["times"] == pytest.approx(np.median(ratios))
            assert row["times_min"] <= row["times"] <= row["times_max"]
            assert row["seconds_min"] <= row["seconds"] <= row["seconds_max"]


def test_speed_counts_true_tokens_alone(subject, findings):
    rows = _rows(findings, "packing")
    packed, padded = rows["packed rows"], rows["padded batches"]
    assert packed["samples"] == padded["samples"] == 4 * subject.config.rollout.num_sequences
    assert packed["tokens"] == padded["tokens"] < 72 * packed["samples"]
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
    assert 1 >= packed["filled"] > padded["filled"] > 0


def test_the_drafter_alone_is_a_small_part_of_everything(subject, findings):
    rows = _rows(findings, "checkpoints")
    size = 4 * sum(leaf.size for leaf in jax.tree.leaves(subject.drafters["trained"]))
    assert rows["selective"]["megabytes"] == pytest.approx(size / 1e6)
    assert rows["synchronous"]["megabytes"] == rows["asynchronous"]["megabytes"]
    assert rows["selective"]["megabytes"] < rows["synchronous"]["megabytes"] / 9


def test_rows_without_features_are_smaller(subject, findings):
    rows = _rows(findings, "features")
    width = subject.config.policy.width
    assert rows["stored"]["megabytes"] == pytest.approx(72 * (4 * width + 12) / 1e6)
    assert rows["recomputed"]["megabytes"] == pytest.approx(72 * 12 / 1e6)


def test_a_rival_counts_what_it_waits_for_and_the_next_begins_with_nothing_being_written(
    subject, monkeypatch
):
    """Writers that are slow on threads of their own hold up the synchronous one alone."""
    events = []

    class Slow:
        """Saves at once and writes for a twentieth of a second."""

        def __init__(self, *_):
            self._until = 0.0

        def save(self, *_):
            assert not any(writer.writing for writer in writers), "the one before still writes"
            writers[:] = [self]
            self._until = time.perf_counter() + 0.05

        @property
        def writing(self):
            return time.perf_counter() < self._until

        def wait(self):
            time.sleep(max(self._until - time.perf_counter(), 0))

        def close(self):
            events.append("closed")

    writers: list[Slow] = []
    monkeypatch.setattr(trainer_price, "Checkpoints", Slow)
    monkeypatch.setattr(trainer_price, "DrafterVersions", Slow)
    rows = {row["rival"]: row for row in trainer_price.race_checkpoints(subject)["rivals"]}
    assert rows["synchronous"]["seconds_min"] >= 0.05
    assert rows["asynchronous"]["seconds"] < 0.025 > rows["selective"]["seconds"]
    assert events == ["closed", "closed"]


def test_nothing_is_left_in_the_folder(subject, findings):
    assert [path.name for path in subject.folder.iterdir()] == ["data"]


def test_every_finding_is_told_and_drawn(findings, tmp_path):
    for found in findings.values():
        text = benchmark.told(found).splitlines()
        assert len(text) == 2 + len(found["rivals"])
        for line, row in zip(text[2:], found["rivals"], strict=True):
            assert line.startswith(row["rival"])
            assert f"{1e3 * row['seconds']:.2f}" in line and f"{row['times']:.3f}" in line
        for line in benchmark.lines(found):
            assert line["measured"] == found["measured"]
    drawn = benchmark_plots.write(tmp_path, "trainer", list(findings.values()))
    assert drawn == pathlib.Path(tmp_path / "plots" / "benchmark_trainer.png")
    assert drawn.stat().st_size > 10_000
