"""Finding data files, holding documents out, counting, and noticing change."""

import json
import os

import pytest

from espalier.common import files as common_files
from espalier.data.text import document_files
from espalier.data.text.documents import DataError


@pytest.fixture
def find(tmp_path):
    def call(**arguments):
        return document_files.find(name="mine", cache_dir=tmp_path / "cache", **arguments)

    return call


def _write(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_a_glob_finds_files_once_in_order(tmp_path, find):
    _write(tmp_path / "b" / "1.jsonl", ["three"])
    _write(tmp_path / "a" / "1.jsonl", ["one", "", "two"])
    files = find(files=[f"{tmp_path}/**/*.jsonl", f"{tmp_path}/a/*.jsonl"], validation_fraction=0)
    assert [(d.id, d.text) for d in files.documents("mine", "train")] == [
        ("a/1.jsonl:1", "one"),
        ("a/1.jsonl:3", "two"),
        ("b/1.jsonl:1", "three"),
    ]
    assert files.splits == ("train",)
    assert files.counts == {"train": {"documents": 3, "bytes": 11}}
    assert files.size("mine") == 11


def test_held_out_documents_are_disjoint_and_follow_the_text(tmp_path, find):
    texts = [f"document {i}" for i in range(500)]
    _write(tmp_path / "x.jsonl", texts + texts[:50])
    _write(tmp_path / "reversed" / "y.jsonl", reversed(texts))
    both = find(files=f"{tmp_path}/x.jsonl", validation_fraction=0.2)
    split = {s: {d.text for d in both.documents("mine", s)} for s in both.splits}
    assert split["train"] | split["validation"] == set(texts)
    assert not split["train"] & split["validation"]
    assert 60 < len(split["validation"]) < 140
    other = find(files=f"{tmp_path}/reversed/*.jsonl", validation_fraction=0.2)
    assert {d.text for d in other.documents("mine", "validation")} == split["validation"]


def test_validation_files_replace_the_fraction(tmp_path, find):
    _write(tmp_path / "train.jsonl", ["a", "b"])
    _write(tmp_path / "held.jsonl", ["c"])
    files = find(files=f"{tmp_path}/train.jsonl", validation_files=f"{tmp_path}/held.jsonl")
    assert [d.text for d in files.documents("mine", "validation")] == ["c"]
    assert files.counts["train"]["documents"] == 2
    with pytest.raises(ValueError, match="matched by files and by validation_files"):
        find(files=f"{tmp_path}/*.jsonl", validation_files=f"{tmp_path}/held.jsonl")


def test_hash_sees_content_names_and_settings_but_not_time_or_place(tmp_path, find):
    _write(tmp_path / "one" / "x.jsonl", ["a", "b"])
    _write(tmp_path / "two" / "x.jsonl", ["a", "b"])

    def digest(where="one", **arguments):
        return find(files=f"{tmp_path}/{where}/*.jsonl", **arguments).digest

    first = digest()
    assert digest("two") == first
    os.utime(tmp_path / "one" / "x.jsonl", (1, 1))
    assert digest() == first
    assert digest(text_key="body") != first
    assert digest(max_document_bytes=1000) == first  # which refuses documents, and changes none
    assert digest(validation_fraction=0.5) != first
    _write(tmp_path / "one" / "x.jsonl", ["a", "c"])  # same size
    changed = digest()
    assert changed != first
    (tmp_path / "one" / "x.jsonl").rename(tmp_path / "one" / "y.jsonl")
    assert digest() not in (first, changed)


def test_counts_are_remembered_for_the_same_content(tmp_path, find, monkeypatch):
    _write(tmp_path / "x.jsonl", ["a", "b"])
    arguments = {"files": f"{tmp_path}/x.jsonl", "validation_fraction": 0}
    counts = find(**arguments).counts
    monkeypatch.setattr(document_files.documents, "read", None)
    assert find(**arguments).counts == counts


def test_missing_glob_names_argument_and_place(tmp_path, find):
    with pytest.raises(FileNotFoundError, match=r"mine: files='nothing/\*.jsonl' matches no file"):
        find(files="nothing/*.jsonl")
    _write(tmp_path / "x.jsonl", ["a"])
    with pytest.raises(FileNotFoundError, match="mine: validation_files='gone.jsonl'"):
        find(files=f"{tmp_path}/x.jsonl", validation_files="gone.jsonl")


def test_empty_list_of_globs(find):
    with pytest.raises(ValueError, match="mine: files is empty; give a glob"):
        find(files=[])


def test_empty_files(tmp_path, find):
    _write(tmp_path / "x.jsonl", ["", ""])
    (tmp_path / "y.txt").write_text("")
    files = find(files=[f"{tmp_path}/x.jsonl", f"{tmp_path}/y.txt"])
    with pytest.raises(
        DataError, match=r"mine: .*x.jsonl, .*y.txt: no document; every file is empty"
    ):
        files.counts  # noqa: B018


def test_fraction_that_leaves_a_split_empty(tmp_path, find):
    (tmp_path / "x.txt").write_text("one document")
    files = find(files=f"{tmp_path}/x.txt")
    with pytest.raises(DataError, match="validation_fraction=0.01 of 1 documents leaves none"):
        files.counts  # noqa: B018


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_fraction_out_of_range(tmp_path, find, fraction):
    _write(tmp_path / "x.jsonl", ["a"])
    with pytest.raises(ValueError, match="must be in \\[0, 1\\)"):
        find(files=f"{tmp_path}/x.jsonl", validation_fraction=fraction)


@pytest.mark.parametrize("module", ["documents", "splits"])
def test_hash_sees_that_reading_or_holding_out_has_changed(tmp_path, find, monkeypatch, module):
    _write(tmp_path / "x.jsonl", ["a", "b"])
    before = find(files=f"{tmp_path}/x.jsonl").digest
    monkeypatch.setattr(getattr(document_files, module), "VERSION", 99)
    assert find(files=f"{tmp_path}/x.jsonl").digest != before


def test_sample_is_of_all_files_by_their_size(tmp_path, find):
    def letters(num_bytes, **arguments):
        files = find(files=f"{tmp_path}/*.jsonl", validation_fraction=0, **arguments)
        sampled = [d.text for d in files.sample("mine", num_bytes)]
        assert sampled == [d.text for d in files.sample("mine", num_bytes)]
        assert num_bytes <= sum(map(len, sampled)) < num_bytes + 100
        return {name: sum(text[0] == name for text in sampled) for name in "abcd"}

    for name, count in (("a", 600), ("b", 300), ("c", 99), ("d", 1)):
        _write(tmp_path / f"{name}.jsonl", [name * 100] * count)
    assert letters(100_000) == {"a": 600, "b": 300, "c": 99, "d": 1}
    few = letters(10_000)
    assert 59 <= few["a"] <= 61 and 29 <= few["b"] <= 31 and 9 <= few["c"] <= 11 and few["d"] == 1


def test_sample_smaller_than_the_files_are_many_takes_some_of_any_size(tmp_path, find):
    for i in range(100):
        _write(tmp_path / f"{i:02d}.jsonl", [f"{i:02d}" * (10 + i)])
    files = find(files=f"{tmp_path}/*.jsonl", validation_fraction=0)
    taken = [int(d.text[:2]) for d in files.sample("mine", 2_000)]
    assert 10 < len(taken) < 50
    assert min(taken) < 20 and max(taken) > 80


def test_counts_are_not_kept_where_nothing_can_be_written(tmp_path, find, monkeypatch):
    _write(tmp_path / "x.jsonl", ["a"])

    def refused(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(common_files, "write_json", refused)
    files = find(files=f"{tmp_path}/x.jsonl", validation_fraction=0)
    assert files.counts == {"train": {"documents": 1, "bytes": 1}}
