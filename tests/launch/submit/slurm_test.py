"""SLURM: scripts, hostile names, and jobs on a real cluster of one host."""

import json
import os
import pathlib
import re
import subprocess
import sys
import time

import pytest

from espalier.launch.submit import launch_config, slurm
from espalier.launch.submit.base import Job, State, SubmitError

pytestmark = pytest.mark.slurm

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "slurm.sh"
HOSTILE = (
    "a b",
    "$(touch PWNED)",
    "`touch PWNED`",
    "; touch PWNED",
    "'; touch PWNED; '",
    '"; touch PWNED; "',
    "line\n#SBATCH --comment=PWNED\ntouch PWNED",
    "$HOME\\n",
    "%j %x %%",
    "-rf",
    "*",
    "ü⚡",
    "",
)


def settings(**values):
    return slurm.Settings(**{"signal_seconds": 60, "poll_seconds": 0.2, **values})


def job(tmp_path, name, script, **more):
    return Job(name=name, command=("sh", "-c", script), log=str(tmp_path / name / "log"), **more)


def wait(queue, handles, *states, seconds=120):
    """The statuses, once all jobs are in one of the states."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        statuses = queue.statuses(handles)
        if all(statuses[handle].state in states for handle in handles):
            return [statuses[handle] for handle in handles]
        time.sleep(0.2)
    logs = [pathlib.Path(handle).read_text() for handle in handles if os.path.exists(handle)]
    raise AssertionError(f"{statuses}, {logs}")


ENDED = (State.ENDED, State.DROPPED)


def test_the_script_of_two_hosts_with_gpus(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    shipped = launch_config.read("launch/submit/configs/slurm.py", ["env=('NCCL_DEBUG=WARN',)"])
    shipped = slurm.Settings(
        **{
            **vars(shipped),
            "folder": "~/espalier",
            "secrets": ("WANDB_API_KEY=~/.wandb",),
            "python": "~/env/bin/python",
        }
    )
    assert shipped.interpreter == "/home/me/env/bin/python"
    queue = shipped.submitter()
    command = ("python", "-m", "espalier.launch.train", "--gin.MODEL_DIR='/runs/a b'")
    queue.submit(Job(name="a b", command=command, log="/runs/a b/logs/log.txt"))
    assert queue.preview() == GOLDEN.read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("partition", "gpu\n#SBATCH --uid=0"),
        ("partition", "a b"),
        ("account", "x;y"),
        ("time_limit", "1:00 --x"),
        ("memory", "1G\n"),
        ("constraint", "$(x)"),
        ("sbatch_flags", ("--comment=a b",)),
        ("sbatch_flags", ("comment",)),
        ("srun_flags", ("x",)),
        ("sbatch_flags", ("--array=0-3",)),  # four runs in one folder
        ("sbatch_flags", ("--nice=5", "--nodes=4")),
        ("srun_flags", ("--ntasks=8",)),
        ("nodes", 0),
        ("tasks_per_node", 3),
        ("env", ("A B=1",)),
        ("env", ("HF_TOKEN=x",)),
        ("secrets", ("X",)),
    ],
)
def test_settings_that_cannot_stand_in_a_script_are_refused(key, value):
    with pytest.raises(SubmitError, match=key):
        slurm.Settings(**{"gpus_per_node": 2, key: value})


def test_bash_reads_the_words_as_they_were(tmp_path):
    """Runs the body of a script with programs of SLURM that only run what follows."""
    for name, text in {"srun": 'shift; exec "$@"', "scontrol": "exit 1"}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    place = tmp_path / "x '$(touch PWNED)' %j\n#SBATCH --comment=PWNED"
    env = tuple(f"V{i}={word}" for i, word in enumerate(HOSTILE))
    queue = settings(folder=str(tmp_path), env=env).submitter()
    show = 'import os, sys; print(repr([sys.argv[1:], [os.environ[f"V{i}"] for i in range(%d)]]))'
    command = ("python3", "-c", show % len(HOSTILE), *HOSTILE)
    queue.submit(Job(name=HOSTILE[4], command=command, log=str(place)))
    script = queue.preview()
    assert [line for line in script.splitlines() if line.startswith("#SBATCH")][0] == (
        "#SBATCH --job-name=touch-PWNED"
    )
    path = f"{tmp_path}:{os.environ['PATH']}"
    own = {**os.environ, "PATH": path, "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}
    subprocess.run(["bash"], input=script, text=True, check=True, env=own, cwd=tmp_path)
    assert place.read_text() == f"{[list(HOSTILE), list(HOSTILE)]!r}\n"
    assert not list(tmp_path.rglob("PWNED"))
    ended = json.loads(pathlib.Path(f"{place}.ended").read_text())
    assert (ended["id"], ended["status"]) == ("7", 0)


def test_a_job_and_its_processes_write_logs_and_a_status(slurm, tmp_path):
    queue = settings(tasks_per_node=2, folder=str(tmp_path)).submitter()
    tasks = Job(
        name="two",
        command=("sh", "-c", 'echo "$1 $SLURM_PROCID of $SLURM_NTASKS"', "sh", HOSTILE[1]),
        log=str(tmp_path / "a '$(touch PWNED)' %j" / "log"),
    )
    handle = queue.submit(tasks)
    (status,) = wait(queue, [handle], *ENDED)
    assert (status.state, status.exit_status) == (State.ENDED, 0)
    assert pathlib.Path(handle).read_text() == f"{HOSTILE[1]} 0 of 2\n"
    assert pathlib.Path(f"{handle}.task1").read_text() == f"{HOSTILE[1]} 1 of 2\n"
    assert not list(tmp_path.rglob("PWNED"))


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("{folder}/file/logs/log.txt", "cannot create directory '{folder}/file'.*Not a directory"),
        ("{folder}/log.txt", "{folder}/log.txt: Is a directory"),
    ],
)
def test_a_job_without_a_log_leaves_a_word_where_it_was_submitted(log, reason, tmp_path):
    """Its output is /dev/null until the log is open; here by bash alone, with programs of SLURM that do nothing."""
    (tmp_path / "file").touch()
    (tmp_path / "log.txt").mkdir()
    log = log.format(folder=tmp_path)
    script = slurm.slurm_script.render(
        settings(folder=str(tmp_path)), [Job(name="x", command=("touch", "started"), log=log)]
    )
    own = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", "HOME": str(tmp_path)}
    places = {"SLURM_SUBMIT_DIR": "/proc/none"}, {"SLURM_SUBMIT_DIR": str(tmp_path)}
    for place in places:  # the second place is tried where the first cannot be written
        done = subprocess.run(
            ["bash"], input=script, text=True, env={**own, **place}, capture_output=True
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
        word = tmp_path / "slurm-7.out"
        assert re.search(f"error: job 7 on .*{reason.format(folder=tmp_path)}", word.read_text())
        word.unlink()
    assert not (tmp_path / "started").exists()


def test_arrays_orders_failures_and_the_taking_over_of_jobs(slurm, tmp_path):
    queue = settings(folder=str(tmp_path)).submitter()
    sleeps = f"while [ ! -e {tmp_path}/go ]; do sleep 0.2; done"
    first = [queue.submit(job(tmp_path, f"first{i}", f"{sleeps}; echo {i}")) for i in range(2)]
    bad = queue.submit(job(tmp_path, "bad", "exit 3"))
    after = queue.submit(job(tmp_path, "after", f"cat {first[1]}", after=(first[1],)))
    never = queue.submit(job(tmp_path, "never", "true", after=(bad,)))
    every = [*first, bad, after, never]
    assert queue.preview().count("#SBATCH --array=0-2\n") == 1
    wait(queue, first, State.RUNNING)
    # Another process takes over what this one has submitted.
    other = settings(folder=str(tmp_path)).submitter()
    for name in ("first0", "first1"):
        assert other.submit(job(tmp_path, name, f"{sleeps}; echo {name[-1]}")) in first
    wait(other, first, State.RUNNING)
    with pytest.raises(SubmitError, match="still queued or running with another command"):
        third = settings(folder=str(tmp_path)).submitter()
        third.statuses([third.submit(job(tmp_path, "first0", "true"))])
    with pytest.raises(SubmitError, match="first0/log: job .* with another time_limit: cancel it"):
        longer = settings(folder=str(tmp_path), time_limit="9:00", poll_seconds=0.3).submitter()
        longer.statuses([longer.submit(job(tmp_path, "first0", f"{sleeps}; echo 0"))])
    # A job is taken over with another limit of arrays, and if an earlier version kept no settings or not all.
    later = settings(folder=str(tmp_path), at_once=1).submitter()
    for log, kept in zip(first, ({}, {"nodes": 1}), strict=True):
        record = json.loads(pathlib.Path(f"{log}.job").read_text())
        pathlib.Path(f"{log}.job").write_text(json.dumps({**record, "settings": kept}))
        name = pathlib.Path(log).parent.name
        assert later.submit(job(tmp_path, name, f"{sleeps}; echo {name[-1]}")) == log
    wait(later, first, State.RUNNING)
    (tmp_path / "go").touch()
    statuses = wait(queue, every, *ENDED)
    assert [status.exit_status for status in statuses] == [0, 0, 3, 0, None]
    assert statuses[-1].state is State.DROPPED
    assert pathlib.Path(after).read_text() == "1\n"
    assert [s.exit_status for s in wait(other, first, *ENDED)] == [0, 0]


def test_status_75_queues_again_up_to_the_limit_and_not_after_cancelling(slurm, tmp_path):
    queue = settings(folder=str(tmp_path), requeues=1).submitter()
    early = '[ "$SLURM_RESTART_COUNT" ] || kill $$'  # as of a run that gets SIGTERM while it starts
    again = queue.submit(job(tmp_path, "again", f"echo start; sleep 2; {early}; exit 75"))
    saves = "trap 'echo saved; exit 75' TERM; echo start; while :; do sleep 0.2; done"
    stopped = queue.submit(job(tmp_path, "stopped", saves))
    waiting = queue.submit(job(tmp_path, "waiting", "true", after=(stopped,)))
    by_hand = queue.submit(job(tmp_path, "by_hand", saves))
    wait(queue, [stopped, by_hand], State.RUNNING)
    for log in (stopped, by_hand):
        while "start" not in (pathlib.Path(log).read_text() if os.path.exists(log) else ""):
            time.sleep(0.2)
    number = json.loads(pathlib.Path(f"{by_hand}.job").read_bytes())["id"]
    subprocess.run(["scancel", number], check=True)
    another = settings(folder=str(tmp_path)).submitter()  # as `submit --cancel` does
    another.cancel(stopped)
    queue.cancel(waiting)
    statuses = wait(queue, [again, stopped, waiting, by_hand], *ENDED)
    assert [status.exit_status for status in statuses[:3]] == [75, 75, None]
    text = pathlib.Path(by_hand).read_text()
    assert text.count("start") == 1 and "saved" in text and "cancelled" in text
    assert 4 <= statuses[0].seconds < 8  # of both starts
    text = pathlib.Path(again).read_text()
    assert text.count("start") == 2 and "status 75 after 1 requeues, the limit" in text
    assert "saved" in pathlib.Path(stopped).read_text()


PREEMPTED = """
import os, signal, sys, time
if "SLURM_RESTART_COUNT" in os.environ:
    sys.exit(0)
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(time.time()))
print("up", flush=True)
while not signals:
    time.sleep(0.1)
time.sleep(4)
print("signals", len(signals), flush=True)
sys.exit(75)
"""


def test_a_preempted_process_gets_one_signal_and_runs_again(slurm, tmp_path):
    """A second SIGTERM would end a run that is saving."""
    queue = settings(folder=str(tmp_path), partition="low").submitter()
    command = (sys.executable, "-c", PREEMPTED)
    handle = queue.submit(Job(name="low", command=command, log=str(tmp_path / "log")))
    wait(queue, [handle], State.RUNNING)
    until = time.monotonic() + 60
    while not os.path.exists(handle) or "up" not in pathlib.Path(handle).read_text():
        assert time.monotonic() < until
        time.sleep(0.1)
    above = ("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true")
    subprocess.run(above, check=True, capture_output=True)
    (status,) = wait(queue, [handle], *ENDED)
    log = pathlib.Path(handle).read_text()
    assert (status.exit_status, log.count("signals 1\n")) == (0, 1), log


def test_the_scheduler_is_quoted_when_it_refuses(slurm, tmp_path):
    queue = settings(partition="nope").submitter()
    handle = queue.submit(job(tmp_path, "x", "true"))
    with pytest.raises(SubmitError, match="SLURM refused .*invalid partition specified: nope"):
        queue.statuses([handle])
    queue = settings(nodes=99).submitter()
    handle = queue.submit(job(tmp_path, "y", "true"))
    with pytest.raises(SubmitError, match="More processors|not available|Node count"):
        queue.statuses([handle])


def test_without_slurm_the_error_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    queue = settings().submitter()
    handle = queue.submit(job(tmp_path, "x", "true"))
    with pytest.raises(SubmitError, match="no sbatch here: submit from a host .* --dry_run"):
        queue.statuses([handle])
