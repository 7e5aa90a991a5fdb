"""Files of programs: whole or not used, and bounded."""

import concurrent.futures
import hashlib
import logging
import os

import jax
import pytest

from espalier.trainers.programs import store

KEY = {"function": "f", "versions": {"jax": "1"}}
DESCRIPTION = {"out_tree": "*"}
EXECUTABLE = bytes(range(256)) * 8


def path_of(folder, key):
    return folder / f"{store.digest(key)}{store.SUFFIX}"


@pytest.fixture
def path(tmp_path):
    path = path_of(tmp_path, KEY)
    store.write(path, KEY, DESCRIPTION, EXECUTABLE)
    return path


def both(description, executable):
    return description, executable


def test_what_is_read_is_what_was_written(path):
    assert store.read(path, both) == (DESCRIPTION, EXECUTABLE)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_program_that_is_not_there_is_no_reason_for_a_warning(tmp_path, caplog):
    assert store.read(path_of(tmp_path, KEY), both) is None
    assert not caplog.records


DAMAGES = {
    "truncated": (lambda data: data[:-1], "its checksum is wrong"),
    "cut within its header": (lambda data: data[:40], "does not begin as a stored program"),
    "empty": (lambda data: b"", "does not begin as a stored program"),
    "longer": (lambda data: data + b"x", "its checksum is wrong"),
    "another format": (lambda data: data.replace(b"program 1", b"program 2"), "does not begin"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_program_is_removed_with_one_warning(damage, path, caplog):
    change, message = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    assert store.read(path, both) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and path.name in record.getMessage()
    assert message in record.getMessage()
    assert not path.exists()


def test_every_flipped_byte_is_seen(path):
    data = path.read_bytes()
    for place in range(0, len(data), 7):
        flipped = bytearray(data)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert store.read(path, both) is None, place


def test_a_file_under_the_name_of_another_key_is_not_used(path, caplog):
    other = path_of(path.parent, {**KEY, "versions": {"jax": "2"}})
    os.replace(path, other)
    assert store.read(other, both) is None
    assert "it is the program of another key" in caplog.text


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o644])
def test_machine_code_of_other_users_is_not_loaded(mode, path, monkeypatch, caplog):
    path.chmod(mode)
    if mode == 0o644:  # nobody else may write it, but somebody else owns it
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert store.read(path, both) is None
    assert "another user owns it or may write it" in caplog.text and len(caplog.records) == 1
    assert path.exists()


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_only_a_regular_file_is_read(kind, path, tmp_path, caplog):
    whole = tmp_path / "whole"
    os.replace(path, whole)
    if kind == "pipe":
        os.mkfifo(path, 0o600)
    elif kind == "link":
        path.symlink_to(whole)
    else:
        path.mkdir(0o700)
    assert store.read(path, both) is None
    assert "is not used" in caplog.text and len(caplog.records) == 1
    assert whole.exists()


def test_a_deeply_nested_header_is_damaged(path, caplog):
    depth = 100_000
    header = b'{"key":%s,"program":%s%s}' % (store._json(KEY), b"[" * depth, b"]" * depth)
    rest = len(header).to_bytes(8, "little") + header
    path.write_bytes(store.MAGIC + hashlib.sha256(rest).digest() + rest)
    assert store.read(path, both) is None
    assert "its header is no description" in caplog.text and not path.exists()


def test_a_program_that_the_runtime_refuses_is_not_used(path, caplog):
    def refuse(description, executable):
        raise store.Unstorable("the runtime refuses it")

    assert store.read(path, refuse) is None
    assert "the runtime refuses it" in caplog.text and not path.exists()


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store.write(tmp_path / "file" / "x.program", KEY, DESCRIPTION, EXECUTABLE)
    assert "is not stored" in caplog.text and len(caplog.records) == 1


def test_the_least_recently_used_programs_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_BOUND", 3 * (len(EXECUTABLE) + 500))
    keys = [{"function": str(i)} for i in range(4)]
    paths = [path_of(tmp_path, key) for key in keys]
    for i in range(3):
        store.write(paths[i], keys[i], DESCRIPTION, EXECUTABLE)
        os.utime(paths[i], (i, i))
    assert store.read(paths[0], both)  # now it is the newest
    store.write(paths[3], keys[3], DESCRIPTION, EXECUTABLE)
    assert [path.exists() for path in paths] == [True, False, True, True]


def test_the_bound_of_the_compilation_cache_holds_here_too(tmp_path, monkeypatch):
    monkeypatch.setattr(
        type(jax.config), "jax_compilation_cache_max_size", len(EXECUTABLE), raising=False
    )
    for name in (
        "thesis.tar",
        "notes.txt",
    ):  # files of others in a folder with the name of programs
        (tmp_path / name).write_bytes(bytes(10_000))
    (tmp_path / "link.program").symlink_to("thesis.tar")
    for i in range(3):
        key = {"function": str(i)}
        store.write(path_of(tmp_path, key), key, DESCRIPTION, EXECUTABLE)
    left = {path_of(tmp_path, key).name, "thesis.tar", "notes.txt"}
    assert {file.name for file in tmp_path.iterdir()} == left


def test_many_writers_and_readers_see_whole_programs_only(tmp_path):
    path = path_of(tmp_path, KEY)

    def work(i):
        store.write(path, KEY, DESCRIPTION, EXECUTABLE * (1 + i % 3))
        return store.read(path, both)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(200)))
    sizes = {len(executable) for _, executable in filter(None, results)}
    assert None not in results and sizes <= {len(EXECUTABLE) * n for n in (1, 2, 3)}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("variable", "root", "used"),
    [(None, "/c", False), ("0", "/c", False), ("1", "/c", True), ("1", "gs://b/c", False)],
)
def test_the_switch_and_the_folder(variable, root, used, stored_programs, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", root)
    monkeypatch.delenv(store.SWITCH)
    if variable is not None:
        monkeypatch.setenv(store.SWITCH, variable)
    assert (store.folder() is not None) == used


def test_tests_do_not_store_programs():
    assert store.folder() is None
