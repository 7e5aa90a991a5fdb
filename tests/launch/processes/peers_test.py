"""When one process of a run is lost, the others end in time, with one message and a status that says what to do."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from espalier.launch.environment import ROOT
from espalier.launch.processes import supervisor
from tests.processes import free_port, with_devices

pytestmark = pytest.mark.multiprocess

TIMEOUT = 5  # seconds without a sign of life
PROGRAM = '''
"""Exchanges numbers."""

import os
import time


def exchange(*, rounds: int = 100000, failing: int = -1, slow: int = -1):
    import jax
    from jax.experimental import multihost_utils

    from espalier.launch.processes import peers
    from espalier.launch.load.load_run import LoadError

    if slow == jax.process_index():  # its main thread is the last to know that all have come to the end
        go = peers.Peers._go
        peers.Peers._go = lambda self: (time.sleep(5), go(self))
    peers.note_run("/no/such/run")
    for number in range(rounds):
        if number == 3 and jax.process_index() == failing:
            raise LoadError("the row is too long.")
        multihost_utils.process_allgather(jax.numpy.float32(number))
        print(os.getpid(), number, flush=True)
        time.sleep(0.02)
'''
CODE = "from espalier.launch import cli; raise SystemExit(cli.main('Exchanges.', 'exchanging:exchange'))"


def told(error):
    """Standard error without the signs of life."""
    lines = [x for x in error.splitlines() if not re.search(r"(: starting|, (\d+ min )?\d+ s)$", x)]
    return "\n".join(lines).strip()


@pytest.fixture
def pair(tmp_path):
    """Starts two processes that exchange numbers with these bindings; returns them, exchanging, with their own ids."""
    (tmp_path / "exchanging.py").write_text(PROGRAM)
    gin_file = tmp_path / "x.gin"
    started = []

    def start(*bindings, differing=""):
        """Starts the processes; the second has one more binding, and then nothing is waited for."""
        head = "from __gin__ import dynamic_registration\nimport exchanging\n"
        gin_file.write_text(head + "".join(f"exchanging.exchange.{b}\n" for b in bindings))
        address = f"localhost:{free_port()}"
        flags = [f"--coordinator_address={address}", "--process_count=2", f"--gin_file={gin_file}"]
        flags.append(f"--heartbeat_timeout={TIMEOUT}")
        started.extend(
            subprocess.Popen(
                [sys.executable, "-c", CODE, *flags, f"--process_index={index}"]
                + ([f"--gin.{differing}"] if differing and index else []),
                env=with_devices(1, PYTHONPATH=f"{tmp_path}:{ROOT}"),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        )
        if differing:
            return started
        lines = (
            next(x for x in process.stdout if " " in x and x[0].isdigit()) for process in started
        )
        return started, [int(line.split()[0]) for line in lines]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "lost"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)]
)
def test_the_survivor_says_who_is_lost_and_to_start_again(pair, number, lost):
    processes, ids = pair()
    begun = time.monotonic()
    os.kill(ids[lost], number)
    _, error = processes[1 - lost].communicate(timeout=120)
    seconds = time.monotonic() - begun
    os.kill(ids[lost], signal.SIGKILL) if number == signal.SIGSTOP else None
    assert processes[1 - lost].returncode == 75, error
    assert seconds < TIMEOUT + 25  # on a busy machine; the time-out itself is TIMEOUT
    [message] = told(error).splitlines()
    assert message.startswith(f"error: process {lost} of {'2 on' if lost else 'this run'}")
    assert message.endswith(
        "/no/such/run has no checkpoint yet. To go on, start all processes again with the same command."
    )
    processes[lost].communicate(timeout=60)
    assert (
        processes[lost].returncode == 128 + signal.SIGKILL
    )  # the supervisor reports its child's signal


def test_an_error_of_one_process_is_the_others_reason_not_to_start_again(pair):
    processes, _ = pair("failing = 1")
    errors = [told(process.communicate(timeout=120)[1]) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert errors[1] == "error: the row is too long."
    assert errors[0].startswith("error: process 1 of 2 on ")
    assert (
        "has ended with status 2: the row is too long. Starting again would end in the same way"
        in errors[0]
    )


def test_processes_with_other_settings_do_not_start(pair):
    processes = pair("rounds = 5", differing="exchanging.exchange.rounds=6")
    errors = [told(process.communicate(timeout=120)[1]) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    for error in errors:
        assert error.startswith(
            "error: the hosts of this run differ in their configuration: process 1"
        )
        assert "has 'exchanging.exchange.rounds = 6', process 0" in error
        assert error.endswith("start all processes with the same flags and gin files.")


@pytest.mark.parametrize("slow", [0, 1])
def test_all_end_well_together_however_late_one_leaves(pair, slow):
    processes, _ = pair("rounds = 5", f"slow = {slow}")
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert all(error.startswith("python -m exchanging: starting\n") for error in errors)
    assert [told(error) for error in errors] == ["", ""]


def test_processes_that_do_not_come_are_named(tmp_path):
    (tmp_path / "exchanging.py").write_text(PROGRAM)
    flags = ("--coordinator_address=localhost:1", "--process_count=2", "--process_index=1")
    result = subprocess.run(
        [sys.executable, "-c", CODE, *flags, "--initialization_timeout=3"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 75, result.stderr
    [message] = told(result.stderr).splitlines()
    assert "did not come together at localhost:1 within 3 s" in message
    assert "Start 2 processes with the same --coordinator_address" in message


def test_what_the_supervisor_hides_is_only_of_the_coordination_service(capfdbinary):
    read, write = os.pipe()
    relay = supervisor._Relay(os.fdopen(read, "rb"))
    stamp = b"1127 15:30:53.217154   22478 "
    shown = b"a line\n\rtrain: 1%\rtrain: 2%\nE" + stamp + b"cuda.cc:1] out of memory\n"
    noise = b"E" + stamp + b"coordination_service_agent.cc:289] Polled an error\n"
    fatal = (
        b"F"
        + stamp
        + b"client.h:80] Terminating process because the JAX distributed service detected fatal errors.\n    @ 0x7f49\n"
    )
    with os.fdopen(write, "wb") as file:
        for part in (shown, noise, fatal):
            file.write(part)
            file.flush()
    relay.thread.join()
    assert capfdbinary.readouterr().err == shown
    assert relay.fatal == fatal


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, KeyError, AssertionError])
def test_auto_outside_of_a_cluster_is_one_error(monkeypatch, kind):
    import jax

    from espalier.launch.processes import peers

    def initialize(*arguments, **settings):
        raise kind("coordinator_address should be defined.")  # as jax does

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # in a job's script, without srun
    monkeypatch.delenv("SLURM_STEP_NODELIST", raising=False)
    waits = {"initialization_timeout": 1, "heartbeat_timeout": 1}
    with (
        pytest.raises(ValueError, match="auto: jax finds no cluster.* with srun. Give HOST:PORT"),
        peers.joined("auto", None, None, **waits, status_of=lambda error: 2),
    ):
        pass
