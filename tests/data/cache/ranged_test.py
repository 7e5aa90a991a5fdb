"""Arrays that are read by ranges: values, verification, the bounded cache, and stores that fail."""

import concurrent.futures
import itertools
import threading

import numpy as np
import pytest

from espalier.common.storage import mirror, paths
from espalier.data.cache import block_folder, blocks, ranged
from espalier.data.cache.cache_files import CacheCorruptError

SIZES = [70_000, 0, 3, 100_000, 32_768]  # of files of two bytes a value: blocks and parts of blocks
NAMES = [f"{i}.bin" for i in range(len(SIZES))]


@pytest.fixture
def values(tmp_path):
    """The values of all files, which are in `tmp_path`/files."""
    (tmp_path / "files").mkdir()
    parts = [np.random.default_rng(i).integers(0, 2**16, n, np.uint16) for i, n in enumerate(SIZES)]
    for name, part in zip(NAMES, parts, strict=True):
        (tmp_path / "files" / name).write_bytes(part.tobytes())
    sizes = {name: 2 * size for name, size in zip(NAMES, SIZES, strict=True)}
    first = dict(list(sizes.items())[:3])
    groups = {"a.blocks": first, "b.blocks": {n: s for n, s in sizes.items() if n not in first}}
    blocks.write_index(tmp_path / "files", groups, of="these")
    return np.concatenate(parts)


def opened(place, memory=10**6, tables=10**6):
    caches = (block_folder.BlockCache(memory), block_folder.BlockCache(tables))
    folder = block_folder.BlockFolder(place, of="these", caches=caches)
    return ranged.RangedArray(folder, NAMES, np.dtype("<u2")), caches


@pytest.fixture(params=["local", "s3", "gs"])
def place(request, values, tmp_path):
    """The files in a folder, and in stores of each kind."""
    if request.param == "local":
        return str(tmp_path / "files")
    running = request.getfixturevalue("_stores")(request.param)
    running.new_bucket()
    request.addfinalizer(lambda: setattr(running, "fault", None))
    mirror.publish(tmp_path / "files", f"{running.address}/x", last=(blocks.INDEX,))
    return f"{running.address}/x"


def test_reads_what_numpy_reads(place, values):
    array, _ = opened(place)
    assert (len(array), array.shape, array.dtype) == (len(values), values.shape, np.uint16)
    rng = np.random.default_rng(0)
    for index in (
        0, -1, [5], [], rng.integers(-len(values), len(values), (50, 3)), np.arange(len(values)) % 1000 == 0,
        slice(None), slice(69_990, 70_020), slice(5, 5), slice(9, 2), slice(-7, None), slice(0, None, 999),
        slice(None, None, -5000),
    ):  # fmt: skip
        np.testing.assert_array_equal(array[index], values[index], str(index))
    np.testing.assert_array_equal(np.asarray(array, np.int64), values.astype(np.int64))
    with pytest.raises(IndexError):
        array[[len(values)]]


def test_gather_copies_ranges_as_a_column_does(place, values):
    array, _ = opened(place)
    begins = np.array([0, 69_999, 70_000, 70_003, 202_771, 90_000, 33_000, len(values)])
    lengths = np.array([70_000, 1, 3, 100_000, 0, 10, 2, 0])
    at = np.cumsum(lengths) - lengths
    out = np.zeros(lengths.sum(), np.int32)
    array.gather(begins, lengths, out, at)
    want = [values[b : b + n] for b, n in zip(begins, lengths, strict=True)]
    np.testing.assert_array_equal(out, np.concatenate(want))


def test_more_blocks_than_fit_are_read_in_parts(values, tmp_path, monkeypatch):
    monkeypatch.setattr(ranged, "_WINDOW", 2)
    array, (kept, _) = opened(tmp_path / "files", memory=blocks.BYTES)
    index = np.random.default_rng(1).permutation(len(values))
    np.testing.assert_array_equal(array[index], values[index])
    np.testing.assert_array_equal(array[:], values)
    assert 0 < kept.size <= blocks.BYTES


def test_blocks_are_asked_for_once_and_neighbours_together(store, values, tmp_path):
    mirror.publish(tmp_path / "files", f"{store.address}/x", last=(blocks.INDEX,))
    array, _ = opened(f"{store.address}/x")
    store.requests.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: array[:], range(4)))
    asked = [path for _, path in store.requests if path.endswith((".bin", ".blocks"))]
    assert len(asked) == 6  # four files that are not empty, and two tables


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_store_that_fails_every_tenth_request_does_not_matter(_stores, scheme, values, tmp_path):
    store = _stores(scheme)
    store.new_bucket()
    mirror.publish(tmp_path / "files", f"{store.address}/x", last=(blocks.INDEX,))
    array, _ = opened(f"{store.address}/x", memory=0)
    count, lock, failed = itertools.count(1), threading.Lock(), []

    def fault(method, path):
        with lock:
            if next(count) % 10 == 0:
                failed.append(path)
                return 503
        return None

    store.fault = fault
    try:
        for seed in range(20):
            index = np.random.default_rng(seed).integers(0, len(values), 40)
            np.testing.assert_array_equal(array[index], values[index])
    finally:
        store.fault = None
    assert len(failed) > 3


def damage(place, name, change):
    paths.write(paths.join(place, name), change(paths.read(paths.join(place, name))))


def flipped(at):
    return lambda raw: raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :]


def test_a_flipped_bit_is_named_with_address_and_offset(place, values):
    damage(place, "3.bin", flipped(3 * blocks.BYTES + 5))
    array, _ = opened(place)
    np.testing.assert_array_equal(array[:100], values[:100])  # blocks that are intact are read
    match = rf"{place}/3.bin: the 3,392 bytes from byte 196,608 on do not match their checksum"
    for _ in range(2):
        with pytest.raises(CacheCorruptError, match=match):
            array[:]


def test_a_truncated_and_a_missing_object_are_named(place, values):
    damage(place, "3.bin", lambda raw: raw[:150_000])
    paths.delete(paths.join(place, "4.bin"))
    array, _ = opened(place)
    with pytest.raises(CacheCorruptError, match=rf"{place}/3.bin: it ends before byte 1"):
        array[150_000:150_010]
    with pytest.raises(CacheCorruptError, match=rf"{place}/4.bin: it is missing"):
        array[[-1]]


def test_damaged_checksums_are_errors(place, values):
    damage(place, "b.blocks", flipped(3))
    with pytest.raises(CacheCorruptError, match=rf"{place}/b.blocks: the 40 bytes from byte 0 on"):
        opened(place)[0][[-1]]
    damage(place, blocks.INDEX, flipped(30))
    with pytest.raises(CacheCorruptError, match=r"blocks.json is altered"):
        opened(place)


def test_checksums_of_other_files_are_refused(values, tmp_path):
    with pytest.raises(CacheCorruptError, match="other files than"):
        block_folder.BlockFolder(tmp_path / "files", of="those")
    with pytest.raises(CacheCorruptError, match="no checksums of 9.bin"):
        block_folder.BlockFolder(tmp_path / "files", of="these").file("9.bin")


def test_files_that_change_while_they_are_read_are_one_error(place, values, tmp_path):
    array, _ = opened(place)
    array[:10]
    other = tmp_path / "other"
    other.mkdir()
    for name in NAMES:
        (other / name).write_bytes(b"\1" * 200_000)
    blocks.write_index(other, {"a.blocks": dict.fromkeys(NAMES, 200_000)}, of="these")
    for path in other.iterdir():
        paths.write(paths.join(place, path.name), path.read_bytes())
    with pytest.raises(block_folder.CacheChangedError, match="was replaced while it was read"):
        array[:]
    paths.delete(*(paths.join(place, name) for name in (*NAMES, blocks.INDEX)))
    with pytest.raises(block_folder.CacheChangedError, match="was deleted while it was read"):
        array[100_000:]


def test_a_store_that_is_gone_is_an_error_in_the_end(store, values, tmp_path, monkeypatch):
    monkeypatch.setattr(block_folder, "_RETRIES", {"max_retries": 1, "initial_delay": "0.01s"})
    monkeypatch.setattr(block_folder, "_PAUSE_SECONDS", 0.01)
    mirror.publish(tmp_path / "files", f"{store.address}/x", last=(blocks.INDEX,))
    array, _ = opened(f"{store.address}/x")
    store.fault = lambda method, path: 503
    with pytest.raises(paths.StoreError, match=r"bin|blocks"):
        array[:10]
    store.fault = None
    np.testing.assert_array_equal(array[:10], values[:10])


def test_a_checksum_is_the_beginning_of_sha256_of_the_block(values, tmp_path):
    import hashlib

    raw = (tmp_path / "files" / "0.bin").read_bytes()
    table = (tmp_path / "files" / "a.blocks").read_bytes()
    want = [hashlib.sha256(raw[i : i + 65536]).digest()[:8] for i in range(0, len(raw), 65536)]
    assert table[:24] == b"".join(want) and len(table) == 8 * 4
