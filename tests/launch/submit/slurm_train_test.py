"""A run of two processes on a real SLURM cluster: preempted, queued again, and continued bit for bit."""

import pathlib
import re
import subprocess
import time

import pytest

from espalier.launch.environment import ROOT
from espalier.launch.submit import __main__ as submit
from espalier.trainers.telemetry.metric_writers import measures_time, read_jsonl
from tests.processes import with_devices

pytestmark = [pytest.mark.multiprocess, pytest.mark.slurm, pytest.mark.timeout(600)]

ONE_DEVICE = with_devices(1)["XLA_FLAGS"]
CONFIG = (
    "--config=launch/submit/configs/slurm.py",
    "--config.nodes=1",
    "--config.tasks_per_node=2",
    "--config.gpus_per_node=0",
    "--config.cpus_per_task=1",
    "--config.poll_seconds=0.2",
    "--config.time_limit=1:00:00",
    f"--config.env=('XLA_FLAGS={ONE_DEVICE}',)",
)


def flags(train, folder, *bindings):
    named = (f"MODEL_DIR={str(folder)!r}", f"DIRECTORY={train.cache + '/text'!r}", *bindings)
    return [
        *CONFIG,
        f"--gin_file={train.programs}/small_text.gin",
        *(
            f"--gin.{binding}"
            for binding in (*named, "TRAIN_STEPS=24", "CHECKPOINT_PERIOD=100", "LENGTH=32")
        ),
        "--gin.recipe.Recipe.mesh={'fsdp': 2}",
        "--gin.train.train.hooks=[@local_text.Sleep]",
    ]


def until(ready, folder, seconds=240):
    end = time.monotonic() + seconds
    while not (result := ready()):
        logs = {file.name: file.read_text()[-3000:] for file in folder.glob("logs/*")}
        assert time.monotonic() < end, logs
        time.sleep(0.3)
    return result


def steps(folder):
    file = folder / "metrics.jsonl"
    return max((row["step"] for row in read_jsonl(str(file))), default=0) if file.exists() else 0


def state(capsys, words):
    capsys.readouterr()
    assert submit.main([*words, "--status"]) == 0
    return capsys.readouterr().out


def numbers(folder):
    rows = read_jsonl(f"{folder}/metrics.jsonl")
    return [{k: v for k, v in row.items() if not measures_time(k)} for row in rows]


def test_a_preempted_run_goes_on_bit_for_bit(slurm, train, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{train.programs}")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(ROOT)
    whole, broken = tmp_path / "whole", tmp_path / "broken '$(touch PWNED)'"
    first = flags(train, whole, "local_text.Sleep.seconds=0.0")
    assert submit.main(first) == 0
    until(lambda: "ended" in state(capsys, first), whole)
    assert "ended with status 0" in state(capsys, first), (whole / "logs/log.txt").read_text()

    second = flags(train, broken, "local_text.Sleep.seconds=0.5")
    assert submit.main(second) == 0
    until(lambda: steps(broken) >= 4, broken)
    wrap = ("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    subprocess.run(wrap, check=True, capture_output=True)
    until(lambda: "waiting" in state(capsys, second), broken)
    until(lambda: "ended" in state(capsys, second), broken)
    log = (broken / "logs/log.txt").read_text()
    assert "ended with status 0" in state(capsys, second), log
    assert log.count("status 75") == 0 and len(re.findall("stopped|continu", log)) >= 1, log
    assert numbers(broken) == numbers(whole)
    assert (broken / "logs/log.txt.task1").exists() and not list(pathlib.Path(ROOT).glob("PWNED"))
