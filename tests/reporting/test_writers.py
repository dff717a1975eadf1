"""Log writers: a crash in the middle of a line costs that line and nothing else."""

import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from tlt_jax.reporting.run_files import METRIC_FIELDS
from tlt_jax.reporting.writers import (
    JsonlWriter,
    TensorboardWriter,
    progress_line,
    read_jsonl,
    scalar_tags,
    write_atomically,
)
from tlt_jax.types import UserError


def test_records_are_on_disk_before_the_next_is_written(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"step": 0, "x": np.float32(0.5), "y": np.arange(2)})
        assert read_jsonl(path) == [{"step": 0, "x": 0.5, "y": [0, 1]}]
        writer.write({"step": np.int64(1)})
        assert [row["step"] for row in read_jsonl(path)] == [0, 1]


def test_nan_is_kept_apart_from_null(tmp_path):
    with JsonlWriter(tmp_path / "log.jsonl") as writer:
        writer.write({"a": float("nan"), "b": None})
    (row,) = read_jsonl(tmp_path / "log.jsonl")
    assert np.isnan(row["a"])
    assert row["b"] is None


def test_a_value_that_is_not_json_writes_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonlWriter(path) as writer, pytest.raises(TypeError, match="cannot hold a set"):
        writer.write({"a": 1, "b": {1, 2}})
    assert path.read_text() == ""


@pytest.mark.parametrize("torn", ['{"step": 1, "re', "{", '"', "\0\0\0"])
def test_torn_last_line_is_dropped_and_never_glued_to_the_next_record(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n' + torn)
    assert read_jsonl(path) == [{"step": 0}]
    with JsonlWriter(path) as writer:
        writer.write({"step": 1})
    assert read_jsonl(path) == [{"step": 0}, {"step": 1}]


def test_whole_last_record_without_newline_counts(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    with JsonlWriter(path) as writer:
        writer.write({"step": 2})
    assert [row["step"] for row in read_jsonl(path)] == [0, 1, 2]


@pytest.mark.parametrize("line", ["{", "[1]", "", "\udcff"])
def test_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_bytes(f'{{"step": 0}}\n{line}\n{{"step": 1}}\n'.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"log\.jsonl, line 2: "):
        read_jsonl(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        read_jsonl(tmp_path / "metrics.jsonl")


def test_truncate_drops_what_will_run_again_and_appending_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"step": step, "chunk": chunk} for step in range(3) for chunk in range(2)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "ch')
    with JsonlWriter(path) as writer:
        writer.truncate_after(2)
        writer.write({"step": 2, "chunk": 0})
    assert read_jsonl(path) == [*lines[:4], {"step": 2, "chunk": 0}]
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_truncate_to_step_zero_empties_and_beyond_the_end_keeps_all(tmp_path):
    with JsonlWriter(tmp_path / "log.jsonl") as writer:
        writer.write({"step": 0})
        writer.truncate_after(1)
        assert read_jsonl(writer.path) == [{"step": 0}]
        writer.truncate_after(0)
        assert read_jsonl(writer.path) == []


def test_truncate_refuses_records_without_step_and_leaves_the_file(tmp_path):
    path = tmp_path / "log.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"step": 0})
        writer.write({"name": "x"})
        with pytest.raises(UserError, match="line 2"):
            writer.truncate_after(0)
    assert len(read_jsonl(path)) == 2


def test_atomic_write_replaces_content_keeps_mode_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("old")
    path.chmod(0o640)
    write_atomically(path, b"new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def _events(folder):
    """TensorBoard events; a record is length, checksum, bytes, checksum (TFRecord)."""
    for path in folder.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size


def test_tensorboard_holds_grouped_scalars_and_leaves_null_out(tmp_path, make_metrics):
    writer = TensorboardWriter(tmp_path / "tensorboard")
    writer.write(0, make_metrics(0, drafter_loss=None, kl=float("nan")))
    writer.write(3, make_metrics(3, reward_mean=0.25))
    writer.close()
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in _events(tmp_path / "tensorboard")
        for value in event.summary.value
    }
    assert scalars[3, "reward/mean"] == 0.25
    assert scalars[3, "drafter/accept_at_2"] == pytest.approx(0.4)
    assert scalars[3, "seconds/learn"] == 1.0
    assert scalars[3, "drafter/loss"] == 1.5
    assert (0, "drafter/loss") not in scalars
    assert np.isnan(scalars[0, "learner/kl"])


def test_resumed_tensorboard_hides_the_steps_that_run_again(tmp_path, make_metrics):
    writer = TensorboardWriter(tmp_path, first_step=5)
    writer.write(5, make_metrics(5))
    writer.close()
    starts = [event.step for event in _events(tmp_path) if event.HasField("session_log")]
    assert starts == [5]


def test_every_metric_has_a_group(make_metrics):
    row = make_metrics()
    assert set(row) == set(METRIC_FIELDS)
    groups = {tag.split("/")[0] for tag in scalar_tags(row)}
    assert groups == {"reward", "rollout", "drafter", "learner", "seconds"}
    assert scalar_tags({"step": 1, "new": 2})["other/new"] == 2.0


def test_progress_line(make_metrics):
    row = make_metrics(
        12,
        reward_mean=0.53,
        response_length_mean=62.0,
        response_length_p99=310.0,
        accept_length=3.41,
        idle_used_share=0.78,
        seconds={"rollout": 0.61, "learn": 0.8, "total": 1.52},
    )
    assert progress_line(row, num_steps=100) == (
        "step  12/100 | reward  0.53 | len    62 p99   310 | accept  3.41 | idle used  78% | "
        "rollout   0.61s reward   0.00s learn   0.80s total   1.52s"
    )


def test_progress_lines_align(make_metrics):
    rows = [
        make_metrics(0, idle_used_share=None, reward_mean=-1.0),
        make_metrics(99, idle_used_share=1.0, response_length_p99=32768.0, reward_mean=12.5),
        make_metrics(7, seconds={"rollout": 812.3, "total": 900.0}, accept_length=10.0),
    ]
    lines = [progress_line(row, num_steps=100) for row in rows]
    bars = [[i for i, char in enumerate(line) if char == "|"] for line in lines]
    assert bars[0] == bars[1] == bars[2]
    assert "idle used    - |" in lines[0]


def test_progress_line_shows_what_is_broken_and_late_compiles(make_metrics):
    row = make_metrics(
        0,
        reward_mean=float("nan"),
        grad_norm=float("inf"),
        accept_by_position=[0.5, float("nan")],
        seconds={"learn": float("nan")},
        compiles=2,
    )
    line = progress_line(row, num_steps=1)
    assert "| reward   nan |" in line
    assert line.endswith(
        "| compiled 2 | NOT FINITE reward_mean=nan accept_by_position=nan grad_norm=inf "
        "seconds.learn=nan"
    )
