"""Caches that are read in place: columns equal those of the local cache, and checksums are added to older caches."""

import pathlib

import numpy as np
import pytest

from espalier.common.storage import mirror, paths
from espalier.data.cache import block_folder, blocks, build, in_place, ranged
from espalier.data.cache.cache_files import CacheCorruptError
from espalier.data.cache.store import MANIFEST, write
from espalier.data.pieces import Piece
from tests.data.cache import piece_reader

FEATURES = {"targets": 1000, "inputs": 70_000, "weights": "float32", "document_id": "text"}
COUNT = 40_000  # records: more than one block of lengths in a shard


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, COUNT)
    records = (
        {
            "targets": rng.integers(0, 1000, length),
            "inputs": rng.integers(0, 70_000, i % 3),
            "weights": rng.random(length, np.float32),
            "document_id": f"doc-{i}",
        }
        for i, length in enumerate(lengths)
    )
    directory = tmp_path_factory.mktemp("caches") / "c"
    return write(directory, records, features=FEATURES, num_shards=2)


def in_store(local, running, *, without=()):
    address = f"{running.address}/c"
    mirror.publish(local.directory, address, last=(MANIFEST,))
    paths.delete(*(paths.join(address, name) for name in without))
    return address


def side_files(directory):
    return sorted(path.name for path in pathlib.Path(directory).iterdir() if "blocks" in path.name)


def assert_equal(opened, local):
    assert (opened.content, opened.fingerprint) == (local.content, local.fingerprint)
    assert opened.num_records == COUNT and opened.tokens() == local.tokens()
    rng = np.random.default_rng(1)
    for feature, column in local.columns.items():
        there = opened.columns[feature]
        some = rng.integers(0, COUNT, (30, 2))
        for name in ("lengths", "starts", "bounds"):
            want, got = getattr(column, name), getattr(there, name)
            np.testing.assert_array_equal(got[[0, 1]], want[[0, 1]])
            np.testing.assert_array_equal(np.asarray(got), want)
        np.testing.assert_array_equal(there.lengths[some], column.lengths[some])
        np.testing.assert_array_equal(there.starts[some], column.starts[some])
        assert there.starts[COUNT - 1] == column.starts[COUNT - 1]
        for record in (0, 16_384, 19_999, 20_000, COUNT - 1):
            np.testing.assert_array_equal(there.values(record), column.values(record))
        for got, want in zip(there.shards, column.shards, strict=True):
            np.testing.assert_array_equal(np.asarray(got), want)
    assert opened.name_of(20_001) == local.name_of(20_001)


def test_columns_equal_those_of_the_local_cache(local, store):
    address = in_store(local, store)
    store.requests.clear()
    opened = in_place.open_cache(address)
    assert not [path for _, path in store.requests if path.endswith((".len", ".bin", ".blocks"))]
    assert_equal(opened, local)


def test_a_local_cache_can_be_read_by_ranges(local):
    assert_equal(in_place.open_cache(local.directory), local)


def test_a_large_local_cache_has_its_tokens_mapped_and_its_index_in_files(local, monkeypatch):
    assert type(in_place.open_here(local.directory).columns["targets"].lengths) is np.ndarray
    monkeypatch.setattr(in_place, "_INDEX_IN_MEMORY", COUNT - 1)
    opened = in_place.open_here(local.directory)
    assert_equal(opened, local)
    assert opened.directory == local.directory and not opened.in_place
    for feature in ("targets", "document_id"):
        column = opened.columns[feature]
        assert type(column.lengths) is ranged.RangedArray
        assert (type(column.shards[0]) is np.ndarray) == (feature == "targets")
    path = local.directory / "00001.targets.bin"
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-2])
        with pytest.raises(CacheCorruptError, match=r"00001.targets.bin has .* bytes instead"):
            in_place.open_here(local.directory, verify=False)
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CacheCorruptError, match=r"00001.targets.bin does not match its check"):
            in_place.open_here(local.directory)
    finally:
        path.write_bytes(content)


def test_checksums_are_added_to_a_cache_that_has_none(local, store):
    names = side_files(local.directory)
    assert names == ["00000.blocks", "00001.blocks", "blocks.json"]
    address = in_store(local, store, without=names)
    with pytest.raises(in_place.MissingChecksumsError, match="prepare cache --checksums"):
        in_place.open_cache(address)
    done = []
    assert in_place.add_checksums(address, done.append)
    assert sum(done) == sum(path.stat().st_size for path in local.directory.glob("*.[bl][ie]n"))
    for name in (*names, "manifest.json"):
        assert paths.read(f"{address}/{name}") == (local.directory / name).read_bytes()
    assert not in_place.add_checksums(address)
    assert_equal(in_place.open_cache(address), local)


def test_checksums_of_damaged_files_are_not_made(local, tmp_path):
    directory = tmp_path / "c"
    directory.mkdir()
    for path in local.directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    for name in side_files(directory):
        (directory / name).unlink()
    raw = bytearray((directory / "00001.targets.bin").read_bytes())
    raw[100] ^= 1
    (directory / "00001.targets.bin").write_bytes(raw)
    with pytest.raises(CacheCorruptError, match=r"00001.targets.bin does not match its checksum"):
        in_place.add_checksums(directory)
    assert "blocks.json" not in side_files(directory)
    raw[100] ^= 1
    (directory / "00001.targets.bin").write_bytes(raw)
    assert in_place.add_checksums(directory)  # goes on
    assert_equal(in_place.open_cache(directory), local)


def test_a_build_writes_the_checksums_of_its_bytes(local):
    for table, sizes in blocks.groups_of(local.manifest["shards"]).items():
        made, _ = blocks.table_of(local.directory, sizes)
        assert (local.directory / table).read_bytes() == made
    block_folder.BlockFolder(local.directory, of=local.content)


@pytest.mark.parametrize("at", ["a shard's table", "the index"])
def test_bytes_that_are_damaged_after_they_were_written_get_no_checksum(tmp_path, monkeypatch, at):
    shards, directory = ((Piece("", 0, 1),),), tmp_path / "c"
    made = build.Build(str(directory), piece_reader.Same(), "", {"targets": 100}, {}, shards)
    name = tmp_path / "c.building" / "00000.targets.bin"
    write_table = blocks.write_table

    def damaged(*args):
        raw = bytearray(name.read_bytes())
        raw[9] ^= 1
        name.write_bytes(raw)
        return write_table(*args)

    made.start()
    if at == "the index":
        made.write_shard(0)
        (name.parent / "00000.blocks").unlink()
    monkeypatch.setattr(blocks, "write_table", damaged)
    with pytest.raises(CacheCorruptError, match="00000.targets.bin does not match"):
        made.write_shard(0)
        made.finish()
    assert not directory.exists()
    monkeypatch.undo()
    made.write_shard(0)
    made.finish()
    opened = in_place.open_cache(directory)
    np.testing.assert_array_equal(np.asarray(opened.columns["targets"].all_values), range(50))
