"""A sweep whose runs are jobs of a cluster."""

import json
import pathlib

import pytest

from espalier.launch.environment import ROOT
from espalier.launch.sweep import __main__ as sweep
from espalier.launch.sweep.folder import read_results

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
    assert sweep.main(words) == 0
    shown = capsys.readouterr().out
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
