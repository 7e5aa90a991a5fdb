"""Rows that are scored in shards: the bytes of one process, after any stop, here and by Apache Beam (`make test-beam`)."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from espalier.common import pipelines
from espalier.common.storage import paths
from espalier.launch.inference import score, shards
from espalier.launch.inference.row_files import RowFileError
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.scoring import scoring

PROCESSES = "--runner=DirectRunner,--direct_running_mode=multi_processing,--direct_num_workers=2"


def write(path, count):
    """Writes rows of unequal lengths, and some blank lines."""
    draw = random.Random(0)
    rows = [
        {"tokens": [5 + draw.randrange(90)] * draw.randrange(24), "id": i} for i in range(count)
    ]
    lines = [json.dumps(row) + ("\n\n" if row["id"] % 30 == 7 else "\n") for row in rows]
    path.write_text("".join(lines))


@pytest.fixture
def flags(trained_run, tmp_path):
    """Flags of `score` for a file of 140 rows."""
    write(tmp_path / "x.jsonl", 140)
    return [f"--checkpoint={trained_run.path}", f"--inputs={tmp_path}/x.jsonl", "--batch_size=8"]


@pytest.fixture
def one(flags, command, tmp_path):
    """The bytes that one process writes."""

    def run(*more):
        assert command("score", *flags, f"--output={tmp_path}/one.jsonl", *more) == 0
        return (tmp_path / "one.jsonl").read_bytes()

    return run


def test_shards_have_the_batches_and_bytes_of_one_process_after_a_stop(
    flags, one, command, in_shards, tmp_path, monkeypatch, capsys
):
    flag, begun = in_shards
    made = score.scored_row
    columns, batches = scoring.scored_columns, []

    def recorded(rows, batch_size, length):
        batches.append((length, [tuple(row.targets) for row in rows]))
        return columns(rows, batch_size, length)

    out = tmp_path / "y.jsonl"

    def fails(run, row, where):
        return made(run, row, where) if row["id"] != 50 else 1 / 0

    monkeypatch.setattr(score, "scored_row", fails)
    with pytest.raises(ZeroDivisionError):
        command("score", *flags, f"--output={out}", flag)
    assert begun == [8, 7, 6, 5, 4, 3] and not out.exists()  # rows 48 to 63 are shard 3
    monkeypatch.setattr(score, "scored_row", made)
    # Other settings are refused as long as there are shards.
    assert command("score", *flags, f"--output={out}", flag, "--params=raw") == 2
    message = f"{out}.shards has shards of other words: give the same again to continue them"
    assert message in capsys.readouterr().err
    begun.clear()
    assert command("score", *flags, f"--output={out}", flag) == 0
    assert begun == [3, 2, 1, 0]
    assert "140 rows of 9 shards" in capsys.readouterr().err
    assert not pathlib.Path(f"{out}.shards").exists()
    monkeypatch.setattr(scoring, "scored_columns", recorded)
    assert out.read_bytes() == one()
    alone = sorted(batches)
    batches.clear()
    assert command("score", *flags, f"--output={tmp_path}/z.jsonl", flag) == 0
    assert sorted(batches) == alone


def test_all_workers_read_the_step_and_the_configuration_of_the_start(
    trained_run, flags, one, command, in_shards, tmp_path, gin_file, monkeypatch, capsys
):
    """The run writes another step before a worker reads one."""
    run, out = tmp_path / "run", tmp_path / "y.jsonl"
    shutil.copytree(trained_run.path, run)
    old = one()
    make = pipelines.run

    def later(steps, **options):
        raw, ema = (trained_run.params[name] for name in ("raw", "ema"))
        with Checkpointer(run / "checkpoints") as checkpointer:
            meta = step_dir.read_meta(run)
            checkpointer.save(5, {"params": ema, "ema_params": raw}, meta=meta)
        make(steps, **options)

    def stop(self):
        raise KeyboardInterrupt

    def score(*more):
        file = f"--gin_file={tmp_path}/run.gin"
        return command("score", *flags, file, f"--output={out}", in_shards[0], *more)

    gin_file("START_TOKEN = 0")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipelines, "run", later)
        patch.setattr(shards.Shards, "joined", stop)
        score("--checkpoint", str(run))
    assert score("--checkpoint", str(run)) == 2
    assert "has shards of other checkpoint, words: give the same again" in capsys.readouterr().err
    same = f"--checkpoint={run}/checkpoints/3"
    gin_file("START_TOKEN = 1")
    assert score(same) == 2
    assert "has shards of other configuration: give the same again" in capsys.readouterr().err
    gin_file("START_TOKEN = 0")
    assert score(same) == 0
    assert out.read_bytes() == old != one(f"--checkpoint={run}")


def test_a_malformed_row_is_named_before_any_shard_is_made(
    flags, command, in_shards, tmp_path, capsys
):
    flag, begun = in_shards
    with open(tmp_path / "x.jsonl", "a") as file:
        file.write('{"tokens": \n')
    assert command("score", *flags, f"--output={tmp_path}/y.jsonl", flag) == 2
    assert "x.jsonl, line 146: malformed JSON" in capsys.readouterr().err
    assert begun == [] and not (tmp_path / "y.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output=/dev/stdout"], "--output=/dev/stdout is no file, beside which a pipeline has"),
        (["--batch_size=0"], "--batch_size=0 must be at least 1"),
        (["--batch_size=4"], "--batch_size=4: each batch of a worker is divided over 8 devices"),
    ],
)
def test_what_cannot_be_done_in_shards_is_refused(
    flags, command, in_shards, tmp_path, capsys, more, message
):
    assert command("score", *flags, f"--output={tmp_path}/y", in_shards[0], *more) == 2
    assert message in capsys.readouterr().err


def test_shards_in_a_store(store):
    """Parts of a result are objects, which are gone when it is whole; a removal that stopped is no set of shards."""
    out, rows = f"{store.address}/y.jsonl", [[i, {"x": "\u2028\r"}] for i in range(5)]

    def divided(**record):
        return shards.divided(out, iter(rows), size=2, streams=2, record=record)

    made = divided(of="this")
    assert (made.count, made.rows, made.missing()) == (3, 5, [0, 1, 2])
    assert [row for i in range(3) for row in made.inputs(i)] == rows
    for i in (2, 0):
        made.write(i, ([{"row": row[0], "stream": k} for row in made.inputs(i)] for k in range(2)))
    again = divided(of="this")
    assert again == made and again.missing() == [1] and not again.is_done(1)
    with pytest.raises(RowFileError, match="y.jsonl.shards has shards of other of: give the same"):
        divided(of="that")
    again.write(1, [[{"row": 2, "stream": 0}], [{"row": 2, "stream": 1}]])
    joined = [json.loads(line) for line in b"".join(again.joined()).splitlines()]
    assert [row["stream"] for row in joined] == [0] * 4 + [1] * 4
    assert [row["row"] for row in joined] == [0, 1, 2, 4] * 2
    again.remove()
    assert not paths.entries(f"{store.address}")


def test_rows_that_a_stopped_removal_left_are_of_no_other_model(tmp_path, store):
    for out in (f"{tmp_path}/y.jsonl", f"{store.address}/z.jsonl"):

        def divided(model, count, out=out):
            rows = [{"n": count + i} for i in range(count)]
            return shards.divided(out, rows, size=1, streams=1, record={"checkpoint": model})

        old = divided("A", 3)
        for i in range(3):
            old.write(i, [[{"of": "A"}]])
        paths.delete(f"{out}.shards/shards.json")
        paths.write(f"{out}.shards/notes.txt", b"of somebody")
        new = divided("B", 2)
        assert new.missing() == [0, 1] and new.inputs(1) == [{"n": 3}]
        assert not paths.exists(f"{out}.shards/000002.inputs.jsonl")
        assert paths.read(f"{out}.shards/notes.txt") == b"of somebody"


@contextlib.contextmanager
def exits(words, all_shards):
    """Is the scorer of the test below; `words` say where it ends."""

    def score(rows):
        sys.exit("a wrong row")

    if words == ("flag",):
        sys.exit("a wrong flag")
    yield score


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("word", "message"),
    [("flag", "a wrong flag"), ("row", "a wrong row"), ("prepare", "a wrong variable")],
)
def test_a_scorer_that_exits_is_an_error_of_each_shard(word, message, tmp_path, monkeypatch):
    def prepare():
        if word == "prepare":
            sys.exit("a wrong variable")

    monkeypatch.setattr(shards.environment, "prepare", prepare)
    monkeypatch.setitem(sys.modules, "exiting", sys.modules[__name__])
    made = shards.divided(f"{tmp_path}/y", [{}, {}], size=1, streams=1, record={})
    work = shards.Work(shards=made, scorer="exiting:exits", words=(word,))
    for i in range(2):
        with pytest.raises(RuntimeError, match=f"the scorer ended: SystemExit.'{message}'"):
            work.do(i)


@pytest.mark.beam
@pytest.mark.multiprocess
@pytest.mark.timeout(600)
def test_a_pipeline_of_which_processes_are_killed_ends_with_the_bytes_of_one_process(
    flags, one, tmp_path
):
    """A worker of the first start is killed, and all processes of the second one, each after one more shard."""
    write(tmp_path / "x.jsonl", 5 * 512 - 1)  # 64 batches in a shard
    out, folder = tmp_path / "y.jsonl", tmp_path / "y.jsonl.shards"
    command = [sys.executable, "-m", "espalier.launch.score", *flags, f"--output={out}"]
    command.append(f"--beam_pipeline_options={PROCESSES}")

    def started(until_shards):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, start_new_session=True, **quiet)
        until = time.monotonic() + 150
        while len(done()) < until_shards and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        return process

    def done():
        return {path: path.stat().st_mtime_ns for path in folder.glob("*.0.jsonl")}

    first = started(1)
    workers = [
        child
        for child in psutil.Process(first.pid).children(recursive=True)
        if "sdk_worker_main" in " ".join(child.cmdline()) and "python" in child.cmdline()[0]
    ]
    assert len(workers) == 2
    workers[0].kill()
    assert first.wait(timeout=150) == 2 and not out.exists()
    kept = done()
    second = started(len(kept) + 1)
    os.killpg(second.pid, signal.SIGKILL)
    assert second.wait() != 0 and not out.exists()
    assert kept and kept.items() <= done().items()  # nothing was made again
    assert started(6).wait(timeout=150) == 0
    assert out.read_bytes() == one() and not folder.exists()
