"""Which cache of a task is opened, and how: copied or read in place, and without a look at its source."""

import functools
import json
import os
import pathlib

import numpy as np
import pytest

from espalier.common.storage import paths
from espalier.data import tasks
from espalier.data.cache import cache_dir, existing, in_place, task_cache
from espalier.data.cache.cache_files import CacheCorruptError
from espalier.data.stream import stream
from espalier.data.text import user_data
from espalier.data.tokenizers import vocabularies
from espalier.launch.prepare import cache as command

ROW = {"task_feature_lengths": {"targets": 32}, "batch_size": 4, "mixture_or_task_name": "mine"}


@pytest.fixture
def files(tmp_path):
    lines = [json.dumps({"text": f"text {number} " * (number % 7 + 1)}) for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    yield str(tmp_path / "a.jsonl")
    tasks.clear()


@pytest.fixture
def register(files):
    return functools.partial(
        user_data.register_files,
        name="mine",
        files=files,
        vocabulary=vocabularies.byte(),
        validation_fraction=0.0,
    )


@pytest.fixture
def host(store, tmp_path, monkeypatch):
    """Makes this process a host with folders of its own, whose caches are in the store."""

    def become(name):
        monkeypatch.setenv("ESPALIER_COPIES", str(tmp_path / name))
        monkeypatch.setenv(cache_dir.VARIABLE, f"{store.address}/cache")

    return become


def batches(**settings):
    opened = stream.make_stream(**ROW, **settings)
    return opened, [opened[step] for step in (0, 1, 50)]


def assert_equal(one, other):
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], name)


def test_a_cache_in_a_store_is_read_as_asked_and_by_size(
    register, host, tmp_path, capfd, monkeypatch
):
    register()
    host("builder")
    built, want = batches()
    address = paths.join(
        cache_dir.address_of(task_cache.caches_path("mine", "train")), built.summary()["sources"]["mine"]["cache"].rpartition("/")[2]
    )  # fmt: skip
    host("reader")
    opened, got = batches(read_cache="in_place")
    assert opened.summary()["sources"]["mine"]["cache"] == address
    said = capfd.readouterr().err
    assert f"reading the token cache {address} (0.0 GB; " in said
    assert "are free here) in place: READ_CACHE = 'in_place'" in said
    assert not list(pathlib.Path(tmp_path / "reader").rglob("*.bin"))
    assert opened.fingerprint == built.fingerprint
    assert_equal(got, want)
    monkeypatch.setattr(in_place, "COPIED_BYTES", 100)
    opened, got = batches()
    assert opened.summary()["sources"]["mine"]["cache"] == address
    assert "in place: READ_CACHE = 'auto'" in capfd.readouterr().err
    for how in ({"read_cache": "copy"}, {}):  # a copy that is there is read
        copied, got = batches(**how)
        assert copied.summary()["sources"]["mine"]["cache"].startswith(str(tmp_path / "reader"))
        assert (f"copying the token cache {address}" in capfd.readouterr().err) == bool(how)
        assert_equal(got, want)
    with pytest.raises(ValueError, match="read_cache"):
        batches(read_cache="streamed")


def test_an_older_cache_is_upgraded_by_the_command(register, host, tmp_path, capfd, monkeypatch):
    register()
    host("builder")
    _, want = batches()
    address = cache_dir.address_of(task_cache.caches_path("mine", "train"))
    (name,) = paths.names(address)
    for place in (f"{address}/{name}", task_cache.caches_path("mine", "train") / name):
        paths.delete(*(paths.join(place, side) for side in ("00000.blocks", "blocks.json")))
    host("reader")
    with pytest.raises(in_place.MissingChecksumsError, match="prepare cache --checksums"):
        batches(read_cache="in_place")
    monkeypatch.setattr(in_place, "COPIED_BYTES", 100)
    batches()
    assert "it has no checksums to be read in place" in capfd.readouterr().err
    host("builder")
    for said in ("added checksums of blocks", "has checksums of blocks"):
        command.build_caches(mixture_or_task_name="mine", splits=["train"], checksums=True)
        lines = capfd.readouterr().out.splitlines()
        assert len(lines) == 2 and all(said in line for line in lines)  # here and in the store
    _, got = batches(read_cache="in_place")
    assert_equal(got, want)


def test_use_cached_opens_the_one_cache_without_the_source(register, files, tmp_path):
    root = tmp_path / "caches"
    register()
    with pytest.raises(FileNotFoundError, match="USE_CACHED = True, and there is no token cache"):
        batches(cache_dir=root, use_cached=True)
    built, want = batches(cache_dir=root)
    with open(files, "a") as file:
        file.write('\n{"text": "more"}')
    register()
    os.unlink(files)
    opened, got = batches(cache_dir=root, use_cached=True)
    assert_equal(got, want)
    assert opened.fingerprint == built.fingerprint
    facts = tasks.summary()["tasks"]["mine"]
    assert facts["use_cached"] is True and "digest" not in facts


def test_use_cached_lists_several_caches_with_what_differs(register, files, tmp_path):
    root = tmp_path / "caches"
    register()
    batches(cache_dir=root)
    register(add_eos=False)
    batches(cache_dir=root, changed_cache="build")
    parent = task_cache.caches_path("mine", "train", root)
    with pytest.raises(ValueError, match="there are 2 token caches") as error:
        batches(cache_dir=root, use_cached=True)
    for folder in parent.iterdir():
        assert folder.suffix or str(folder) in str(error.value)
    assert "300 records; other vocabulary" in str(error.value)


def test_use_cached_refuses_a_cache_of_other_features(register, tmp_path):
    root = tmp_path / "caches"
    register()
    batches(cache_dir=root)
    tasks.clear()
    register(vocabulary=vocabularies.characters(symbols="etx 0123456789"))
    with pytest.raises(ValueError, match="has the features .*but the task"):
        batches(cache_dir=root, use_cached=True)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        ({"symbols": "txe 0123456789"}, "vocabulary"),
        ({"add_eos": False}, "vocabulary"),
        ({"add_bos": True}, "steps"),
    ],
)
def test_use_cached_refuses_a_cache_of_other_ids(other, key, register, tmp_path):
    def again(symbols="etx 0123456789", **settings):
        tasks.clear()
        vocabulary = vocabularies.characters(symbols=symbols)
        vocabulary.bos_id = vocabulary.unk_id
        register(vocabulary=vocabulary, **settings)

    again()
    batches(cache_dir=tmp_path / "caches")
    again(**other)
    with pytest.raises(ValueError, match=f"has other {key} than the task"):
        batches(cache_dir=tmp_path / "caches", use_cached=True)


def test_use_cached_reads_from_the_store(register, host, store, capfd):
    register()
    host("builder")
    _, want = batches()
    for how in ("in_place", "copy"):
        host(how)
        store.requests.clear()
        _, got = batches(use_cached=True, read_cache=how)
        assert_equal(got, want)
        assert not [path for _, path in store.requests if "jsonl" in path]


def test_a_damaged_manifest_is_named(register, tmp_path):
    root = tmp_path / "caches"
    register()
    batches(cache_dir=root)
    (manifest,) = root.rglob("manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-9])
    with pytest.raises(CacheCorruptError, match="manifest.json is altered"):
        batches(cache_dir=root, use_cached=True)
    assert existing.everywhere(manifest.parent.parent) == {str(manifest.parent): {}}
