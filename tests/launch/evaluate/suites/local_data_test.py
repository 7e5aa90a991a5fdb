"""Evaluation sets as they are found, and what is said of those that are not."""

import gzip
import json

import pytest

from espalier.launch.evaluate.suites import local_data
from espalier.launch.evaluate.suites.local_data import MissingDataError, Source, WrongDataError

SOURCE = Source(folder="set", split="test", columns=("a",), repository="owner/set")


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_all_files_of_the_split_are_read_and_no_others(tmp_path):
    write(tmp_path / "set/data/test-00001-of-00002.jsonl", [{"a": 2}])
    write(tmp_path / "set/data/test-00000-of-00002.jsonl", [{"a": 1}])
    write(tmp_path / "set/data/train-00000-of-00001.jsonl", [{"a": 3}])
    write(tmp_path / "set/README.md", [{"a": 4}])
    assert [row["a"] for row in local_data.rows(SOURCE, tmp_path)] == [1, 2]


def test_no_file_is_read_twice_and_no_part_of_a_set_alone(tmp_path):
    write(tmp_path / "set/test.jsonl", [{"a": 1}])
    packed = gzip.compress((tmp_path / "set/test.jsonl").read_bytes())
    (tmp_path / "set/test.jsonl.gz").write_bytes(packed)
    (tmp_path / "set/test_b.jsonl.gz").write_bytes(packed)
    assert len(local_data.rows(SOURCE, tmp_path)) == 2
    write(tmp_path / "other/set/test-00001-of-00003-ab12.jsonl", [{"a": 1}])
    write(tmp_path / "other/set/test-00000-of-00003.jsonl", [{"a": 1}])
    with pytest.raises(MissingDataError, match=r"test-\*-of-00003 has 2 of 3 files: hf download"):
        local_data.rows(SOURCE, tmp_path / "other")


def test_a_set_that_is_missing_is_named_with_the_way_to_get_it(tmp_path, monkeypatch):
    monkeypatch.delenv(local_data.VARIABLE, raising=False)
    with pytest.raises(MissingDataError, match="give --data_dir=DIR, or set ESPALIER_EVAL_DATA"):
        local_data.rows(SOURCE)
    monkeypatch.setenv(local_data.VARIABLE, str(tmp_path))
    with pytest.raises(MissingDataError) as error:
        local_data.rows(SOURCE)
    assert "no test*" in str(error.value) and f"below {tmp_path}/set" in str(error.value)
    assert f"hf download --repo-type=dataset owner/set --local-dir={tmp_path}/set" in str(
        error.value
    )


def test_other_columns_than_the_public_ones_are_refused(tmp_path):
    write(tmp_path / "set/test.jsonl", [{"a": 1}, {"b": 2}])
    with pytest.raises(WrongDataError, match="test.jsonl, line 2: there is no column 'a', but b"):
        local_data.rows(SOURCE, tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path):
    write(tmp_path / "set/test.parquet", [{"a": 1}])
    with pytest.raises(WrongDataError, match="test.parquet is damaged or no Parquet file"):
        local_data.rows(SOURCE, tmp_path)
