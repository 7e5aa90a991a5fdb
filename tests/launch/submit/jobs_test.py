"""Jobs as local processes: order, failures, crashes, cores, memory and cancelling."""

import os
import subprocess
import sys
import time

import pytest

from espalier.launch.environment import ROOT
from espalier.launch.submit import local
from espalier.launch.submit.base import Job, State
from espalier.launch.submit.local import LocalSubmitter


@pytest.fixture
def submit(tmp_path):
    """Makes a submitter and submits jobs to it; closes it at the end."""
    made = []

    def start(*jobs, **settings):
        submitter = LocalSubmitter(**settings)
        made.append(submitter)
        handles = {}
        for name, script, *more in jobs:
            options = dict(more[0]) if more else {}
            options["after"] = tuple(handles[n] for n in options.get("after", ()))
            log = str(tmp_path / f"{name}.log")
            job = Job(name=name, command=("sh", "-c", script), log=log, **options)
            handles[name] = submitter.submit(job)
        return submitter, handles

    yield start
    for submitter in made:
        submitter.close()


def finish(submitter, handles, seconds=60):
    """Final statuses by name, and the most jobs that were seen to run at once."""
    most, until = 0, time.monotonic() + seconds
    while time.monotonic() < until:
        found = submitter.statuses(list(handles.values()))
        most = max(most, sum(s.state is State.RUNNING for s in found.values()))
        if all(s.state in (State.ENDED, State.DROPPED) for s in found.values()):
            return {name: found[handle] for name, handle in handles.items()}, most
        time.sleep(0.02)
    raise AssertionError(f"still {found}")


def test_jobs_run_after_those_they_need_and_a_crash_takes_no_other_down(submit, tmp_path):
    jobs = [
        ("first", "echo one; echo two >&2"),
        ("second", "cat first.log", {"after": ["first"]}),
        ("fails", "exit 3"),
        ("needs_it", "true", {"after": ["fails"]}),
        ("needs_that", "true", {"after": ["needs_it"]}),
        ("kills_its_process", "kill -9 $PPID"),
        ("last", "echo $WORD", {"environment": {"WORD": "here"}}),
    ]
    jobs[1] = ("second", f"cat {tmp_path}/first.log", {"after": ["first"]})
    found, most = finish(*submit(*jobs))
    assert most == 1
    assert {name: (s.state, s.exit_status) for name, s in found.items()} == {
        "first": (State.ENDED, 0),
        "second": (State.ENDED, 0),
        "fails": (State.ENDED, 3),
        "needs_it": (State.DROPPED, None),
        "needs_that": (State.DROPPED, None),
        "kills_its_process": (State.ENDED, -9),
        "last": (State.ENDED, 0),
    }
    assert (tmp_path / "second.log").read_text() == "one\ntwo\n"
    assert (tmp_path / "last.log").read_text() == "here\n"


def test_a_worker_takes_one_job_after_another(submit, tmp_path):
    found, _ = finish(*submit(*((name, "echo $PPID") for name in "abc")))
    assert all(status.exit_status == 0 for status in found.values())
    assert len({(tmp_path / f"{name}.log").read_text() for name in "abc"}) == 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to share")
def test_workers_share_the_cores(submit, tmp_path):
    show = f"{sys.executable} -c 'import os; print(sorted(os.sched_getaffinity(0)))'; sleep 0.5"
    submitter, handles = submit(("a", show), ("b", show), workers=2)
    _, most = finish(submitter, handles)
    assert most == 2
    seen = {(tmp_path / f"{name}.log").read_text().strip() for name in "ab"}
    assert seen == {str(list(share)) for share in submitter.shares}
    first, second = submitter.shares
    assert not set(first) & set(second) and len(first) == len(second)


NEED_2, NEED_4 = {"memory_gb": 2.0}, {"memory_gb": 4.0}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to share")
@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (NEED_2, NEED_2, True),
        (NEED_2, NEED_4, False),
        ({}, NEED_2, False),  # of unknown need: alone
        ({"memory_gb": 9.0}, NEED_2, False),  # too large for any company, but not for ever
    ],
)
def test_the_memory_budget_holds(submit, first, second, together):
    jobs = (("a", "sleep 0.4", first), ("b", "sleep 0.4", second))
    found, most = finish(*submit(*jobs, workers=2, memory_gb=5.0))
    assert all(status.exit_status == 0 for status in found.values())
    assert most == (2 if together else 1)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to share")
def test_what_a_kind_has_needed_is_known_for_the_next(submit, monkeypatch):
    monkeypatch.setattr(local, "_MEASURE_SECONDS", 0.1)
    hold = f"{sys.executable} -c 'x = bytearray(200_000_000); import time; time.sleep(1.2)'"
    jobs = [(name, hold, {"kind": "same"}) for name in "abc"]
    found, most = finish(*submit(*jobs, workers=2, memory_gb=5.0))
    assert most == 2  # the second and third; the first was alone
    # 0.2 GB and two Python processes.
    assert all(0.2 < status.memory_gb < 0.4 for status in found.values())


def test_cancelling_asks_what_runs_and_drops_what_waits(submit, tmp_path):
    # A trap runs between short sleeps: `sleep 60 & wait` may miss a signal that comes just before `wait`.
    # Saving takes a while, and the job is given the time.
    script = "trap 'sleep 0.3; echo saved; exit 75' TERM; echo ready; while :; do sleep 0.05; done"
    submitter, handles = submit(("runs", script), ("waits", "true"))
    while "ready" not in "".join(p.read_text() for p in tmp_path.glob("runs.log")):
        submitter.statuses(list(handles.values()))
        time.sleep(0.02)
    for handle in handles.values():
        submitter.cancel(handle)
    found, _ = finish(submitter, handles)
    assert found["waits"].state is State.DROPPED
    assert found["runs"].exit_status == 75
    assert (tmp_path / "runs.log").read_text().split()[-1] == "saved"


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"workers": 0}, "--workers 0: .* give 1 to"),
        ({"workers": 100_000}, "--workers 100000: .* give 1 to"),
        ({"memory_gb": 0.0}, "--memory_gb 0.0: give a positive number"),
    ],
)
def test_budgets_that_are_none(settings, error):
    with pytest.raises(ValueError, match=error):
        LocalSubmitter(**settings)


def test_what_runs_is_told_once_when_its_driver_dies(tmp_path):
    (tmp_path / "job.py").write_text(
        "import signal, time\n"
        "told = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: told.append(1))\n"
        "print('ready', flush=True)\n"
        "while not told: time.sleep(0.02)\n"
        "time.sleep(0.5)\n"
        "print('told', len(told), flush=True)\n"
    )
    # A driver with threads of its own, as one has that has imported jax.
    (tmp_path / "drive.py").write_text(
        "import sys, threading, time\n"
        "from espalier.launch.submit import worker\n"
        "from espalier.launch.submit.base import Job\n"
        "from espalier.launch.submit.local import LocalSubmitter\n"
        "for _ in range(8): threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "submitter = LocalSubmitter()\n"
        "command = (sys.executable, '-m', 'espalier.launch.job')\n"
        f"handle = submitter.submit(Job(name='a', command=command, log='{tmp_path}/log'))\n"
        "while True: submitter.statuses([handle]); time.sleep(0.02)\n"
    )

    import espalier.launch as launch

    # Found as a module of the project, so that it runs in the worker itself.
    paths = [str(tmp_path), *launch.__path__]
    (tmp_path / "sitecustomize.py").write_text(
        f"import espalier.launch as launch; launch.__path__[:] = {paths!r}\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, str(tmp_path / "drive.py")], env=environment) as driver:
        await_text(log, "ready")
        driver.kill()
    await_text(log, "told")
    assert log.read_text() == "ready\ntold 1\n"


def await_text(path, text, seconds=60):
    until = time.monotonic() + seconds
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < until, path.exists() and path.read_text()
        time.sleep(0.02)


def test_a_closed_back_end_ends_running_jobs_and_drops_others(submit):
    submitter, handles = submit(("runs", "sleep 60"), ("waits", "true", {"after": ["runs"]}))
    submitter.statuses(list(handles.values()))
    submitter.close()
    runs, waits = submitter.statuses(list(handles.values())).values()
    assert runs.state is State.ENDED and runs.exit_status == -9
    assert waits.state is State.DROPPED
