"""Derived files: whole or not at all, synced, and readable by whom the umask lets read them."""

import os
import stat

import pytest

from espalier.common import files
from espalier.data.cache import cache_dir


@pytest.fixture
def umask():
    """Sets the umask of the process until the test ends."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def _mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("mask", "file", "directory"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
def test_others_may_read_what_the_umask_allows(tmp_path, umask, mask, file, directory):
    umask(mask)

    def build(target):
        files.write_json(target / "made.json", {"a": 1}, synced=False)

    cache_dir.build_directory(tmp_path / "made", build, expected=["made.json"])
    assert _mode(tmp_path / "made") == directory
    assert _mode(tmp_path / "made" / "made.json") == file


def test_a_directory_stays_if_whole_and_is_replaced_if_not(tmp_path):
    target = tmp_path / "made"

    def build(content):
        def write(directory):
            (directory / "model").write_text(content)

        cache_dir.build_directory(target, write, expected=["model"])

    build("first")
    build("second")
    assert (target / "model").read_text() == "first"
    (target / "model").rename(target / "other")
    build("third")
    assert [path.name for path in target.iterdir()] == ["model"]
    assert (target / "model").read_text() == "third"
    assert list(tmp_path.iterdir()) == [target]


def test_everything_is_synced_before_it_appears(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))

    def build(directory):
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text("text")

    target = tmp_path / "made"
    cache_dir.build_directory(target, build, expected=["sub/file"])
    inodes = {path.stat().st_ino for path in (target, target / "sub", target / "sub" / "file")}
    assert inodes | {tmp_path.stat().st_ino} == set(synced)


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(directory):
        (directory / "half").write_text("")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        cache_dir.build_directory(tmp_path / "made", build, expected=["whole"])
    assert not list(tmp_path.iterdir())


def test_what_only_saves_time_may_be_lost(tmp_path):
    (tmp_path / "file").write_text("")
    cache_dir.remember(tmp_path / "file" / "memory.json", {})  # no directory can be there
    cache_dir.remember(tmp_path / "new" / "memory.json", {"a": 1})
    assert (tmp_path / "new" / "memory.json").is_file()
