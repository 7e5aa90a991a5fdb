"""Runs in object stores: a run killed on one host goes on on another, and its checkpoint is read by other commands."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from launch import convert, score
from model.storage import mirror, paths
from tests.launch.resume_test import ROOT, digests, flags, points, rows

WEIGHTS = "model.safetensors"


def _start(train, address, copies):
    """Starts the run as a process of a host with its own folders; each step takes a while."""
    command = [sys.executable, "-m", "launch.train", *flags(train, address)]
    command.append("--gin.train.train.hooks=[@local_text.LongSleep]")
    environment = {**os.environ, mirror.COPIES: str(copies)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def _wait_for_checkpoint(process, address):
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        found = paths.entries(f"{address}/checkpoints")
        if any(re.fullmatch(r"\d+/manifest.json", name) for name in found):
            return
        time.sleep(0.1)
    pytest.fail(f"no checkpoint: {process.communicate(timeout=10)}")


def test_a_run_killed_on_one_host_goes_on_on_another(train, store, tmp_path):
    whole = tmp_path / "whole"
    assert train(*flags(train, whole)).status == 0
    address = f"{store.address}/runs/small"
    process = _start(train, address, tmp_path / "host_a")
    _wait_for_checkpoint(process, address)
    second = train(*flags(train, address))  # while the first one trains
    assert second.status == 2 and f"{address} is in use: process {process.pid} on" in second.err
    process.kill()
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, (out, err)
    assert not list(tmp_path.joinpath("copies").rglob("metrics.jsonl"))

    result = train(*flags(train, address))
    assert result.status == 0, result.err
    assert re.search(rf"start +step [1-9]\d* from {address}/checkpoints", result.out), result.out
    assert digests(address, 24) == digests(whole, 24)
    run = mirror.local(address, without=("checkpoints",))
    assert rows(run) == rows(whole)
    assert points(run) == points(whole)
    names = {name.partition("/")[0] for name in paths.entries(address)}
    assert names == {path.name for path in whole.iterdir()} - {".lock"}
    everything = b"".join(paths.read(f"{address}/{name}") for name in paths.entries(address))
    assert (
        b"hush-hush-of-the-test" not in everything + (out + err + result.out + result.err).encode()
    )

    inputs, output = f"{store.address}/x.jsonl", f"{store.address}/y.jsonl"
    paths.write(inputs, b'{"tokens": [40, 41, 42, 43]}\n')
    given = [f"--checkpoint={address}", f"--inputs={inputs}", f"--output={output}"]
    assert score.main(given) == 0
    here = tmp_path / "y.jsonl"
    assert score.main([f"--checkpoint={whole}", f"--inputs={inputs}", f"--output={here}"]) == 0
    assert json.loads(paths.read(output)) == json.loads(here.read_bytes())

    # From a store to a store, the weights are those of the run that was never in one.
    exported, imported = f"{store.address}/hf", f"{store.address}/imported"
    assert convert.main([f"--from={address}", f"--to_hf={exported}"]) == 0
    assert convert.main([f"--from_hf={exported}", f"--to={imported}"]) == 0
    for number, source in enumerate((whole, imported)):
        hf = tmp_path / f"hf{number}"
        assert convert.main([f"--from={source}", f"--to_hf={hf}"]) == 0
        assert (hf / WEIGHTS).read_bytes() == paths.read(f"{exported}/{WEIGHTS}")
    assert convert.main([f"--from_hf={exported}", f"--to={imported}"]) == 2  # it is there


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_stores_that_cannot_be_used_are_one_error(train, store):
    missing = train(*flags(train, "s3://nobody-has-this/run"))
    assert missing.status == 2 and "there is no bucket 'nobody-has-this'" in missing.err
    whole = train(*flags(train, store.address))
    assert whole.status == 2 and "is a whole bucket" in whole.err
    store.fault = lambda method, path: 403
    refused = train(*flags(train, f"{store.address}/run"))
    assert refused.status == 2 and "the store refuses" in refused.err
    assert "Traceback" not in refused.err
