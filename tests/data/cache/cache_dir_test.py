"""Derived files: whole or not at all, synced, and readable by whom the umask lets read them; and caches in object stores."""

import os
import stat
import threading
import time

import pytest

from espalier.common import files
from espalier.common.storage import lock, mirror, paths
from espalier.data import data_source, tasks
from espalier.data.cache import cache_dir, task_cache
from espalier.data.cache import store as token_cache
from espalier.data.cache.cache_files import CacheCorruptError
from espalier.data.text import document_files
from espalier.data.tokenizers.vocabulary import ByteVocabulary


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


@pytest.fixture
def host(store, tmp_path, monkeypatch):
    """Makes this process a host with folders of its own, whose caches are in the store."""

    def become(name):
        monkeypatch.setenv(mirror.COPIES, str(tmp_path / name))
        monkeypatch.setenv(cache_dir.VARIABLE, f"{store.address}/cache")

    become("a")
    return become


def test_one_host_builds_a_folder_and_the_others_copy_it(store, host):
    builds = []

    def build(target):
        builds.append(target)
        (target / "x.model").write_bytes(b"abc")
        (target / "x.json").write_bytes(b"{}")

    for name in ("a", "b"):
        host(name)
        directory = cache_dir.cache_dir("vocabularies", "key")
        assert not directory.exists()
        cache_dir.build_directory(directory, build, expected=["x.json", "x.model"])
        assert (directory / "x.model").read_bytes() == b"abc"
    assert len(builds) == 1
    assert sorted(paths.entries(f"{store.address}/cache")) == [
        "vocabularies/key/x.json",
        "vocabularies/key/x.model",
    ]


def test_a_folder_without_its_marker_is_not_complete(store, host):
    directory = cache_dir.cache_dir("corpora", "key")
    paths.write(f"{store.address}/cache/corpora/key/part", b"half")
    assert not cache_dir.fetch(directory, "manifest.json") and not directory.exists()


def test_a_host_waits_for_the_one_that_builds(store, host, capfd):
    directory = cache_dir.cache_dir("corpora", "key")
    held = lock.StoreLock(f"{cache_dir.address_of(directory)}.building", beat_seconds=0.2)
    threading.Timer(2.5, held.close).start()
    started = time.monotonic()
    with cache_dir.building(directory):
        assert time.monotonic() - started > 2.4
    assert "waiting for process" in capfd.readouterr().err


def test_a_token_cache_in_the_store_is_copied_and_a_damaged_one_is_named(store, host):
    parent = task_cache.caches_path("task", "train")
    directory = parent / "key"
    with task_cache._shared_build(directory) as complete:
        assert not complete
        made = token_cache.write(directory, [{"targets": [1, 2, 3]}], features={"targets": 9})
        cache_dir.publish(directory, token_cache.MANIFEST)
    host("b")
    copied = task_cache.caches_path("task", "train") / "key"
    with task_cache._shared_build(copied) as complete:
        assert complete
    assert token_cache.open_cache(copied).content == made.content
    address = cache_dir.address_of(copied)
    assert [
        place
        for place, _ in cache_dir.others_in_store(task_cache.caches_path("task", "train"), "x")
    ] == []
    name = next(name for name in paths.entries(address) if name.endswith(".bin"))
    paths.write(f"{address}/{name}", b"\0" * len(paths.read(f"{address}/{name}")))
    host("c")
    third = task_cache.caches_path("task", "train") / "key"
    damaged = pytest.raises(CacheCorruptError, match=f"{address} is damaged.*{name}")
    with damaged, task_cache._shared_build(third):
        pass
    assert not third.exists()
    assert [
        place for place, _ in cache_dir.others_in_store(third.parent, token_cache.MANIFEST)
    ] == [address]
    cache_dir.remove_in_store(third, token_cache.MANIFEST)
    assert paths.names(address) == []


def test_replacing_keeps_an_intact_cache_that_only_the_store_has(store, host, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')

    def opened(name, **settings):
        host(name)
        tasks.clear()
        settings = {"changed": "replace", **settings}
        found = document_files.find(name="t", files=str(path), validation_fraction=0.0)
        vocabulary = {"vocabulary": ByteVocabulary(), "add_bos": False, "add_eos": False}
        tasks.register_source("t", found, origin="x", **vocabulary)
        try:
            return task_cache.open_task_cache(tasks.find("t"), "train", **settings)
        finally:
            tasks.clear()

    def deleted():
        return [at for method, at in store.requests if method == "DELETE" and "/tokens/" in at]

    address = cache_dir.address_of(opened("a").directory)
    store.requests.clear()
    in_place_of_b = opened("b", read="in_place")
    assert str(in_place_of_b.directory) == address
    copied = opened("c")
    assert cache_dir.address_of(copied.directory) == address
    values = copied.directory / "00000.targets.bin"
    right = values.read_bytes()
    values.write_bytes(bytes(len(right)))
    assert opened("c").directory == copied.directory and values.read_bytes() == right
    assert not [at for at in deleted() if not at.endswith(".building")]
    for number, name in enumerate((token_cache.MANIFEST, "blocks.json", "00000.targets.bin")):
        whole = paths.read(f"{address}/{name}")
        paths.write(f"{address}/{name}", bytes(len(whole)))
        store.requests.clear()
        read = "copy" if name.endswith(".bin") else "in_place"
        assert opened(f"d{number}", read=read).num_records == 2
        assert any(name in at for at in deleted())
        assert paths.read(f"{address}/{name}") == whole


def test_files_of_a_corpus_are_found_by_pattern(store, host):
    for name in ("a.jsonl", "sub/b.jsonl", "c.csv"):
        paths.write(f"{store.address}/corpus/{name}", b'{"text": "x"}\n')
    pattern = f"{store.address}/corpus/**/*.jsonl"
    files = data_source._expand("mine", "files", pattern, None)
    assert list(files) == [f"{store.address}/corpus/{name}" for name in ("a.jsonl", "sub/b.jsonl")]
    assert files == {address: paths.entry(address) for address in files}
    one = data_source._expand("mine", "files", "corpus/*.jsonl", store.address)
    assert list(one) == list(files)[:1]
    with pytest.raises(FileNotFoundError, match="matches no file"):
        data_source._expand("mine", "files", f"{store.address}/other/*.jsonl", None)
