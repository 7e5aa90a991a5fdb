"""What is known of a run before it has a state."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from espalier.launch.run.resolved import ResolvedRun


@pytest.fixture
def run():
    stream = types.SimpleNamespace(epochs=lambda batches: {"a": batches / 8})
    mesh = types.SimpleNamespace(devices=np.array(jax.devices()[:1]))
    known = {
        "program": types.SimpleNamespace(mesh=mesh, train_flops_per_unit=3.0),
        "unit": "tokens",
        "stream": stream,
        "learning_rates": np.array([0.5, 0.25, 0.0], np.float32),
    }
    names = [field.name for field in dataclasses.fields(ResolvedRun)]
    return ResolvedRun(**{**dict.fromkeys(names), **known})


def test_a_row_has_the_rate_that_its_last_update_used(run):
    assert run.row_metrics(0, 0, 0.0) == {"learning_rate": 0.5, "epochs/a": 0.0}
    assert run.row_metrics(2, 4, 0.0) == {"learning_rate": 0.25, "epochs/a": 0.5}


def test_a_run_that_has_made_more_updates_than_it_now_asks_for_has_the_last_rate(run):
    """Its step is saved, or its hooks run, although nothing is left to do."""
    assert [run.learning_rate(updates) for updates in (0, 2, 3, 1000)] == [0.5, 0.0, 0.0, 0.0]


def test_throughput_is_told_once_it_is_known_and_utilisation_where_the_peak_is(run, monkeypatch):
    known = {"tokens_per_second": 10.0, "model_flops_per_second": 30.0}
    row = run.row_metrics(1, 8, 10.0)
    assert row == {"learning_rate": 0.5, **known, "epochs/a": 1.0}
    monkeypatch.setattr("espalier.trainers.telemetry.flops.peak_flops", lambda device: 120.0)
    assert list(run.row_metrics(1, 8, 10.0)) == ["learning_rate", *known, "mfu", "epochs/a"]
    assert run.row_metrics(1, 8, 10.0)["mfu"] == 0.25


def test_it_does_not_change(run):
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.total_steps = 3
