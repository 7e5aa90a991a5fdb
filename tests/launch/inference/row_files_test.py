"""Files of rows that a stopped command continues."""

import json

import pytest

from launch.inference import row_files
from launch.inference.row_files import RowFileError


def test_rows_are_continued_after_a_stop_within_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    with row_files.resumed(path) as file:
        assert file.rows == []
        file.add({"a": "é\udc80"})
        assert json.loads(path.read_bytes()) == {"a": "é\udc80"}  # there before the file is closed
    with open(path, "a") as torn:
        torn.write('{"a": "cut sh')
    with row_files.resumed(path) as file:
        assert file.rows == [(f"{path}, line 1", {"a": "é\udc80"})]
        file.add({"a": 2})
    with row_files.resumed(path) as file:
        assert [row["a"] for _, row in file.rows] == ["é\udc80", 2]


def test_a_damaged_row_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "rows.jsonl"
    for damage in ("nonsense", "[1]", "\udcff"):
        text = f'{{"a": 1}}\n{damage}\n{{"a": 2}}\n'
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(RowFileError, match="rows.jsonl, line 2"), row_files.resumed(path):
            pass
        assert path.read_text(errors="surrogateescape") == text


@pytest.mark.parametrize("text", ["a note", '{"precious": 1}', '{"a": 1}\na note'])
def test_a_file_of_something_else_is_left_alone(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(RowFileError, match="or give another path"), row_files.resumed(path):
        pass
    assert path.read_text() == text


def test_one_process_writes_and_others_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    with row_files.resumed(path) as file:
        file.add({"a": 1})
        with pytest.raises(RowFileError, match="another process writes it"):
            row_files.resumed(path).__enter__()
        with row_files.resumed(path, writer=False) as reader:
            assert len(reader.rows) == 1
