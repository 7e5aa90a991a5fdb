"""Reading data files, and one clear error for each way in which a file can be bad."""

import gzip
import json
import tracemalloc

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from espalier.data import pieces
from espalier.data.cache.file_digests import FileDigests
from espalier.data.text import documents, row_files
from espalier.data.text.documents import DataError, Document, Format

LINES = [{"text": "one\ntwo", "name": "a"}, {"text": "日本語 é", "name": "b"}, {"text": ""}]


def _jsonl(records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _read(path, **format):
    return list(documents.read(path, Format(**format)))


def _compress(path, content: bytes):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        half = len(content) // 2  # two frames, as `cat a.zst b.zst` makes them
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(content[:half]) + compress(content[half:]))
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "X.JSONL"])
def test_json_lines_plain_and_compressed(tmp_path, name):
    path = _compress(
        tmp_path / name, b"\xef\xbb\xbf" + _jsonl(LINES[:2]) + b"\n" + _jsonl(LINES[2:])
    )
    assert _read(path) == [
        Document(f"{name}:1", "one\ntwo"),
        Document(f"{name}:2", "日本語 é"),
        Document(f"{name}:4", ""),
    ]


def test_keys_are_chosen(tmp_path):
    path = _compress(tmp_path / "x.jsonl", _jsonl([{"body": "t", "url": 7}]))
    assert _read(path, text_key="body", id_key="url") == [Document("7", "t")]


def test_text_by_file_paragraph_and_line(tmp_path):
    path = _compress(tmp_path / "x.txt", b"a\nb\n\n \nc\r\n")
    assert _read(path) == [Document("x.txt", "a\nb\n\n \nc\r\n")]
    assert _read(path, document_per="paragraph") == [
        Document("x.txt:1", "a\nb\n"),
        Document("x.txt:5", "c\r\n"),
    ]
    assert [d.text for d in _read(path, document_per="line")] == ["a", "b", "", " ", "c"]
    with pytest.raises(ValueError, match="document_per is 'page'.*'file', 'paragraph', 'line'"):
        Format(document_per="page")


@pytest.mark.parametrize(
    "kind", [pyarrow.time64("us"), pyarrow.timestamp("us"), pyarrow.date64(), pyarrow.duration("s")]
)
def test_a_value_that_python_does_not_have_is_one_clear_error(tmp_path, kind):
    values = pyarrow.array([2**62]).view(kind)
    parquet.write_table(pyarrow.table({"text": ["a"], "id": values}), tmp_path / "x.parquet")
    message = "x.parquet, rows 0 to 0: 'id' has a value of .* that Python does not have"
    with pytest.raises(DataError, match=message):
        _read(tmp_path / "x.parquet", id_key="id")


@pytest.mark.parametrize("key", ["text", "id"])
def test_two_columns_of_one_name_are_one_clear_error_where_they_are_read(tmp_path, key):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, ["text", "id", key])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=f"x.parquet has 2 columns '{key}': rename"):
        _read(tmp_path / "x.parquet", id_key="id")
    assert key == "text" or _read(tmp_path / "x.parquet")[0].text == "a"


def test_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": ["a", "é"], "id": [3, 4], "other": [1.0, 2.0]})
    parquet.write_table(table, path)
    assert _read(path) == [Document("x.parquet:0", "a"), Document("x.parquet:1", "é")]
    assert _read(path, id_key="id") == [Document("3", "a"), Document("4", "é")]
    with pytest.raises(
        DataError, match=r"x.parquet.*no key 'body'; present are 'text', 'id', 'other'"
    ):
        _read(path, text_key="body")
    with pytest.raises(DataError, match="'other' is a float, not a string"):
        _read(path, text_key="other")


def test_a_value_of_many_rows_is_in_memory_once(tmp_path):
    """A small file with a gigabyte of text."""
    value = pyarrow.array(["é" * (1 << 19)])
    rows = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 1023 + [None], "int32"), value)
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": rows}), path, compression="zstd")
    before, count = pyarrow.total_allocated_bytes(), 0
    with pytest.raises(DataError, match="row 1023"):
        for document in documents.read(path, Format()):
            assert document.text == "é" * (1 << 19)
            assert pyarrow.total_allocated_bytes() - before < 64 << 20
            count += 1
    assert count == 1023


def test_a_large_file_without_row_groups_is_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "BLOCK_BYTES", 1)
    path = tmp_path / "a.parquet"
    with parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())])):
        pass
    whole = pieces.Piece(str(path), size=path.stat().st_size)
    (piece,) = documents.divided(whole, FileDigests(tmp_path / "digests.json"))
    assert piece == whole and list(documents.read(piece, Format())) == []


def test_damaged_parquet(tmp_path):
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"x.parquet: not a readable Parquet file"):
        _read(path)


def test_parquet_that_is_not_utf8(tmp_path):
    path = tmp_path / "x.parquet"
    column = pyarrow.array([b"fine", b"b\xffad"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(DataError, match=r"x.parquet, rows 0 to 1: not UTF-8 at byte offset 1"):
        _read(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_malformed_line_names_file_line_and_column(tmp_path, suffix):
    path = _compress(tmp_path / f"x.jsonl{suffix}", _jsonl(LINES) + b'{"text": "a" "b"}\n')
    with pytest.raises(
        DataError, match=rf"x\.jsonl{suffix}, line 4: malformed JSON.*column 14.*text"
    ):
        _read(path)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (b"7" * 5000, "a number has too many digits"),
        (b"[" * 100_000 + b"]" * 100_000, "lists or objects are nested too deeply"),
    ],
)
def test_json_that_python_does_not_take(tmp_path, value, problem):
    path = _compress(tmp_path / "x.jsonl", b'{"text": "a"}\n{"text": "b", "n": ' + value + b"}\n")
    with pytest.raises(DataError, match=rf"x\.jsonl, line 2: malformed JSON: {problem}"):
        _read(path)


def test_line_that_is_no_object(tmp_path):
    path = _compress(tmp_path / "x.jsonl", b'{"text": "a"}\n["text"]\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 2: a JSON list where an object"):
        _read(path)


def test_missing_text_key_names_the_keys_that_are_there(tmp_path):
    path = _compress(tmp_path / "x.jsonl", b'{"text": "a"}\n{"content": "a", "id": 1}\n')
    match = r"x\.jsonl, line 2: no key 'text'; present are 'content', 'id'. Correct text_key \(TEXT_KEY\)$"
    with pytest.raises(DataError, match=match):
        _read(path)
    path = _compress(tmp_path / "chats.jsonl", b'{"messages": []}\n')
    with pytest.raises(DataError, match=r"learnt by runs/finetune.gin over data/chat.gin$"):
        _read(path)
    path = _compress(tmp_path / "x.jsonl", b'{"text": "a"}\n')
    with pytest.raises(
        DataError, match=r"line 1: no key 'url'; present are 'text'. Correct id_key"
    ):
        _read(path, id_key="url")


def test_text_that_is_no_string(tmp_path):
    path = _compress(tmp_path / "x.jsonl", b'{"text": ["a"]}\n')
    with pytest.raises(DataError, match=r"line 1: 'text' is a list, not a string"):
        _read(path)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.txt.zst"])
def test_bytes_that_are_not_utf8_name_their_offset(tmp_path, name):
    content = b"\xef\xbb\xbf" + _jsonl(LINES) + b'{"text": "caf\xe9"}\n'
    path = _compress(tmp_path / name, content)
    offset = content.index(b'\xe9"}')
    with pytest.raises(DataError, match=rf"{name}: not UTF-8 at byte offset {offset} \(line 4\)"):
        _read(path)


def test_half_of_a_surrogate_pair(tmp_path):
    path = _compress(tmp_path / "x.jsonl", b'{"text": "ab\\ud83d"}\n')
    with pytest.raises(DataError, match=r"line 1: 'text' is not valid Unicode at character 2"):
        _read(path)
    path = _compress(tmp_path / "y.jsonl", b'{"text": "ab", "id": "c\\ud83d"}\n')
    assert _read(path)
    with pytest.raises(DataError, match=r"y.jsonl, line 1: 'id' is not valid Unicode at character"):
        _read(path, id_key="id")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "not compressed"])
def test_unreadable_compressed_file(tmp_path, suffix, damage):
    path = tmp_path / f"x.jsonl{suffix}"
    content = _jsonl({"text": f"line {i * 7919 % 1000}"} for i in range(5000))
    _compress(path, content)
    path.write_bytes(path.read_bytes()[:-20] if damage == "truncated" else content)
    with pytest.raises(DataError, match=rf"x\.jsonl{suffix}: cannot be read after \d+ bytes"):
        _read(path)


@pytest.mark.parametrize("name", ["x.csv", "x", "x.gz", "x.jsonl.bz2"])
def test_unknown_kind_of_file(tmp_path, name):
    path = _compress(tmp_path / name, b"")
    with pytest.raises(
        DataError, match=rf"{name}: unknown kind of data file; supported are .jsonl"
    ):
        documents.check_suffix(path)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_lines_and_documents_have_a_largest_length(tmp_path, suffix):
    """A small file may hold a line of any length; the lines before it are read."""
    line, long = b'{"text": "a"}\n', b'{"text": "' + b"a" * 40 + b'"}'
    path = _compress(tmp_path / f"x.jsonl{suffix}", line + long + b"\n")
    assert len(_read(path, max_document_bytes=len(long) + 1)) == 2
    read = documents.read(path, Format(max_document_bytes=len(long)))
    assert next(read).text == "a"
    with pytest.raises(
        DataError, match=rf"x\.jsonl{suffix}, line 2: longer than 52 bytes.*or raise"
    ):
        next(read)
    with pytest.raises(DataError, match=r"line 2: longer than 20 bytes.*delete the line$"):
        list(row_files.json_rows(row_files.piece_of(path), max_bytes=20))
    path = _compress(tmp_path / f"y.txt{suffix}", b"one\ntwo\n\n\n\nthree\n")
    assert [d.text for d in _read(path, document_per="paragraph", max_document_bytes=8)] == [
        "one\ntwo\n",
        "three\n",
    ]
    with pytest.raises(
        DataError, match=rf"y\.txt{suffix}, line 2: the document is longer than 7 bytes"
    ):
        _read(path, document_per="paragraph", max_document_bytes=7)
    with pytest.raises(DataError, match="line 4: the document is longer than 9 bytes"):
        _read(path, max_document_bytes=9)
    with pytest.raises(ValueError, match="max_document_bytes is 0; it must be positive"):
        Format(max_document_bytes=0)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_long_line_does_not_take_memory(tmp_path, suffix):
    """200 MB of text in 200 KB (gz) or less."""
    path, block = tmp_path / f"x.jsonl{suffix}", b"a" * 2_000_000
    with gzip.open(path, "wb", 1) if suffix == ".gz" else zstandard.open(path, "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(100):
            file.write(block)
    read = documents.read(path, Format(max_document_bytes=1_000_000))
    assert next(read).text == "a"
    tracemalloc.start()
    with pytest.raises(DataError, match="line 2: longer than 1,000,000 bytes"):
        next(read)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000
