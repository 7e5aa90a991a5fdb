"""Cleaned documents against a few lines of Python over all documents in memory, by one process, two, and Apache Beam."""

import dataclasses
import gzip
import io
import json
import os
import signal

import numpy as np
import pyarrow
import pytest

from espalier.common.pipelines import PipelineError
from espalier.common.storage import paths
from espalier.common.storage.ranges import ChangedError
from espalier.data import pieces
from espalier.data.cache import pool
from espalier.data.clean import documents
from espalier.data.clean.documents import Cleaning, OutputInUseError, OutputMismatchError
from espalier.data.text import dedup, document_files
from espalier.data.text.decontamination import Overlap
from espalier.data.text.document_filters import DocumentFilter, Metadata
from espalier.data.text.documents import DataError
from tests.common.pipelines_test import PROCESSES

SECRET = " ".join(f"question{i} of the evaluation" for i in range(10))
FILTERS = ("lang", "overlap with test.jsonl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KilledAt(DocumentFilter):
    """Keeps everything; a process that comes to the document is killed, but the first `spared` and all after the killed one."""

    text: str
    seen: str  # file with a byte for each time
    spared: int = 0

    def __call__(self, document):
        if document["text"] == self.text:
            with open(self.seen, "ab") as file:
                times = file.tell()
                file.write(b".")
            if times == self.spared:
                os.kill(os.getpid(), signal.SIGKILL)
        return True


def words(rng, count=120):
    return ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(count)]


@pytest.fixture(scope="module")
def rows():
    """Rows with copies and chains of near-duplicates over all files, empty ones, other languages and text of a test set."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(40):
        texts.append(words(rng))
        for _ in range(rng.integers(4)):
            text = list(texts[-1])
            for place in rng.integers(len(text), size=rng.integers(5)):
                text[place] = "other"
            texts.append(text)
    texts = [" ".join(text) for text in texts]
    texts += ["", "", f"{texts[0]} {SECRET}", f"{SECRET} {' '.join(words(rng))}"]
    order = rng.permutation(len(texts))
    return [
        {"text": texts[i], "lang": "de" if i % 7 == 3 else "en", "meta": {"n": int(i)}}
        for i in order
    ]


@pytest.fixture
def folder(tmp_path, rows):
    """A folder of three files, one of them compressed, and a test set."""
    source = tmp_path / "source"
    source.mkdir()
    for number, suffix in enumerate(("", "", ".gz")):
        lines = "".join(json.dumps(row) + "\n" for row in divided(rows)[number]).encode()
        data = gzip.compress(lines) if suffix else lines
        (source / f"{number}.jsonl{suffix}").write_bytes(data)
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": SECRET}) + "\n")
    return tmp_path


def divided(rows):
    return rows[:70], rows[70:75], rows[75:]


@pytest.fixture(autouse=True)
def each_file_is_a_shard(monkeypatch):
    monkeypatch.setattr(pieces, "_SHARD_BYTES", (1, 1))


def cleaning(folder, output, *, filters=None, on_bad_row="error", **settings):
    if filters is None:
        test_set = str(folder / "test.jsonl")
        filters = [Metadata(key="lang", keep=["en"]), Overlap(evaluation_set=test_set)]
    source = document_files.find(
        name="documents",
        files=str(folder / "source" / "*"),
        validation_fraction=0,
        filters=filters,
        on_bad_row=on_bad_row,
        cache_dir=folder / "cache",
    )
    shards = documents.shards_of(source)
    return Cleaning(source=source, shards=shards, output=str(folder / output), **settings)


def content(output):
    return {path.name: path.read_bytes() for path in sorted(output.iterdir())}


def shard(output, number):
    raw = (output / f"{number:05d}.jsonl.zst").read_bytes()
    lines = pyarrow.CompressedInputStream(io.BytesIO(raw), "zstd").read().decode()
    return [json.loads(line) for line in lines.splitlines()]


def sized(rows):
    return {"documents": len(rows), "bytes": sum(len(row["text"]) for row in rows)}


def expected(rows, threshold):
    """Rows of each shard, and the counts, by all documents in memory."""
    placed = [
        {"id": f"{number}.jsonl{'.gz' * (number == 2)}:{line}", **row}
        for number, part in enumerate(divided(rows))
        for line, row in enumerate(part, start=1)
    ]
    german = [row for row in placed if row["text"] and row["lang"] == "de"]
    overlapping = [row for row in placed if SECRET in row["text"] and row["lang"] == "en"]
    left = [row for row in placed if row["text"] and row not in german and row not in overlapping]
    earlier = dedup.near_duplicates([row["text"] for row in left], threshold=threshold)
    kept = [row for row, of in zip(left, earlier, strict=True) if of is None]
    assert len(german) > 5 and overlapping and len(left) - len(kept) > 20
    dropped = {
        "empty": sized([row for row in placed if not row["text"]]),
        **dict(zip(FILTERS, (sized(german), sized(overlapping)), strict=True)),
        "near-duplicates": sized([row for row in left if row not in kept]),
    }
    shards = [[row for row in kept if row["id"].startswith(str(number))] for number in range(3)]
    for row in kept:
        del row["lang"]
    return shards, {"read": sized(placed), "dropped": dropped, "kept": sized(kept)}


def test_one_process_and_two_keep_what_stays_in_memory(folder, rows):
    shards, counts = expected(rows, 0.8)
    with pool.limited(1):
        assert cleaning(folder, "one", keys=("meta.n",)).run() == counts
    assert [shard(folder / "one", number) for number in range(3)] == shards
    assert json.loads((folder / "one" / "counts.json").read_text()) == counts
    with pool.limited(2):
        cleaning(folder, "two", keys=("meta.n",)).run()
    assert content(folder / "two") == content(folder / "one")
    assert sorted(content(folder / "one"))[-2:] == ["counts.json", "documents.json"]


def test_without_a_threshold_near_duplicates_stay(folder, rows):
    with pool.limited(1):
        counts = cleaning(folder, "out", threshold=None).run()
    _, with_duplicates = expected(rows, 0.8)
    dropped = with_duplicates["dropped"].pop("near-duplicates")
    assert counts["dropped"] == with_duplicates["dropped"]
    total = {unit: with_duplicates["kept"][unit] + dropped[unit] for unit in dropped}
    assert counts["kept"] == total
    assert sum(len(shard(folder / "out", number)) for number in range(3)) == total["documents"]


def test_keys_in_parts_and_few_sketches_at_a_time_give_the_same(folder, monkeypatch):
    with pool.limited(1):
        cleaning(folder, "one").run()
        monkeypatch.setattr(documents, "_PART_BYTES", 10_000)
        monkeypatch.setattr("espalier.data.clean.near_duplicates._ROWS", 3)
        assert len(cleaning(folder, "parts")._search.elements) > dedup.BANDS
        cleaning(folder, "parts").run()
    assert content(folder / "parts") == content(folder / "one")


@pytest.mark.parametrize("done", [1, 3, 5])
def test_an_interrupted_run_goes_on(folder, done):
    with pool.limited(1):
        cleaning(folder, "one").run()
        first = cleaning(folder, "out")
        first._start()
        documents._in_processes(first.steps()[:done])
        cleaning(folder, "out").run()
    assert content(folder / "out") == content(folder / "one")


@pytest.mark.parametrize("store", ["gs"], indirect=True)
def test_the_output_can_be_in_a_store(folder, store):
    with pool.limited(1):
        cleaning(folder, "one").run()
        there = dataclasses.replace(cleaning(folder, "one"), output=f"{store.address}/clean")
        counts = there.run()
        assert there.run() == counts  # it is complete
    written = paths.entries(there.output)
    assert {name: paths.read(f"{there.output}/{name}") for name in written} == content(
        folder / "one"
    )


def test_an_output_of_something_else_is_refused(folder):
    with pool.limited(1):
        cleaning(folder, "out").run()
        with pytest.raises(OutputMismatchError, match="documents of other near_duplicates: give"):
            cleaning(folder, "out", threshold=0.9).run()
        with open(folder / "source" / "0.jsonl", "a") as file:
            file.write('{"text": "more", "lang": "en"}\n')
        with pytest.raises(OutputMismatchError, match="documents of other files, shards: give"):
            cleaning(folder, "out").run()
    with pytest.raises(OutputMismatchError, match=r"is not empty \(0.jsonl is there\)"):
        cleaning(folder, "source").run()
    for threshold in (80, 0.49):
        with pytest.raises(
            ValueError, match=f"near_duplicates is {threshold}; .* are not compared"
        ):
            cleaning(folder, "out", threshold=threshold)


def test_an_output_of_other_bytes_with_the_same_times_and_of_other_code_is_refused(
    folder, monkeypatch
):
    def run(output):
        with pool.limited(1):
            cleaning(folder, output, filters=[KilledAt(text="none", seen="")]).run()

    run("out")
    run("out")  # as it was
    path = folder / "source" / "1.jsonl"
    times, text = os.stat(path), path.read_text()
    path.write_text(text.replace("a", "b"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(OutputMismatchError, match="documents of other files: give"):
        run("out")
    run("later")
    monkeypatch.setattr(KilledAt, "__call__", lambda self, document: False)
    with pytest.raises(OutputMismatchError, match=r"other code of tests\.data\..*KilledAt: give"):
        run("later")


@pytest.mark.parametrize("threshold", [None, 0.8])
def test_bad_rows_can_be_left_out_and_listed(folder, threshold):
    with open(folder / "source" / "1.jsonl", "a") as file:
        file.write('{\n{"text": "the last one", "lang": "en"}\n')
    with pool.limited(1):
        counts = cleaning(folder, "out", on_bad_row="skip", threshold=threshold).run()
    assert counts["bad_rows"] == {"rows": 1}
    (listed,) = (folder / "out" / "bad_rows.jsonl").read_text().splitlines()
    assert (json.loads(listed)["row"], shard(folder / "out", 1)[-1]["text"]) == (6, "the last one")


@pytest.mark.parametrize("threshold", [0.8, None])
def test_a_row_without_a_key_of_filters_or_of_the_output_is_bad_in_each_reading(
    tmp_path, threshold
):
    (tmp_path / "source").mkdir()
    rng = np.random.default_rng(0)
    rows = [{"text": " ".join(words(rng)), "lang": "de" if i % 2 else "en", "url": f"u{i}"} for i in range(12)]  # fmt: skip
    del rows[1]["url"], rows[2]["url"], rows[5]["lang"]
    rows[6]["url"], rows[8]["url"] = "half \ud800", {"\udfff": 1}  # which no file in UTF-8 can hold
    (tmp_path / "source" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"threshold": threshold, "keys": ("url",), "on_bad_row": "skip"}
    english = [Metadata(key="lang", keep=["en"])]
    with pool.limited(1):
        counts = cleaning(tmp_path, "out", filters=english, **settings).run()
    assert counts["bad_rows"] == {"rows": 5}
    listed = (tmp_path / "out" / "bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in listed] == [2, 3, 6, 7, 9]
    assert shard(tmp_path / "out", 0) == [
        {"id": f"a.jsonl:{i + 1}", "text": rows[i]["text"], "url": f"u{i}"} for i in (0, 4, 10)
    ]
    misspelt = {**settings, "keys": ("ulr",)}
    with pool.limited(1), pytest.raises(DataError, match="None of the 12 rows .* no key 'ulr'"):
        cleaning(tmp_path, "misspelt", filters=[], **misspelt).run()
    assert not (tmp_path / "misspelt" / "counts.json").exists()
    where = "a.jsonl, line 7: 'url' is not valid Unicode"
    rows = [rows[0]] * 6 + rows[6:]
    (tmp_path / "source" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pool.limited(1), pytest.raises(DataError, match=where):
        cleaning(tmp_path, "error", filters=[], **{**settings, "on_bad_row": "error"}).run()


def test_one_process_at_a_time_makes_an_output(folder):
    with (
        cleaning(folder, "out")._locked(),
        pytest.raises(OutputInUseError, match="process .* writes"),
    ):
        cleaning(folder, "out").run()
    with pool.limited(1):
        counts = cleaning(folder, "out").run()
    assert cleaning(folder, "out").run() == counts
    assert not (folder / "out" / "work").exists()


def test_large_files_are_divided(folder, monkeypatch):
    with pool.limited(1):
        counts = cleaning(folder, "one").run()
        monkeypatch.setattr(documents, "_DIVIDED_BYTES", 1_000)
        monkeypatch.setattr(pieces, "BLOCK_BYTES", 20_000)
        divided = cleaning(folder, "out")
        assert len(divided.shards) > 3
        assert divided.run() == counts
    kept = [row for number in range(len(divided.shards)) for row in shard(folder / "out", number)]
    assert kept == [row for number in range(3) for row in shard(folder / "one", number)]


def test_bad_files_are_one_error(folder):
    with open(folder / "source" / "1.jsonl", "a") as file:
        file.write("{\n")
    with pool.limited(2), pytest.raises(DataError, match="1.jsonl, line 6: malformed JSON"):
        cleaning(folder, "out").run()
    begun = cleaning(folder, "later", filters=[])
    begun._start()
    with open(folder / "source" / "0.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ChangedError, match="0.jsonl was changed since this run began to read it"):
        begun.filter_shard(0)


@pytest.mark.beam
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of Beam's
def test_apache_beam_gives_the_same_also_after_a_worker_was_killed(folder, rows):
    _, counts = expected(rows, 0.8)
    with pool.limited(1):
        cleaning(folder, "one").run()
    kill = KilledAt(text=rows[-1]["text"], seen=str(folder / "seen"))
    filters = [*cleaning(folder, "beam").source.filters, kill]
    killed = cleaning(folder, "beam", filters=filters)
    with pytest.raises(PipelineError, match="goes on after it"):
        killed.run([PROCESSES])
    assert not (folder / "beam" / "counts.json").exists()
    counts["dropped"]["KilledAt"] = {"documents": 0, "bytes": 0}
    assert killed.run([PROCESSES]) == counts
    for number in range(3):
        name = f"{number:05d}.jsonl.zst"
        assert (folder / "beam" / name).read_bytes() == (folder / "one" / name).read_bytes()


@pytest.mark.beam
def test_a_malformed_line_is_the_error_of_a_pipeline(folder):
    with open(folder / "source" / "1.jsonl", "a") as file:
        file.write("{\n")
    with pytest.raises(PipelineError, match="failed: .*1.jsonl, line 6: malformed JSON"):
        cleaning(folder, "out").run(["--runner=DirectRunner"])
