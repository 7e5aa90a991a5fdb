"""Files are replaced whole, synced where they must be, and locked."""

import errno
import os
import subprocess
import sys

import pytest

from espalier.common import files


@pytest.fixture
def synced(monkeypatch):
    """The files that were synced, by the number of the file on the disk."""
    numbers, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda f: (numbers.append(os.fstat(f).st_ino), sync(f))[1])
    return numbers


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_file_is_replaced_and_synced_if_asked(tmp_path, synced, wanted, shared):
    path = tmp_path / "x"
    path.write_text("old")
    files.write(path, "née", synced=wanted, shared=shared)
    assert path.read_bytes() == "née".encode()
    assert synced == ([path.stat().st_ino] if wanted else [])
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("keep", [False, True])
def test_an_error_leaves_the_old_file(tmp_path, keep):
    path = tmp_path / "x"
    path.write_text("old")
    with (
        pytest.raises(ZeroDivisionError),
        files.replacing(path, synced=True, keep=keep) as file,
    ):
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert (tmp_path / "x.partial").exists() == keep


def test_what_a_kill_left_is_replaced_and_a_planted_link_is_not_followed(tmp_path):
    victim, planted = tmp_path / "victim", tmp_path / "x.partial"
    victim.write_text("precious")
    planted.symlink_to("victim")
    files.write(tmp_path / "x", b"new", synced=False)
    assert victim.read_text() == "precious" and (tmp_path / "x").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["victim", "x"]


def test_of_two_writers_of_one_name_the_first_is_told_and_the_second_is_not_disturbed(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(files.OverwrittenError), files.replacing(path, synced=False) as one:
        one.write(b"one")
        second = files.replacing(path, synced=False)
        second.__enter__().write(b"two")
    second.__exit__(None, None, None)
    assert path.read_bytes() == b"two"


def test_two_writers_that_share_a_file_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with files.replacing(path, synced=False, shared=True) as one:
        one.write(b"one")
        files.write(path, b"two", synced=False, shared=True)
        assert path.read_bytes() == b"two"
    assert path.read_bytes() == b"one" and os.listdir(tmp_path) == ["x"]


def test_text_is_added(tmp_path, synced):
    path = tmp_path / "x"
    files.append(path, "a\n", synced=False)
    assert not synced
    files.append(path, b"b\n", synced=True)
    assert path.read_bytes() == b"a\nb\n" and len(synced) == 1


def test_json_is_readable_whatever_its_letters(tmp_path):
    value = {"a": ["é", "\ud800", float("nan")]}
    assert files.json_bytes(value, indent=None) == '{"a": ["é", "\\ud800", NaN]}'.encode()
    files.write_json(tmp_path / "x", {"b": 1, "a": 2}, synced=False, end="\n", sort_keys=True)
    assert (tmp_path / "x").read_text() == '{\n "a": 2,\n "b": 1\n}\n'
    with pytest.raises(ValueError, match="Out of range"):
        files.json_bytes(value, allow_nan=False)


def test_a_locked_folder_names_its_holder(tmp_path):
    code = (
        "import os, sys; from espalier.common import files; held = files.lock_folder(sys.argv[1]);"
        "print(os.getpid(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        pid = holder.stdout.readline().strip()
        with pytest.raises(BlockingIOError, match=f"process {pid} on "):
            files.lock_folder(tmp_path)
        holder.stdin.close()
    files.lock_folder(tmp_path).close()


def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    files.lock_folder(tmp_path).close()
    assert "No locks available" in caplog.text
