"""Real signals to real processes."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from espalier.trainers.signals import StopRequest
from tests.processes import free_port, with_devices

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.reached(1)
        os.kill(os.getpid(), number)
        assert stop.reached(2) and stop.reached(3)
        assert signal.getsignal(number) == before  # A second signal acts as usual.
    assert signal.getsignal(number) == before


def test_a_stop_can_be_asked_for_without_a_signal():
    with StopRequest() as stop:
        stop.request()
        assert stop.reached(1)


def start(script, *arguments, devices=1):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        env=with_devices(devices, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_sigterm_ends_a_run_with_its_step_saved(tmp_path):
    script = """
        import sys, time
        import jax.numpy as jnp
        from espalier.trainers.checkpoints.checkpoint import Checkpointer
        from espalier.trainers.signals import StopRequest
        with Checkpointer(sys.argv[1]) as checkpointer, StopRequest() as stop:
            print("ready", flush=True)
            for step in range(1, 100000):
                time.sleep(0.005)
                if stop.reached(step):
                    checkpointer.save(step, {"step": jnp.asarray(step)})
                    break
        print("stopped", step, checkpointer.all_steps())
    """
    process = start(script, tmp_path)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    step = out.split()[1]
    assert out == f"stopped {step} [{step}]\n"
    assert (tmp_path / step / "manifest.json").exists()


@pytest.mark.multiprocess
@pytest.mark.parametrize("service", [True, False])
def test_all_processes_stop_at_the_same_step_when_one_is_asked(service):
    script = """
        import os, signal, sys, time
        import jax
        index, service = int(sys.argv[1]), sys.argv[3] == "True"
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_enable_preemption_service", service)
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, index)
        from espalier.trainers import signals
        signals.COMPARE_EVERY = 3
        with signals.StopRequest() as stop:
            for step in range(1, 2000):
                time.sleep(0.01)
                if step == 7 and index == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                if stop.reached(step):
                    break
        print("stopped", step)
    """
    port = free_port()
    processes = [start(script, i, port, service) for i in range(2)]
    try:
        results = [process.communicate(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    steps = [int(out.split()[-1]) for out, _ in results]
    assert steps[0] == steps[1] < 1999, results
    assert steps[0] >= 7 and (service or steps[0] == 9)
