"""A sweep whose runs are jobs of a cluster."""

import json
import pathlib

import pytest

from espalier.launch.environment import ROOT
from espalier.launch.submit import slurm
from espalier.launch.submit.base import Job, SubmitError
from espalier.launch.sweep import __main__ as sweep
from espalier.launch.sweep import driver
from espalier.launch.sweep.folder import SweepFolder, read_results

CLUSTER = ("--cluster=launch/submit/configs/slurm.py", "--cluster_setting=poll_seconds=0.5")
ONE = (
    *(f"--cluster_setting={x}=1" for x in ("nodes", "tasks_per_node", "cpus_per_task")),
    "--cluster_setting=gpus_per_node=0",
)
ARMS = """
from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(
        seeds=(0, 1),
        arms=dict(
            source=dict(made=("sh", "-c", 'echo "$1" >"$0"', "{run}", "a $(touch PWNED) {SEED}")),
            copy=dict(made=("sh", "-c", 'cat "$0" >"$1"', "{source}", "{run}")),
        ),
    ))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "arms.py"
    path.write_text(ARMS)
    return path


def test_a_dry_run_shows_arrays_and_writes_nothing(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    out = tmp_path / "out"
    words = [f"--sweep={file}", f"--out={out}", "--dry_run", *CLUSTER, *ONE]
    assert sweep.main([*words, "--cluster_setting=python=/shared/bin/python"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("words=(/shared/bin/python -m espalier.launch.sweep.run ") == 4
    assert shown.count("#SBATCH --array=0-1\n") == 1  # both seeds of the first arm
    assert "# sbatch --dependency=afterok:(ids of source/seed0)" in shown
    assert not out.exists()


# What the configurations of other back ends do not have a default for.
NEEDED = {
    "jobset": ["--cluster_setting=image=x"],
    "xmanager": [],
    "tpu_vm": ["--cluster_setting=project=x", "--cluster_setting=repository=x"],
    "flink": ["--cluster_setting=image=x"],
}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (CLUSTER, "a run of a sweep is one process, not 16"),
        ((*CLUSTER, *ONE, "--memory_gb=3"), "a cluster has its own limits"),
        ((*CLUSTER, *ONE, "--workers=2"), "--workers 2 is for runs on this machine: set at_once"),
        ((*CLUSTER, *ONE, "--cluster_setting=logs=/x"), "logs: the logs of a sweep's runs are in"),
        (("--cluster_setting=nodes=1",), "--cluster_setting nodes=1 is of --cluster: give both"),
        *(
            (
                (f"--cluster=launch/submit/configs/{name}.py", *settings),
                f"{name} cannot run a sweep",
            )
            for name, settings in NEEDED.items()
        ),
        ((*CLUSTER, "--cluster_setting=node=1"), "no such setting; did you mean 'nodes'"),
    ],
)
def test_clusters_that_cannot_run_it(file, tmp_path, capsys, words, message):
    assert sweep.main([f"--sweep={file}", f"--out={tmp_path / 'out'}", *words]) == 2
    assert message in capsys.readouterr().err


def test_runs_that_do_not_save_in_time_are_stopped(file, tmp_path, monkeypatch):
    """One goes on until `scancel`, for which the scheduler first gives no answer, and leaves no status; SIGTERM ends the
    other before it can save."""
    out, calls, closed = tmp_path / "out", [], []
    close = slurm.SlurmSubmitter.close
    monkeypatch.setattr(slurm.SlurmSubmitter, "close", lambda own: [closed.append(own), close(own)])
    slow, early = out / "runs/source/seed0/log.txt", out / "runs/source/seed1/log.txt"

    def scheduler(*words, script=""):
        calls.append(words)
        assert len(calls) < 40, calls
        if len(closed) == 1 and words[0] == "squeue":
            raise SubmitError("Socket timed out")
        if words == ("scancel", "--signal=TERM", "7_1"):
            early.with_name("log.txt.ended").write_text(
                '{"id": "7_1", "status": 143, "seconds": 5}'
            )
        if words[0] == "sbatch":
            return "7\n"
        running = "" if early.with_name("log.txt.ended").exists() else "7_1|RUNNING|0:05|None\n"
        return (
            f"{running}7_0|{'CANCELLED' if ('scancel', '7_0') in calls else 'RUNNING'}|0:05|None\n"
        )

    monkeypatch.setattr(slurm, "_slurm", scheduler)
    monkeypatch.setattr(slurm, "_VISIBLE_SECONDS", 1.0)
    monkeypatch.setattr(driver, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(driver, "_POLL_SECONDS", 0.05)
    words = [f"--sweep={file}", f"--out={out}", *CLUSTER, *ONE, "--only=source/*"]
    assert sweep.main([*words, "--minutes=0.0001"]) == 75
    attempts = [SweepFolder(out).attempts(f"source/seed{seed}") for seed in (0, 1)]
    assert [(a["status"], a["error"]) for (a,) in attempts] == [(1, None), (143, None)]
    assert slow.with_name("log.txt.cancelled").read_text() == "7_0"
    assert calls.count(("scancel", "7_0")) == 1 and len(calls) < 20, calls


def test_a_scheduler_without_an_answer_does_not_spoil_the_end(tmp_path, monkeypatch):
    calls = []

    def scheduler(*words, script=""):
        calls.append(words[0])
        if calls.count("squeue") > 1:
            raise SubmitError("no answer")
        return "7\n" if words[0] == "sbatch" else ""

    monkeypatch.setattr(slurm, "_slurm", scheduler)
    queue = slurm.Settings().submitter()
    jobs = [Job(name=f"{i}", command=("true",), log=str(tmp_path / f"{i}")) for i in range(3)]
    queue.statuses([queue.submit(job) for job in jobs])
    queue.close()
    assert calls == ["sbatch", "squeue", "squeue"]


@pytest.mark.slurm
@pytest.mark.multiprocess
def test_a_sweep_on_a_real_cluster(slurm, file, tmp_path, monkeypatch):
    """Two seeds of two arms; the second arm waits for the first. Started again, all is done."""
    monkeypatch.setenv("PYTHONPATH", ROOT)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("ESPALIER_HUGE_PAGES", "0")
    out = tmp_path / "out '$(touch PWNED)'"
    words = [f"--sweep={file}", f"--out={out}", *CLUSTER, *ONE]
    logs = lambda: [log.read_text() for log in out.glob("runs/*/*/log.txt")]  # noqa: E731
    assert sweep.main(words) == 0, logs()
    rows = {row["run"]: row for row in read_results(out)}
    assert len(rows) == 4 and all(row["attempts"] == 1 for row in rows.values())
    made = pathlib.Path(out, rows["copy/seed1"]["directory"]).read_text()
    assert made == "a $(touch PWNED) 1\n"
    # A shell would run in the working directory of the jobs, which is that of the tests.
    assert not pathlib.Path("PWNED").exists() and not list(tmp_path.rglob("PWNED"))
    ids = {
        name: json.loads((out / "runs" / name / "log.txt.job").read_text())["id"] for name in rows
    }
    assert ids["source/seed0"].partition("_")[0] == ids["source/seed1"].partition("_")[0]
    assert sweep.main(words) == 0
    assert all(row["attempts"] == 1 for row in read_results(out))
