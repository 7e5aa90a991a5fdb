"""Builds by pieces in several processes: the same bytes as one, after kills too."""

import contextlib
import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pyarrow
import pytest
from pyarrow import parquet

from espalier.common import versions
from espalier.common.storage.ranges import ChangedError
from espalier.data import counting, pieces, tasks
from espalier.data.cache import build, file_digests, fingerprint, pool, store
from espalier.data.text import document_files, row_files
from espalier.data.text.documents import DataError
from tests.data.cache import piece_reader

ROOT = pathlib.Path(__file__).parents[3]
TEXTS = [f"{i} " + "é\n" * (i % 7) + "x" * (i * 37 % 90) for i in range(120)]


class Counter:
    n = 0

    def update(self, n=1):
        self.n += n

    def set_postfix_str(self, s="", refresh=True):
        self.note = s


def lines(texts=TEXTS, end="\n"):
    return end.join(json.dumps({"text": text}) for text in texts)


def write(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Files of every format, and of every way in which lines end and begin."""
    folder.mkdir()
    found = {}
    for name, content in {
        "plain.jsonl": lines() + "\n",
        "no_end.jsonl": lines(),
        "crlf.jsonl": lines(end="\r\n") + "\r\n",
        "bom.jsonl": "\ufeff" + lines(),
        "blank.jsonl": lines(end="\n\n \n"),
        "long.jsonl": lines(["a", "b" * 3000, "c", "d" * 700, ""]),
        "empty.jsonl": "",
        "ends.jsonl": "\n" * 900,
        "each.txt": "\n".join(text.replace("\n", " ") for text in TEXTS),
    }.items():
        found[name] = folder / name
        found[name].write_bytes(content.encode())
    found["zipped.jsonl.gz"] = folder / "zipped.jsonl.gz"
    found["zipped.jsonl.gz"].write_bytes(gzip.compress(lines().encode()))
    table = pyarrow.table({"text": TEXTS})
    found["rows.parquet"] = folder / "rows.parquet"
    parquet.write_table(table, found["rows.parquet"], row_group_size=9, compression="none")
    found["rows.arrow"] = folder / "rows.arrow"
    with pyarrow.ipc.new_file(found["rows.arrow"], table.schema) as file:
        for batch in table.to_batches(max_chunksize=11):
            file.write_batch(batch)
    return found


@pytest.fixture
def small(monkeypatch):
    """Pieces and shards so small that small files have many."""
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 256)
    monkeypatch.setattr(pieces, "_SHARD_BYTES", (1200, 4000))


def source_of(paths, cache, validation_fraction=0.2, **settings):
    return document_files.find(
        name="set",
        files=[str(path) for path in paths],
        validation_fraction=validation_fraction,
        document_per="line",
        cache_dir=cache,
        **settings,
    )


def build_of(directory, source, task=None, split="train"):
    shards = pieces.grouped(source.pieces(split))
    task = task or piece_reader.Bytes(source)
    return build.Build(str(directory), task, split, piece_reader.FEATURES, {}, shards)


def run(made, workers):
    made.start()
    with pool.limited(workers):
        pool.run(made.write_shard, range(len(made.shards)), what=made.name_of, bar=Counter())
    made.finish()


def content(directory):
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(directory).iterdir())}


@pytest.mark.parametrize(
    "name",
    [
        *("plain.jsonl", "no_end.jsonl", "crlf.jsonl", "bom.jsonl", "blank.jsonl", "long.jsonl"),
        *("empty.jsonl", "ends.jsonl", "each.txt", "zipped.jsonl.gz", "rows.parquet", "rows.arrow"),
    ],
)
def test_pieces_are_the_file(tmp_path, small, name):
    path = write(tmp_path / "data")[name]
    source = source_of([path], tmp_path / "cache")
    parts = source.pieces("train")
    if name not in ("empty.jsonl", "zipped.jsonl.gz"):
        assert len(parts) >= 3
    divided = [x for part in parts for x in source.read_examples(part, "train")]
    assert divided == list(source.read_examples(pieces.Piece(str(path)), "train"))
    assert sum(part.size for part in parts) == path.stat().st_size
    if ".arrow" not in name and ".parquet" not in name:
        # Independently: a piece begins where a line begins, with the number of that line.
        raw = path.read_bytes()
        for part in parts[1:]:
            assert raw[part.begin - 1 : part.begin] == b"\n"
            assert part.first == raw[: part.begin].count(b"\n") + 1
        # The number of each document's line, of a reader that is not ours.
    if name == "plain.jsonl":
        numbered = {f"{name}:{i}": text for i, text in enumerate(TEXTS, 1)}
        both = divided + list(source.read_examples(pieces.Piece(str(path)), "validation"))
        assert {x["document_id"]: x["text"] for x in both} == numbered


def test_bytes_and_counts_do_not_depend_on_the_number_of_processes(tmp_path, small):
    files = write(tmp_path / "data")
    made, counts = {}, {}
    for workers in (1, 2, 3):
        source = source_of(files.values(), tmp_path / f"cache{workers}")
        with pool.limited(workers):
            counts[workers] = source.counts
        assert len(pieces.grouped(source.pieces("train"))) > 5
        run(build_of(tmp_path / f"made{workers}", source), workers)
        made[workers] = content(tmp_path / f"made{workers}")
        counted = next((tmp_path / f"cache{workers}" / "files" / "counted").iterdir())
        assert json.loads(counted.read_text())["splits"] == counts[workers]
    assert made[1] == made[2] == made[3] and counts[1] == counts[2] == counts[3]
    opened = store.open_cache(tmp_path / "made1")
    assert opened.num_records == counts[1]["train"]["documents"]
    # One shard has the same records in the same order.
    whole = build.Build(
        str(tmp_path / "whole"),
        piece_reader.Bytes(source),
        "train",
        piece_reader.FEATURES,
        {},
        (source.pieces("train"),),
    )
    run(whole, 1)
    one = store.open_cache(tmp_path / "whole")
    for feature in one.columns:
        every = [opened.columns[feature].values(i).tobytes() for i in range(one.num_records)]
        assert every == [one.columns[feature].values(i).tobytes() for i in range(one.num_records)]


def test_groups_are_neighbours_by_size():
    parts = [pieces.Piece(str(i), size=8_000_000) for i in range(40)]
    shards = pieces.grouped(parts)
    assert [piece for shard in shards for piece in shard] == parts
    assert [len(shard) for shard in shards] == [4] * 10
    assert len(pieces.grouped([pieces.Piece("a", size=31_000_000)])) == 1
    huge = pieces.grouped([pieces.Piece(str(i), size=1 << 30) for i in range(1000)])
    assert len(huge) == 1000  # not 64
    assert len(pieces.grouped([pieces.Piece(str(i), size=8 << 20) for i in range(10_000)])) > 300
    assert pieces.grouped([]) == ((),)


def test_a_killed_worker_is_an_error_that_names_the_shard_and_keeps_the_others(tmp_path, small):
    files = write(tmp_path / "data")
    source = source_of([files["plain.jsonl"]], tmp_path / "cache")
    run(build_of(tmp_path / "whole", source), 1)
    task = piece_reader.Killed(source, "plain.jsonl:60", str(tmp_path / "flag"))
    made = build_of(tmp_path / "made", source, task)
    with pytest.raises(pool.WorkerError, match=r"Shard \d of \d of .*killed by SIGKILL.*memory"):
        run(made, 2)
    finished = list((tmp_path / "made.building").glob("0000?.json"))
    assert finished and len(finished) < len(made.shards)
    with pytest.raises(ValueError, match="shards are not written"):
        made.finish()
    before = {path: path.stat().st_mtime_ns for path in finished}
    run(made, 2)
    assert content(tmp_path / "made") == content(tmp_path / "whole")
    assert {p: (tmp_path / "made" / p.name).stat().st_mtime_ns for p in finished} == before


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from tests.data.cache import build_test as test
from espalier.data import pieces
pieces.BLOCK_BYTES, pieces._SHARD_BYTES = 256, (1200, 4000)
source = test.source_of({paths!r}, {cache!r})
test.run(test.build_of({directory!r}, source, test.piece_reader.Slow(source)), 2)
"""


def children(parent):
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True
    )
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("seed", range(2))
def test_kills_of_workers_and_parents_leave_the_bytes(tmp_path, small, seed):
    rng = random.Random(seed)
    paths = [str(write(tmp_path / "data")["plain.jsonl"])]
    source = source_of(paths, tmp_path / "cache")
    source.num_input_examples("train")
    run(build_of(tmp_path / "whole", source), 1)
    directory = tmp_path / "made"
    code = PROGRAM.format(
        root=str(ROOT), paths=paths, cache=str(tmp_path / "cache"), directory=str(directory)
    )
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
        if attempt < 4:
            deadline = time.monotonic() + 20
            while (
                not children(process.pid) and process.poll() is None and time.monotonic() < deadline
            ):
                time.sleep(0.02)
            time.sleep(0.4 + rng.random() * 0.8)
            victims = [process.pid] if attempt % 2 else children(process.pid)[:1]
            for victim in victims:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        process.communicate()
        if directory.exists():
            break
    assert content(directory) == content(tmp_path / "whole")


def test_an_error_of_data_is_that_of_one_process(tmp_path, small):
    path = write(tmp_path / "data")["plain.jsonl"]
    rows = path.read_bytes().split(b"\n")
    rows[90], rows[40] = b"{broken", b'{"no": 1}'
    path.write_bytes(b"\n".join(rows))
    messages = set()
    for workers in (1, 2, 3):
        with pool.limited(workers), pytest.raises(DataError) as error:
            source_of([path], tmp_path / "cache").num_input_examples("train")
        messages.add(str(error.value))
    (message,) = messages
    assert f"{path}, line 41: no key 'text'" in message


def test_bad_rows_are_left_out_counted_and_listed(tmp_path, small, capfd):
    path = write(tmp_path / "data")["plain.jsonl"]
    rows = path.read_bytes().split(b"\n")
    bad = {
        10: b"{broken",
        41: b'{"no": 1}',
        42: b"[1]",
        77: b'{"text": "\xff"}',
        90: b'{"text": 3}',
    }
    for number, raw in bad.items():
        rows[number - 1] = raw
    path.write_bytes(b"\n".join(rows))
    offsets = {n: sum(len(row) + 1 for row in rows[: n - 1]) for n in bad}
    good = source_of([path], tmp_path / "cache")
    assert good.digest != source_of([path], tmp_path / "cache", on_bad_row="skip").digest
    for workers in (1, 3):
        source = source_of([path], tmp_path / f"cache{workers}", on_bad_row="skip")
        with pool.limited(workers):
            assert sum(count["documents"] for count in source.counts.values()) == 120 - len(bad)
        found = source.bad_rows
        assert (
            f"5 rows cannot be used and are left out, the first is {path}:10:"
            in capfd.readouterr().err
        )
        facts = {"bad_rows": found, "documents": {"train": 115}}
        ((level, said),) = tasks.notices({"tasks": {"set": facts}})
        assert level == "bad rows" and said.startswith("set: 5 rows cannot be used")
        listed = [json.loads(line) for line in pathlib.Path(found["all"]).read_text().splitlines()]
        assert [(row["row"], row["offset"]) for row in listed] == list(offsets.items())
        assert {row["path"] for row in listed} == {str(path)} and found["rows"] == 5
        assert found["first"][0].startswith(f"{path}:10:{offsets[10]}: line 10: malformed JSON")
        read = [x for part in source.pieces("train") for x in source.read_examples(part, "train")]
        read += source.read_examples(pieces.Piece(str(path)), "validation")
        numbers = {int(x["document_id"].rpartition(":")[2]) for x in read}
        assert numbers == set(range(1, 121)) - set(bad)


@pytest.mark.parametrize("where", ["in a piece", "in a process", "in all"])
def test_files_of_which_most_rows_are_bad_are_refused(tmp_path, small, monkeypatch, where):
    path = write(tmp_path / "data")["plain.jsonl"]
    rows = path.read_bytes().split(b"\n")
    (tmp_path / "b.jsonl").write_bytes(b"\n".join([b"{broken"] * 5 + rows))
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([b"{broken"] * 5 + rows))
    monkeypatch.setattr(row_files, "MAX_BAD_ROWS", 4 if where == "in a piece" else 9)
    if where == "in all":
        monkeypatch.setattr(
            document_files.DocumentFiles,
            "_read_pieces",
            lambda self, _, *args: counting.ReadByPieces._read_pieces(self, [], *args),
        )
    paths = [tmp_path / "b.jsonl", tmp_path / "c.jsonl"]
    source = source_of(paths, tmp_path / "cache", on_bad_row="skip")
    with pool.limited(1), pytest.raises(DataError, match="jsonl: more than . rows cannot be used"):
        assert source.counts


def test_a_line_that_is_too_long_is_left_out_alone(tmp_path, small):
    path = tmp_path / "long.jsonl"
    path.write_text(lines(["a", "b" * 5000, "c"]))
    settings = {"validation_fraction": 0.0, "on_bad_row": "skip"}
    source = source_of([path], tmp_path / "cache", max_document_bytes=100, **settings)
    assert [x["text"] for x in source.read_examples(pieces.Piece(str(path)), "train")] == ["a", "c"]
    assert source.bad_rows["rows"] == 1
    # The limit decides which rows there are.
    assert source.digest != source_of([path], tmp_path / "cache", **settings).digest
    everything = source_of([path], tmp_path / "cache", text_key="none", **settings)
    with pytest.raises(DataError, match="3 rows cannot be used, the first is .*long.jsonl:1:0"):
        everything.num_input_examples("train")
    with pytest.raises(ValueError, match="on_bad_row"):
        source_of([path], tmp_path / "cache", on_bad_row="ignore")


def test_other_versions_are_refused_by_name(tmp_path, small, monkeypatch):
    source = source_of([write(tmp_path / "data")["plain.jsonl"]], tmp_path / "cache")
    made = build_of(tmp_path / "made", source)
    made.start()
    made.write_shard(0)
    now = versions.own()
    monkeypatch.setattr(versions, "own", lambda: {**now, "tokenizers": "0.0.1"})
    for refused in (made.start, lambda: made.write_shard(1)):
        with pytest.raises(
            build.BuildMismatchError, match=r"tokenizers .*here 0.0.1.*delete"
        ) as error:
            refused()
        assert str(tmp_path / "made.building") in str(error.value)
    monkeypatch.undo()
    run(build_of(tmp_path / "made", source), 1)  # goes on


def test_other_code_of_a_task_is_refused_by_name(tmp_path, small, monkeypatch):
    source = source_of([write(tmp_path / "data")["plain.jsonl"]], tmp_path / "cache")
    made = build_of(tmp_path / "made", source)
    made.start()
    made.write_shard(0)
    monkeypatch.setattr(piece_reader.Bytes, "records", lambda self, split, pieces: iter(()))
    for refused in (made.start, lambda: made.write_shard(1)):
        with pytest.raises(build.BuildMismatchError, match=r"code of \S*Bytes \w+ \(here .*delete"):
            refused()
    monkeypatch.undo()
    monkeypatch.setattr(fingerprint, "_own_code", lambda: "other")
    with pytest.raises(build.BuildMismatchError, match=r"code of espalier.data \w+ \(here other\)"):
        made.start()


@pytest.mark.parametrize("name", ["plain.jsonl", "zipped.jsonl.gz", "rows.parquet", "rows.arrow"])
def test_a_file_that_changes_after_its_digest_is_an_error(tmp_path, small, name):
    path = write(tmp_path / "data")[name]
    source = source_of([path], tmp_path / "cache", on_bad_row="skip")
    made = build_of(tmp_path / "made", source)
    made.start()
    times = os.stat(path)
    reading = source.read_examples(made.shards[0][0], "train")
    next(reading)
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for refused in (lambda: list(reading), lambda: made.write_shard(0)):
        with pytest.raises(ChangedError, match=f"{name} was changed since"):
            refused()
    assert made._entry(0) is None
    run(build_of(tmp_path / "made", source_of([path], tmp_path / "cache", on_bad_row="skip")), 1)


def test_a_shard_that_cannot_be_written_is_named_and_the_others_stay(tmp_path, small, monkeypatch):
    source = source_of([write(tmp_path / "data")["plain.jsonl"]], tmp_path / "cache")
    made = build_of(tmp_path / "made", source)
    made.start()
    made.write_shard(0)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(
        OSError, match=r"Shard 2 of \d of the token cache .*made cannot be written .Perm"
    ):
        made.write_shard(1)
    monkeypatch.undo()
    assert build.finished_shard(tmp_path / "made.building", 0)
    # An error of reading is not one of writing.
    os.remove(source.files["train"][0])
    with pytest.raises(FileNotFoundError):
        made.write_shard(1)


def test_a_build_of_other_shards_begins_anew(tmp_path, small, monkeypatch):
    source = source_of([write(tmp_path / "data")["plain.jsonl"]], tmp_path / "cache")
    one = build_of(tmp_path / "made", source)
    one.start()
    one.write_shard(0)
    first, second, *rest = one.shards
    other = build.Build(
        one.directory,
        one.task,
        "train",
        one.features,
        {},
        (first[:1], (*first[1:], *second), *rest),
    )
    assert other.fingerprint == one.fingerprint
    other.start()
    assert not list((tmp_path / "made.building").glob("*.bin"))


def test_digests_and_lines_are_read_once(tmp_path, small, monkeypatch):
    path = write(tmp_path / "data")["plain.jsonl"]
    digests = file_digests.FileDigests(tmp_path / "memory.json")
    plain = digests.digest(str(path))
    marks = digests.marks(str(path))
    assert digests.digest(str(path)) == plain and len(marks) > 20
    digests.save()
    monkeypatch.setattr(file_digests, "_read", None)
    again = file_digests.FileDigests(tmp_path / "memory.json")
    assert again.digest(str(path)) == plain
    assert [tuple(mark) for mark in again.marks(str(path))] == list(marks)
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "BLOCK_BYTES", 999)
        assert len(again.marks(str(path))) < len(marks)
