"""Files of metrics that survive restarts, odd numbers and full disks."""

import functools
import json
import math
import sys
import types

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from trainers.telemetry import metric_writers


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


def test_tensorboard_writes_event_files(tmp_path):
    writer = metric_writers.TensorBoardWriter(str(tmp_path), first_step=3)
    writer.write(3, {"loss": 0.25})
    writer.close()
    (file,) = tmp_path.iterdir()
    values = {}
    data = file.read_bytes()
    while data:  # records: length, its checksum, event, its checksum
        length = int.from_bytes(data[:8], "little")
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        values.update({v.tag: (event.step, v.simple_value) for v in event.summary.value})
    assert values == {"loss": (3, 0.25)}


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


def test_a_missing_wandb_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(metric_writers.WriterError, match=r"espalier-lm\[wandb\]"):
        metric_writers.WandbWriter(project="x")


def test_wandb_gets_scalars_by_step(monkeypatch):
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    class Wandb:
        @staticmethod
        def init(**settings):
            calls.append(settings)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    writer = metric_writers.WandbWriter(project="p", name="n", mode="offline")
    writer.write(2, {"loss": 1.0})
    writer.close()
    settings = {"project": "p", "name": "n", "config": None, "mode": "offline"}
    assert calls == [settings, (2, {"loss": 1.0}), "finished"]


def test_multi_writer_passes_everything_on(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    writer = metric_writers.MultiWriter([metric_writers.JsonlWriter(path) for path in paths])
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 0.5})
    writer.close()
    assert [len(metric_writers.read_jsonl(path)) for path in paths] == [2, 2]
