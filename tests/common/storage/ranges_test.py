"""Objects as streams of ranges: the bytes, what is asked for, and objects that change."""

import contextlib
import itertools
import random

import pytest

from espalier.common.storage import paths, ranges

CONTENT = random.Random(0).randbytes(1_000_000)


@pytest.fixture
def small(monkeypatch):
    """Requests of at most 64 KiB."""
    monkeypatch.setattr(ranges, "_FIRST", 4 << 10)
    monkeypatch.setattr(ranges, "_MOST", 64 << 10)
    monkeypatch.setattr(ranges, "_BUFFER", 8 << 10)
    monkeypatch.setattr(ranges, "_PAUSE_SECONDS", 0.01)


def test_any_reads_are_those_of_a_local_file(store, small, tmp_path):
    address, path = f"{store.address}/x", tmp_path / "x"
    paths.write(address, CONTENT)
    path.write_bytes(CONTENT)
    assert ranges.size(address) == ranges.size(path) == len(CONTENT)
    draw = random.Random(1)
    with ranges.opened(address) as there, ranges.opened(path) as here:
        for _ in range(60):
            if draw.random() < 0.3:
                place = draw.choice([draw.randrange(1_100_000), 0, 999_990])
                assert there.seek(place) == here.seek(place)
            count = draw.choice([1, 100, 9_000, 200_000])
            assert there.read(count) == here.read(count) and there.tell() == here.tell()
        assert there.seek(-9, 2) == here.seek(-9, 2) and there.read() == here.read()
    with ranges.opened(address, begin=500, end=700) as part:
        assert part.read() == CONTENT[500:700]
    with ranges.opened(address, begin=len(CONTENT)) as part:
        assert part.read() == b""
    paths.write(address, b"")
    with ranges.opened(address) as empty:
        assert empty.read() == b"" and empty.readline() == b""


def test_reading_straight_on_asks_for_each_byte_once_and_ahead(store, small):
    address = f"{store.address}/x"
    paths.write(address, CONTENT)
    asked = []
    store.fault = lambda method, path: asked.append(method) if method == "GET" else None
    with ranges.opened(address, begin=100_000, end=400_000) as file:
        assert file.read() == CONTENT[100_000:400_000]
    assert len(asked) < 20  # of 4 KiB, doubled up to 64 KiB
    read = []
    original = ranges._read

    def counted(address, begin, end):
        read.append((begin, end))
        return original(address, begin, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranges, "_read", counted)
        with ranges.opened(address, begin=100_000, end=400_000) as file:
            while file.read(5_000):
                pass
    read.sort()
    assert read[0][0] == 100_000 and read[-1][1] == 400_000
    assert all(one[1] == next[0] for one, next in itertools.pairwise(read))
    assert max(end - begin for begin, end in read) == 64 << 10


def test_a_store_that_fails_now_and_then_loses_nothing(store, small):
    address = f"{store.address}/x"
    paths.write(address, CONTENT)
    numbers = itertools.count(1)
    store.fault = lambda method, path: 503 if next(numbers) % 4 == 0 else None
    with ranges.opened(address) as file:
        assert file.read() == CONTENT
    store.fault = None


def test_an_object_that_changes_is_named(store, small):
    address = f"{store.address}/x"
    paths.write(address, CONTENT)
    before = paths.entry(address).version
    with ranges.opened(address, version=before) as file:
        assert file.read(9) == CONTENT[:9]
    paths.write(address, CONTENT[::-1])
    replaced = f"{address} was replaced since this run began to read it .it was {before}, and is "
    with pytest.raises(ranges.ChangedError, match=replaced), ranges.opened(address, version=before):
        pytest.fail("it is another one")
    with pytest.raises(ranges.ChangedError, match="was replaced"), ranges.opened(address) as file:
        file.read(9)
        paths.write(address, CONTENT)
        file.seek(900_000)
        file.read(9)
    # An error of what was read is the change's, if there was one.
    with pytest.raises(ranges.ChangedError, match="was replaced"), ranges.opened(address):
        paths.write(address, CONTENT[::-1])
        raise ValueError("malformed")
    with pytest.raises(ranges.ChangedError, match="was deleted"), ranges.opened(address):
        paths.delete(address)
    with pytest.raises(FileNotFoundError), ranges.opened(address):
        pass
    # A reader that stops early asks nothing more.
    paths.write(address, CONTENT)

    def rows():
        with ranges.opened(address) as file:
            yield from file

    with contextlib.closing(rows()) as reading:
        next(reading)
        paths.delete(address)
