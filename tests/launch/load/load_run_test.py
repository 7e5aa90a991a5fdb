"""Which step of a run the commands read when its newest one is damaged."""

import json
import shutil

import jax
import pytest

from espalier.trainers.checkpoints.checkpoint import Checkpointer

COMMANDS = {
    "score": ["--inputs={0}/x.jsonl", "--output={0}/y.jsonl"],
    "generate": ["--inputs={0}/x.jsonl", "--output={0}/y.jsonl", "--max_new_tokens=4"],
    "evaluate loss": ["--json={0}/y.jsonl", "--tasks=files", "--trust_config"],
}


@pytest.fixture
def damaged(trained_run, tmp_path):
    """The run of `trained_run` with a newer step 5, of other parameters, one bit of which has flipped."""
    run = tmp_path / "damaged"
    shutil.copytree(trained_run.path, run)
    with Checkpointer(run / "checkpoints") as checkpointer:
        zeros = jax.tree.map(lambda x: 0 * x, trained_run.params)
        state = {"params": zeros["raw"], "ema_params": zeros["ema"]}
        checkpointer.save(5, state)
    files = [f for f in (run / "checkpoints" / "5" / "state").rglob("*") if f.is_file()]
    largest = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_a_damaged_newest_step_is_passed_over(
    damaged, trained_run, command, capsys, caplog, tmp_path, name
):
    (tmp_path / "x.jsonl").write_text('{"text": "import os"}\n')
    flags = [flag.format(tmp_path) for flag in COMMANDS[name]]

    def result(checkpoint):
        assert command(name, f"--checkpoint={checkpoint}", *flags) == 0
        found = json.loads((tmp_path / "y.jsonl").read_text())
        return {**found, "checkpoint": None}

    before = {p: p.read_bytes() for p in damaged.rglob("*") if p.is_file()}
    good = result(trained_run.path)
    assert not caplog.records
    assert result(damaged) == good
    assert "checkpoints/5 is damaged" in caplog.text and "Reading step 3" in caplog.text
    assert {p: p.read_bytes() for p in damaged.rglob("*") if p.is_file()} == before
    capsys.readouterr()
    assert command(name, f"--checkpoint={damaged}/checkpoints/5", *flags) == 2
    assert "checkpoints/5 is damaged" in capsys.readouterr().err
