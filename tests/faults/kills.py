"""Rows about processes that end: SIGTERM at each stage, SIGKILL at random moments, lost processes, two writers."""

import functools
import importlib
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from espalier.launch import cli, environment
from tests.faults import program, shim
from tests.faults.table import Bench, Case, Lost, Row, Unclear
from tests.processes import free_port

# Stage -> function at whose call the signal comes, and the calls that are tried.
_STAGES = {
    "configuration": ("espalier.launch.config.gin_config:load", (1,)),
    "directory": ("espalier.launch.run.run_dir:prepare", (1,)),
    "data": ("espalier.launch.run.resolved:resolve", (1,)),
    "compilation": ("espalier.trainers.recipe:Program.compiling", (1,)),
    "restoring": ("espalier.launch.run.resolved:restore_start", (1,)),
    "waiting for data": ("espalier.trainers.batches:Prefetcher.get", (1, 4, 9)),
    "row of metrics": ("espalier.trainers.telemetry.metric_writers:MultiWriter.write", (1, 3, 5)),
    "save": ("espalier.trainers.checkpoints.checkpoint:Checkpointer.save", (1, 2, 3)),
    "arrays of a save": (
        "espalier.trainers.checkpoints.checkpoint:Checkpointer._finish",
        (1, 2, 3),
    ),
    "commit": ("espalier.trainers.checkpoints.step_dir:complete", (1, 2, 3)),
    "deletion of an old step": ("espalier.trainers.checkpoints.step_dir:remove", (1,)),
    "end of the last save": ("espalier.trainers.checkpoints.checkpoint:Checkpointer.close", (1,)),
}


def _at_call(target: str, number: int, act: Any) -> None:
    """Makes this process call `act` before call `number` of a function."""
    module, _, name = target.partition(":")
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    real, calls = getattr(owner, name), 0

    @functools.wraps(real)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, wrapper)


def _stops(seed: int) -> Iterator[Case]:
    """SIGTERM or SIGINT when a function is called; then the same command again."""
    for stage, (target, numbers) in _STAGES.items():
        for number in numbers:
            for name in ("SIGTERM", "SIGINT") if number == 1 else ("SIGTERM",):
                run = functools.partial(_stop, target, number, getattr(signal, name))
                yield Case(f"{name} at {stage}, call {number}", run, 2400, own_process=True)
    yield Case("SIGTERM three times", functools.partial(_stop_often, seed), 2400, own_process=True)


def _stop(target: str, number: int, sent: int, bench: Bench) -> None:
    run = bench.folder / "run"
    stopped = program.train(
        bench, run, before=lambda: _at_call(target, number, lambda: os.kill(os.getpid(), sent))
    )
    status = stopped.wait()
    # Before the run has something to save, the signal ends the process at once.
    early = status in (-sent, 1, 130) and program.good_step(run) == 0
    if status not in (0, cli.INTERRUPTED) and not early:
        raise Unclear(f"status {status} after the signal: ...{stopped.text[-500:]}")
    program.train(bench, run).succeeded()
    program.ends_like(bench, run)


def _stop_often(seed: int, bench: Bench) -> int:
    run, choice = bench.folder / "run", bench.random(f"stops {seed}")
    for _ in range(3):
        stopped = program.train(
            bench,
            run,
            before=functools.partial(
                _at_call,
                _STAGES["waiting for data"][0],
                choice.randint(2, 4),
                lambda: os.kill(os.getpid(), signal.SIGTERM),
            ),
        )
        if (status := stopped.wait()) not in (0, cli.INTERRUPTED):
            raise Unclear(f"status {status} after SIGTERM: ...{stopped.text[-500:]}")
    program.train(bench, run).succeeded()
    program.ends_like(bench, run)
    return 3


def _kills(seed: int) -> Iterator[Case]:
    """Chains of kills of one run, which must then end like the run to which nothing happened."""
    for chain in range(9):
        act = functools.partial(_chain, f"writes {chain}", _kill_at_write, 5)
        yield Case(f"5 kills at random writes, chain {chain}", act, 2400, own_process=True)
    for chain in range(4):
        act = functools.partial(_chain, f"times {chain}", _kill_at_time, 4)
        yield Case(f"4 kills at random times, chain {chain}", act, 2400, own_process=True)


def _kills_with_a_local_tier(seed: int) -> Iterator[Case]:
    del seed
    for number in range(6):
        act = functools.partial(_chain_with_a_local_tier, f"local tier {number}")
        yield Case(f"5 kills at random writes, chain {number}", act, 2400, own_process=True)


def _chain_with_a_local_tier(name: str, bench: Bench) -> int:
    """Kills at writes to either tier. The disk's name begins with the run's, so that the shim watches both."""
    choice = bench.random(name)

    def start(run: str, before: Callable[[], None] | None = None) -> program.Process:
        path = bench.folder / run
        flags = program.train_flags(bench, path)
        flags += program.local_tier(bench.folder / f"{run}_disk")
        return program.start(bench, "train", flags, before=before)

    def kill(run: str) -> program.Process:
        mode, at = choice.choice([shim.KILL, shim.KILL_HALF]), choice.randrange(10, 250)
        before = functools.partial(shim.files, bench, bench.folder / run, mode, at)
        return killed(start(run, before))

    return chain(bench, 5, kill=kill, train=start, local=lambda run: bench.folder / run)


def _chain(name: str, kill: Any, count: int, bench: Bench) -> int:
    choice = bench.random(name)
    return chain(
        bench,
        count,
        kill=lambda run: kill(bench, bench.folder / run, choice),
        train=lambda run: program.train(bench, bench.folder / run),
        local=lambda run: bench.folder / run,
    )


def chain(
    bench: Bench,
    count: int,
    *,
    kill: Callable[[str], program.Process],
    train: Callable[[str], program.Process],
    local: Callable[[str], pathlib.Path],
) -> int:
    """Kills a run `count` times; one that ends before it is killed is compared, and a new one begins.

    Args:
      kill: starts the run of this name and kills it; returns the ended process.
      train: starts it.
      local: returns a folder with its files as they are now.
    """
    kills, runs = 0, 0
    run, before = "run_0", 0
    while kills < count:
        process = kill(run)
        _started_from(process, before)
        if process.status == 0:
            program.ends_like(bench, local(run))
            runs += 1
            run, before = f"run_{runs}", 0
        else:
            kills += 1
            before = program.good_step(local(run))
    last = train(run)
    last.succeeded()
    _started_from(last, before)
    program.ends_like(bench, local(run))
    return count


def _started_from(process: program.Process, step: int) -> None:
    """Checks that a start went on from the newest complete step, if it lived long enough to say so."""
    if "is damaged" in process.text:
        raise Lost(f"a kill left a damaged step that counts as complete: {process.text[-500:]}")
    if (said := re.search(r"start +step (\d+) from", process.text)) and int(said[1]) < step:
        raise Lost(f"went on from step {said[1]} in place of {step}")


def _kill_at_write(bench: Bench, run: pathlib.Path, choice: random.Random) -> program.Process:
    """Kills a start before or in the middle of a random write, rename or sync below the run's directory."""
    mode = choice.choice([shim.KILL, shim.KILL_HALF])
    at = choice.randrange(10, 150)
    return killed(program.train(bench, run, before=lambda: shim.files(bench, run, mode, at)))


def killed(process: program.Process) -> program.Process:
    """Waits for the end, which must be that of the run or by SIGKILL."""
    if process.wait() not in (-signal.SIGKILL, 0):
        raise Unclear(f"status {process.status}: ...{process.text[-500:]}")
    return process


def _kill_at_time(bench: Bench, run: pathlib.Path, choice: random.Random) -> program.Process:
    """Kills a start after a random time: while it starts, compiles or trains."""
    process = program.train(bench, run)
    end = time.monotonic() + choice.uniform(0.2, 8.0)
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.signal(signal.SIGKILL)
    return killed(process)


def _lost_processes(seed: int) -> Iterator[Case]:
    del seed
    for name, (index, number) in {
        "a process is killed": (1, signal.SIGKILL),
        "the coordinator is killed": (0, signal.SIGKILL),
        "a process hangs": (1, signal.SIGSTOP),
    }.items():
        act = functools.partial(_lose, index, number)
        yield Case(name, act, 2400, own_process=True)
    yield Case("a process never comes", _never_comes, 2400, own_process=True)


def _lose(index: int, number: int, bench: Bench) -> None:
    """Loses one of two processes; the other one must say so, with status 75."""
    run, port = bench.folder / "run", free_port()
    flags = program.train_flags(bench, run, "TRAIN_STEPS=5000", "CHECKPOINT_PERIOD=20")
    logs = [bench.folder / f"peer_{i}.log" for i in range(2)]
    peers = [_peer(i, port, logs[i], "--heartbeat_timeout=10", *flags) for i in range(2)]
    end = time.monotonic() + 900
    while program.good_step(run) == 0:
        if time.monotonic() > end or any(p.poll() is not None for p in peers):
            raise Unclear(f"two processes did not train: ...{logs[0].read_text()[-700:]}")
        time.sleep(0.1)
    victims = _tree(peers[index].pid)
    for pid in victims if number == signal.SIGSTOP else victims[::-1]:
        os.kill(pid, number)
    survivor = peers[1 - index]
    try:
        status = survivor.wait(300)
    except subprocess.TimeoutExpired:
        raise Unclear("the other process did not end within 300 s") from None
    text = logs[1 - index].read_text("utf-8", "replace")
    if status != cli.INTERRUPTED or f"error: process {index} of" not in text or "Traceback" in text:
        raise Unclear(f"status {status}: ...{text[-700:]}")
    program.train(bench, run, f"TRAIN_STEPS={program.good_step(run) + 2}").succeeded()


def _tree(pid: int) -> list[int]:
    """Returns a process and its children, the children last."""
    import psutil

    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def _never_comes(bench: Bench) -> None:
    log = bench.folder / "peer_0.log"
    flags = program.train_flags(bench, bench.folder / "run")
    status = _peer(0, free_port(), log, "--initialization_timeout=5", *flags).wait(900)
    text = log.read_text()
    if status != cli.INTERRUPTED or "did not come" not in text or "Traceback" in text:
        raise Unclear(f"status {status} in place of {cli.INTERRUPTED}: ...{text[-500:]}")


def _peer(index: int, port: int, log: pathlib.Path, *flags: str) -> subprocess.Popen:
    """Starts one of two processes of a run, not forked: its supervisor starts the same command again."""
    address = f"localhost:{port}"
    words = [f"--coordinator_address={address}", "--process_count=2", f"--process_index={index}"]
    variables = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    return subprocess.Popen(
        [sys.executable, "-m", "espalier.launch.train", *words, *flags],
        env={**variables, "PYTHONPATH": environment.ROOT},
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
    )


def _writers(seed: int) -> Iterator[Case]:
    del seed
    yield Case(
        "beside a running process", functools.partial(_second, False), 2400, own_process=True
    )
    yield Case("beside a stopped process", functools.partial(_second, True), 2400, own_process=True)


def _second(stopped: bool, bench: Bench) -> None:
    run, second_ended = bench.folder / "run", bench.folder / "second_ended"
    standing = bench.folder / "standing"

    def wait() -> None:
        """Stands still in the middle of the work until the second process has ended."""
        standing.touch()
        if stopped:
            os.kill(os.getpid(), signal.SIGSTOP)
        while not second_ended.exists():
            time.sleep(0.05)

    first = program.train(
        bench,
        run,
        before=lambda: _at_call(_STAGES["waiting for data"][0], 5, wait),
    )
    end = time.monotonic() + 600
    while not standing.exists() and first.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    try:
        program.train(bench, run).refused(str(run))
    finally:
        second_ended.touch()
        first.signal(signal.SIGCONT)
    first.succeeded()
    program.ends_like(bench, run)


ROWS = (
    Row(
        1,
        "SIGTERM or SIGINT at each stage",
        "the same command continues and ends bit-equal, metrics too",
        _stops,
        sample=1,
    ),
    Row(
        2,
        "SIGKILL at random writes and times",
        "the last committed step loads; the run ends bit-equal, metrics too",
        _kills,
        sample=1,
    ),
    Row(
        11,
        "a process of several dies, hangs or never comes",
        "the others end with its name and status 75; a good step is there",
        _lost_processes,
        sample=0,
    ),
    Row(
        25,
        "a second process in the directory of a run",
        "it is refused; the first one is not disturbed",
        _writers,
        sample=0,
    ),
    Row(
        28,
        "SIGKILL at random writes of a run with a local tier of checkpoints",
        "the newest step that is good in either tier loads; the run ends bit-equal, metrics too",
        _kills_with_a_local_tier,
        sample=1,
    ),
)
