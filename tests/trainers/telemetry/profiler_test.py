"""The profiler traces the steps of its window and no others."""

import jax
import jax.numpy as jnp
import pytest

from espalier.trainers.telemetry import profiler


@pytest.fixture
def calls(monkeypatch):
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: seen.append(("start", path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    monkeypatch.setattr(jax, "block_until_ready", lambda x: seen.append(("ready", x)))
    return seen


def loop(window, first, last, calls):
    for step in range(first, last):
        with window.step(step):
            calls.append(step)
        window.finished(f"out{step}")
    window.close()


def test_window_counts_from_the_first_step_of_the_process(calls):
    window = profiler.ProfilerWindow(first_step=2, num_steps=2, directory="d")
    loop(window, 100, 106, calls)
    traced = [100, 101, ("start", "d"), 102, 103, ("ready", "out103"), "stop", 104, 105]
    assert calls == traced


def test_a_run_that_ends_inside_the_window_still_gets_its_trace(calls):
    loop(profiler.ProfilerWindow(first_step=1, num_steps=9, directory="d"), 0, 3, calls)
    assert calls == [0, ("start", "d"), 1, 2, "stop"]


def test_a_real_trace_is_written(tmp_path):
    window = profiler.ProfilerWindow(first_step=0, num_steps=1, directory=str(tmp_path))
    with window.step(0):
        out = jax.jit(lambda x: x @ x)(jnp.ones((8, 8)))
    window.finished(out)
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_wrong_window_and_missing_directory():
    with pytest.raises(ValueError, match="num_steps = 0 must be positive"):
        profiler.ProfilerWindow(num_steps=0)
    with (
        pytest.raises(ValueError, match="directory"),
        profiler.ProfilerWindow(first_step=0).step(0),
    ):
        pass
