"""Files of rows that a stopped command continues."""

import json
import os

import pytest

from espalier.launch.code_mix import synthetic_code
from espalier.launch.inference import generate, row_files, score
from espalier.launch.inference.row_files import RowFileError


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


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.ZST"])
def test_a_file_is_written_as_its_name_says(tmp_path, name):
    path = str(tmp_path / name)
    row_files.write(path, [{"text": "é"}, {"text": "\ud800"}])
    assert os.listdir(tmp_path) == [name]
    with open(path, "rb") as file:
        assert file.read(1) == {"l": b"{", "z": b"\x1f", "T": b"\x28"}[name[-1]]
    rows = [row for _, row in row_files.read(path, example="")]
    assert rows == [{"text": "é"}, {"text": "\ud800"}]


def test_an_output_that_the_work_would_lose_is_refused_before_it(tmp_path, capsys):
    inputs = tmp_path / "in.jsonl"
    inputs.write_text("{}\n")
    (tmp_path / "link.jsonl").symlink_to(inputs)
    os.link(inputs, tmp_path / "hard.jsonl")
    new = str(tmp_path / "new.jsonl")
    for command in (generate.generate_file, score.score):
        for name in ("in.jsonl", "link.jsonl", "hard.jsonl", "./in.jsonl"):
            output = f"{tmp_path}/{name}"
            with pytest.raises(row_files.RowFileError, match="file of --inputs, which would be"):
                command(None, checkpoint="", inputs=str(inputs), output=output)
    row_files.check_output(new, compressed=True, others={"inputs": str(inputs), "pairs": None})
    with pytest.raises(row_files.RowFileError, match="file of --output"):
        row_files.check_output(new, "pairs", others={"output": new})
    with pytest.raises(row_files.RowFileError, match="is written uncompressed"):
        row_files.check_output(f"{new}.gz", "json")
    for out in (f"{inputs}/x", str(inputs)):
        assert synthetic_code.main(argv=[f"--out={out}"]) == 2
        assert f"--out={out}" in capsys.readouterr().err
