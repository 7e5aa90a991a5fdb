"""Files of metrics that survive restarts, odd numbers and full disks."""

import functools
import json
import math
import os
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from espalier.trainers.telemetry import metric_writers


def test_jsonl_is_strict_json_and_reads_back(tmp_path):
    path = str(tmp_path / "sub" / "metrics.jsonl")
    writer = metric_writers.JsonlWriter(path)
    writer.write(1, {"loss": np.float32(0.5), "bad": math.nan, "up": math.inf, "down": -math.inf})
    writer.close()

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    with open(path) as file:
        rows = [json.loads(line, parse_constant=no_constants) for line in file]
    assert len(rows) == 1
    (first,) = metric_writers.read_jsonl(path)
    assert first["loss"] == 0.5
    assert math.isnan(first["bad"])
    assert (first["up"], first["down"]) == (math.inf, -math.inf)


def test_a_restart_drops_what_it_will_write_again_and_lines_cut_short(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    writer = metric_writers.JsonlWriter(path)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    again = metric_writers.JsonlWriter(path, first_step=4)
    for step in range(4, 7):
        again.write(step, {"loss": 10.0 * step})
    again.close()
    rows = metric_writers.read_jsonl(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == [1, 2, 3, 40, 50, 60]


def test_a_restart_after_a_rollback_does_not_bring_back_what_was_given_up(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    writer = metric_writers.JsonlWriter(path)
    for step in (4, 5, 6, 7):
        writer.write(step, {"loss": 1.0})
    writer.write(7, {"rollback_to": 4.0})
    writer.write(5, {"loss": 2.0})
    writer.close()
    # The mark carries the bad step's number, so it is not among the rows before step 6.
    again = metric_writers.JsonlWriter(path, first_step=6)
    again.write(6, {"loss": 3.0})
    again.close()
    rows = metric_writers.rows_in_force(path)
    assert [(row["step"], row["loss"]) for row in rows] == [(4, 1.0), (5, 2.0), (6, 3.0)]


@pytest.fixture
def marked(tmp_path):
    """A file with rows of steps 1 to 8 and a checkpoint at every second one; the marks in those of 6 and 8."""
    path = str(tmp_path / "metrics.jsonl")
    writer, marks = metric_writers.JsonlWriter(path, marks=()), {}
    for step in range(1, 9):
        writer.write(step, {"loss": step / 7})
        if step % 2 == 0:
            marks[step] = json.loads(json.dumps(writer.sync()[metric_writers.MARKS]))
    writer.close()
    return path, marks[6], marks[8]


def steps_of(path):
    return [row["step"] for row in metric_writers.read_jsonl(path)]


def test_a_run_that_goes_on_keeps_the_bytes_up_to_its_checkpoint(marked, caplog):
    path, at_6, _ = marked
    with open(path, "rb") as file:
        lines = file.readlines()
    with open(path, "ab") as file:
        file.write(b'{"step": 9, "lo')
    writer = metric_writers.JsonlWriter(path, marks=at_6)
    writer.write(7, {"loss": 0.5})
    again = writer.sync()[metric_writers.MARKS]
    writer.close()
    with open(path, "rb") as file:
        assert file.readlines()[:-1] == lines[:6]
    assert again[:-1] == at_6 and steps_of(path) == [1, 2, 3, 4, 5, 6, 7]
    assert not caplog.records
    metric_writers.JsonlWriter(path, marks=again).close()
    assert not caplog.records and steps_of(path) == [1, 2, 3, 4, 5, 6, 7]


def flip_digit(data):
    at = data.index(b"0.7142")  # of step 5
    return data[: at + 3] + b"2" + data[at + 4 :]


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (flip_digit, 4),
        (lambda data: data[: data.index(b'"step": 4') + 5], 2),
        (lambda data: data.replace(b"\n", b"\xff\n", 3), 0),
        (lambda data: bytes(len(data)), 0),
        (lambda data: b"", 0),
        (lambda data: data.replace(b"0.", b"1."), 0),
        (lambda data: data[: data.index(b'{"step": 7')] + b"\n" + data[-9:], 6),
        (None, 0),
    ],
    ids=["digit", "cut", "not UTF-8", "zeroes", "empty", "another run's", "a row lost", "deleted"],
)
def test_a_damaged_file_is_said_set_aside_and_continued_where_it_is_good(
    marked, caplog, damage, left
):
    path, _, at_8 = marked
    with open(path, "rb") as file:
        data = file.read()
    if damage is None:
        os.unlink(path)
    else:
        with open(path, "wb") as file:
            file.write(damage(data))
    writer = metric_writers.JsonlWriter(path, marks=at_8)
    (record,) = caplog.records
    message = record.getMessage()
    assert path in message and "\n" not in message
    assert (
        f"after step {left} up to step 8 are lost" if left else "up to step 8 are lost"
    ) in message
    assert steps_of(path) == list(range(1, left + 1))
    if damage is not None:
        with open(f"{path}.damaged", "rb") as file:
            assert file.read() == damage(data)
    writer.write(9, {"loss": 1.0})
    marks = writer.sync()[metric_writers.MARKS]
    writer.close()
    caplog.clear()
    metric_writers.JsonlWriter(path, marks=marks).close()
    assert not caplog.records and steps_of(path) == [*range(1, left + 1), 9]


def test_a_second_damage_does_not_replace_the_copy_of_the_first(marked):
    path, _, at_8 = marked
    for content in (b"one", b"two"):
        with open(path, "wb") as file:
            file.write(content)
        metric_writers.JsonlWriter(path, marks=at_8).close()
    for name, content in (("damaged", b"one"), ("damaged1", b"two")):
        with open(f"{path}.{name}", "rb") as file:
            assert file.read() == content


def test_checkpoints_of_a_long_run_hold_few_marks(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    writer = metric_writers.JsonlWriter(path, marks=())
    for step in range(1, 301):
        writer.write(step, {})
        marks = writer.sync()[metric_writers.MARKS]
        assert len(marks) <= 64 and marks[-1][:2] == [step, os.path.getsize(path)]
    writer.close()
    metric_writers.JsonlWriter(path, marks=marks).close()
    assert steps_of(path) == list(range(1, 301))


@pytest.mark.parametrize("line", [b'{"step": 2, "loss": 0.\xff}\n', b"\0\0\0\0", b"7\n", b'{"a": 1}\n',
                                  b'{"step": 2, "loss": "x"}\n'])  # fmt: skip
def test_a_line_that_is_no_row_is_one_clear_error_and_left_out_without_marks(
    tmp_path, line, caplog
):
    path = str(tmp_path / "metrics.jsonl")
    with open(path, "wb") as file:
        file.write(b'{"step": 1, "loss": 0.5}\n' + line)
    with pytest.raises(metric_writers.DamagedRowsError, match=r"metrics.jsonl is damaged: line 2"):
        metric_writers.rows_in_force(path)
    metric_writers.JsonlWriter(path, first_step=4).close()
    assert "line 2 is lost" in caplog.text and os.path.exists(f"{path}.damaged")
    assert metric_writers.rows_in_force(path) == [{"step": 1, "loss": 0.5}]


def _events(folder):
    """Yields the events of a folder's one file."""
    (file,) = folder.iterdir()
    data = file.read_bytes()
    while data:  # records: length, its checksum, event, its checksum
        length = int.from_bytes(data[:8], "little")
        yield event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_tensorboard_hides_what_a_rollback_discards(tmp_path):
    writer = metric_writers.TensorBoardWriter(str(tmp_path))
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.write(5, {"rollback_to": 2.0})
    writer.write(3, {"loss": 30.0})
    writer.close()
    points = {}
    for event in _events(tmp_path):
        if event.HasField("session_log"):  # TensorBoard drops this and later steps
            points = {step: value for step, value in points.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == "train/loss":
                points[event.step] = value.simple_value
    assert points == {1: 1.0, 2: 2.0, 3: 30.0}


def test_tensorboard_writes_event_files(tmp_path):
    writer = metric_writers.TensorBoardWriter(str(tmp_path), first_step=3)
    written = ("loss", "llh/chosen", "mfu", "tokens_per_second", "time/step", "eval/a/loss")
    writer.write(3, dict.fromkeys(written, 0.25))
    writer.close()
    values = {v.tag: (e.step, v.simple_value) for e in _events(tmp_path) for v in e.summary.value}
    tags = ["train/loss", "train/llh/chosen", "time/mfu", "time/tokens_per_second"]
    assert values == dict.fromkeys([*tags, "time/step", "eval/a/loss"], (3, 0.25))


def test_a_full_disk_is_one_clear_error_and_never_waited_for(tmp_path, monkeypatch):
    full = metric_writers.JsonlWriter("/dev/full")
    with pytest.raises(metric_writers.WriterError, match="cannot write /dev/full: No space left"):
        full.write(1, {"loss": 1.0})
    full.close()

    opened = functools.partial(open, "/dev/full", "wb")
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: opened())
    full = metric_writers.TensorBoardWriter(str(tmp_path))
    with pytest.raises(metric_writers.WriterError, match="cannot write .*tfevents.*: No space"):
        for step in range(10_000):  # more than is kept in memory
            full.write(step, {"loss": 1.0})
    full.close()


def test_a_line_cut_by_a_full_disk_is_an_error_and_not_read(tmp_path, monkeypatch):
    writer = metric_writers.JsonlWriter(str(tmp_path / "metrics.jsonl"))
    writer.write(1, {"loss": 1.0})
    write = writer._file.write
    writer._file = types.SimpleNamespace(write=lambda line: write(line[:5]))
    with pytest.raises(metric_writers.WriterError, match="No space left"):
        writer.write(2, {"loss": 1.0})
    assert [row["step"] for row in metric_writers.read_jsonl(tmp_path / "metrics.jsonl")] == [1]


TRACKERS = {"wandb": metric_writers.WandbWriter, "trackio": metric_writers.TrackioWriter}


@pytest.mark.parametrize("package", TRACKERS)
def test_a_missing_tracker_is_one_clear_error(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        metric_writers.WriterError, match=rf"Writer needs .*pip install -e '\.\[{package}\]'"
    ):
        TRACKERS[package](project="x")


@pytest.mark.parametrize("package", TRACKERS)
def test_a_tracker_gets_scalars_by_step(monkeypatch, package):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    class Package:
        @staticmethod
        def init(**settings):
            calls.append(settings)
            return Run()

    monkeypatch.setitem(sys.modules, package, Package)
    writer = TRACKERS[package](project="p", name="n", mode="offline")
    writer.write(2, {"loss": 1.0})
    writer.close()
    settings = {"project": "p", "name": "n", "mode": "offline"}
    assert calls == [settings, (2, {"loss": 1.0}), "finished"]


def test_multi_writer_passes_everything_on(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    writer = metric_writers.MultiWriter([metric_writers.JsonlWriter(path) for path in paths])
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 0.5})
    writer.close()
    assert [len(metric_writers.read_jsonl(path)) for path in paths] == [2, 2]
