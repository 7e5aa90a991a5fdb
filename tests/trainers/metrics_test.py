"""Metrics: exact quotients, one step late, and files that survive restarts and odd numbers."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainers import metrics


def test_any_split_of_a_batch_gives_the_mean_over_tokens():
    rng = np.random.default_rng(0)
    nll, weight = rng.random(12), rng.integers(0, 2, 12).astype(float)
    total = None
    for part in np.split(np.arange(12), [3, 4, 9]):
        total = metrics.add(total, {"loss": ((nll * weight)[part].sum(), weight[part].sum())})
    expected = np.average(nll, weights=weight)
    assert metrics.divide(total)["loss"] == pytest.approx(expected, rel=1e-12)


def test_vectors_are_named_and_what_has_no_weight_is_left_out():
    pairs = {"source_loss": (np.array([6.0, 0.0, 1.0]), np.array([3.0, 0.0, 2.0])), "x": (1.0, 0.0)}
    names = {"source_loss": ["prose", "code", "web"]}
    assert metrics.divide(pairs, names) == {"source_loss/prose": 2.0, "source_loss/web": 0.5}
    assert set(metrics.divide(pairs)) == {"source_loss/0", "source_loss/2"}
    with pytest.raises(ValueError, match="zip"):
        metrics.divide(pairs, {"source_loss": ["prose"]})


def test_addition_keeps_names_of_either_side_and_runs_under_jit():
    added = jax.jit(metrics.add)(
        {"a": (jnp.ones(2), jnp.ones(2))}, {"a": (jnp.ones(2), jnp.ones(2)), "b": (1.0, 1.0)}
    )
    assert metrics.divide(added) == {"a/0": 1.0, "a/1": 1.0, "b": 1.0}


def test_late_fetch_is_one_step_behind_and_flushes_the_last():
    late = metrics.LateFetch()
    got = [late.push(step, {"loss": (jnp.float32(step), jnp.float32(1))}) for step in (1, 2, 3)]
    got.append(late.flush())
    assert got[0] is None
    assert [step for step, _ in got[1:]] == [1, 2, 3]
    assert [float(values["loss"][0]) for _, values in got[1:]] == [1.0, 2.0, 3.0]
    assert isinstance(got[1][1]["loss"][0], np.ndarray | np.generic)
    assert late.flush() is None


def test_late_fetch_does_not_wait_for_the_step_just_dispatched(monkeypatch):
    fetched = []
    monkeypatch.setattr(metrics.jax, "device_get", lambda x: fetched.append(x) or x)
    late = metrics.LateFetch()
    late.push(1, {"a": 1})
    assert fetched == []
    late.push(2, {"a": 2})
    assert fetched == [{"a": 1}]


def test_jsonl_is_strict_json_and_reads_back(tmp_path):
    path = str(tmp_path / "sub" / "metrics.jsonl")
    writer = metrics.JsonlWriter(path)
    writer.write(1, {"loss": np.float32(0.5), "bad": math.nan, "up": math.inf, "down": -math.inf})
    writer.text(1, "sample", "NaN-like text\nof two lines")
    writer.close()

    def no_constants(name):
        raise AssertionError(f"{name} is not JSON")

    with open(path) as file:
        rows = [json.loads(line, parse_constant=no_constants) for line in file]
    assert len(rows) == 2
    first, second = metrics.read_jsonl(path)
    assert first["loss"] == 0.5
    assert math.isnan(first["bad"])
    assert (first["up"], first["down"]) == (math.inf, -math.inf)
    assert second["sample"] == "NaN-like text\nof two lines"


def test_a_restart_drops_what_it_will_write_again_and_lines_cut_short(tmp_path):
    path = str(tmp_path / "metrics.jsonl")
    writer = metrics.JsonlWriter(path)
    for step in range(1, 6):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with open(path, "a") as file:
        file.write('{"step": 6, "lo')
    again = metrics.JsonlWriter(path, first_step=4)
    for step in range(4, 7):
        again.write(step, {"loss": 10.0 * step})
    again.close()
    rows = metrics.read_jsonl(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == [1, 2, 3, 40, 50, 60]


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs tensorboardX")
    from tensorboardX.proto import event_pb2

    writer = metrics.TensorBoardWriter(str(tmp_path), first_step=3)
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


def test_a_missing_wandb_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(metrics.WriterError, match=r"espalier-lm\[wandb\]"):
        metrics.WandbWriter(project="x")


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
    writer = metrics.WandbWriter(project="p", name="n", mode="offline")
    writer.write(2, {"loss": 1.0})
    writer.close()
    settings = {"project": "p", "name": "n", "config": None, "mode": "offline"}
    assert calls == [settings, (2, {"loss": 1.0}), "finished"]


def test_multi_writer_passes_everything_on(tmp_path):
    paths = [str(tmp_path / name) for name in ("a", "b")]
    writer = metrics.MultiWriter([metrics.JsonlWriter(path) for path in paths])
    writer.write(1, {"loss": 1.0})
    writer.text(1, "t", "x")
    writer.flush()
    writer.close()
    assert [len(metrics.read_jsonl(path)) for path in paths] == [2, 2]
