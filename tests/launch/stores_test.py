"""Runs in object stores: a run killed on some hosts goes on on others, and other commands read and write there."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from espalier.common.storage import mirror, paths
from espalier.launch import score
from espalier.launch.convert import __main__ as convert
from espalier.launch.merge import __main__ as merge
from espalier.launch.report import __main__ as report
from espalier.launch.run import run_dir
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.telemetry import lifetime
from espalier.trainers.telemetry.goodput import Goodput
from tests.launch.merge import folders
from tests.launch.resume_test import ROOT, digests, flags, points, rows
from tests.processes import free_port, with_devices

WEIGHTS = "model.safetensors"
SLOWLY = "--gin.train.train.hooks=[@local_text.LongSleep]"


def _start(train, address, copies, *more, **variables):
    """Starts the run as a process of a host with its own folders."""
    command = [sys.executable, "-m", "espalier.launch.train", *flags(train, address), *more]
    environment = {**os.environ, **variables, mirror.COPIES: str(copies)}
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


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """The directory of a run that nothing stopped, in no store; tests only read it."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert train(*flags(train, path)).status == 0
    return path


@pytest.mark.parametrize("store", ["s3"], indirect=True)  # two hosts below use the other kind
def test_a_run_killed_on_one_host_goes_on_on_another(train, whole, store, tmp_path, capsys):
    address = f"{store.address}/runs/small"
    process = _start(train, address, tmp_path / "host_a", SLOWLY)
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
    capsys.readouterr()
    assert report.main(["--time", address]) == 0
    life = capsys.readouterr().out
    assert life.startswith(f"{address}: ") and ", 2 starts; " in life and " killed\n" in life
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


def test_the_record_of_a_life_is_in_the_store_before_any_checkpoint(store, capsys):
    """A host that is killed leaves it to the next one, and to who asks."""
    address = f"{store.address}/run"
    run = run_dir.prepare(address, "")
    run.write("run.json", "later")
    write = functools.partial(run.write_through, lifetime.FILE)
    with lifetime.Lifetime(run.file(lifetime.FILE), write, Goodput()) as life:
        life.goes_on_from(0, of_run=False)
        life.reached(7)
        life._record()
        assert report.main(["--time", address]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"{address}: ") and "0 to 7 " in text and text.endswith(" running\n")
    assert not paths.exists(f"{address}/run.json") or paths.read(f"{address}/run.json") != b"later"
    run.close()
    assert paths.read(f"{address}/run.json") == b"later"


def _start_pair(train, path, folder, *more):
    """Starts the run as two processes, each of a host of its own."""
    port, device = free_port(), with_devices(1)["XLA_FLAGS"]
    return [
        _start(
            *(train, path, folder / f"host{index}", "--gin.TRAIN_STEPS=8", *more),
            *(f"--coordinator_address=127.0.0.1:{port}", "--process_count=2"),
            f"--process_index={index}",
            XLA_FLAGS=device,
        )
        for index in range(2)
    ]


def _finish(processes):
    try:
        results = [process.communicate(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], results
    return results


@pytest.mark.multiprocess
@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_two_hosts_are_killed_and_two_others_go_on(train, store, tmp_path):
    whole, address = tmp_path / "whole", f"{store.address}/runs/pair"
    _finish(_start_pair(train, whole, tmp_path / "a"))
    processes = _start_pair(train, address, tmp_path / "b", SLOWLY)
    _wait_for_checkpoint(processes[0], address)
    for process in processes:
        process.kill()
        process.communicate()
    results = _finish(_start_pair(train, address, tmp_path / "c"))
    assert re.search(rf"start +step 4 from {address}/checkpoints", results[0][0]), results
    assert digests(address, 8) == digests(whole, 8)
    run = mirror.local(address, without=("checkpoints",))
    assert rows(run) == rows(whole)
    assert points(run) == points(whole)
    assert not [name for name in paths.names(address) if name.startswith(".lock")]


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_models_in_a_store_are_merged_into_a_store(store, tmp_path, branches):
    first = folders.drawn(0, folders.shapes())
    for name, tensors in (("a", first), ("b", folders.drawn(1, folders.shapes(), around=first))):
        mirror.publish(folders.write(tmp_path / name, tensors), f"{store.address}/{name}")
    for folder in branches.folders[:2]:
        mirror.publish(folder, f"{store.address}/{os.path.basename(folder)}")

    def merged(root, names, out):
        weight = {"parameters": {"weight": 1}}
        entries = [{"model": f"{root}/{name}", **weight} for name in names]
        half = {"merge_method": "linear", "models": entries, "name": "half"}
        last = {"merge_method": "linear", "models": [{"model": "half", **weight}, entries[0]]}
        documents = [half, last]
        text = "\n---\n".join(map(json.dumps, documents))
        paths.write(f"{root}/merge.yml", text.encode())
        return merge.main([f"--config={root}/merge.yml", f"--out={out}"])

    address = f"{store.address}/merged"
    assert merged(tmp_path, "ab", tmp_path / "merged") == 0
    assert merged(store.address, "ab", address) == 0
    for name in ("merged", "merged.stages/half"):
        weights = paths.read(f"{store.address}/{name}/{WEIGHTS}")
        assert weights == (tmp_path / name / WEIGHTS).read_bytes()
    assert merged(store.address, "ab", address) == 2  # it is there, and so is its stage
    for name in paths.entries(address):
        paths.delete(f"{address}/{name}")
    shutil.rmtree(mirror.folder())  # as on another machine
    assert merged(store.address, "ab", address) == 0

    runs = os.path.dirname(branches.folders[0])
    names = [os.path.basename(folder) for folder in branches.folders[:2]]
    assert merged(runs, names, tmp_path / "run") == 0
    assert merged(store.address, names, f"{store.address}/run") == 0
    there, here = (step_dir.resolve(f"{root}/run") for root in (store.address, tmp_path))
    assert step_dir.read_manifest(there).arrays == step_dir.read_manifest(here).arrays


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
