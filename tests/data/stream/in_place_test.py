"""Streams over caches that are read in place, in stores, against the same streams over local copies."""

import itertools
import json
import threading
import time

import numpy as np
import pytest

from espalier.common.storage import mirror, paths
from espalier.data.cache import block_folder, in_place
from espalier.data.cache.cache_files import CacheCorruptError
from espalier.data.cache.store import MANIFEST, write
from espalier.data.stream import ahead, rows
from espalier.data.stream.row_stream import EvalStream
from espalier.data.stream.train_stream import Stream

PHASES = ((0, {"a": 0.7, "b": 0.3}), (10, {"b": 1.0}))
LENGTH = 256


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("caches"), np.random.default_rng(0)
    out = {}
    for name, count, shards in (("a", 900, 3), ("b", 400, 1)):
        sizes = np.minimum(rng.lognormal(5, 1.0, count).astype(int) + 1, 2000)
        records = [
            {
                "targets": rng.integers(1, 500, size),
                "loss_weights": rng.integers(0, 3, size).astype(np.float32),
                "document_id": f"{name}#{i}",
            }
            for i, size in enumerate(sizes)
        ]
        features = {"targets": 500, "loss_weights": "float32", "document_id": "text"}
        out[name] = write(root / name, records, features=features, num_shards=shards)
    return out


@pytest.fixture
def opened(local, store, monkeypatch):
    """Opens both caches in place, as a new process does."""
    for name, cache in local.items():
        mirror.publish(cache.directory, f"{store.address}/{name}", last=(MANIFEST,))

    def again():
        fresh = block_folder.BlockCache(500_000), block_folder.BlockCache(10**6)
        monkeypatch.setattr(block_folder, "shared_caches", lambda: fresh)
        return {name: in_place.open_cache(f"{store.address}/{name}") for name in local}

    return again


def make(caches, packing="best_fit"):
    sources = [
        rows.plan_source(name, cache, {"targets": LENGTH}, packing=packing)
        for name, cache in caches.items()
    ]
    return Stream(sources, PHASES, batch_size=8, seed=3)


def assert_equal(one, other):
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_rows_equal_those_of_local_caches_on_any_number_of_hosts(local, opened, packing):
    whole = make(local, packing)
    steps = [0, 1, 2, *np.random.default_rng(0).integers(0, 10**6, 3).tolist(), 9, 10, 11]
    want = [whole.batch(step, 0, 8) for step in steps]
    for hosts in (1, 2, 4):
        streams = [make(opened(), packing) for _ in range(hosts)]
        assert {stream.fingerprint for stream in streams} == {whole.fingerprint}
        share = 8 // hosts
        for step, batch in zip(steps, want, strict=True):
            parts = [s.batch(step, h * share, (h + 1) * share) for h, s in enumerate(streams)]
            assert_equal({f: np.concatenate([p[f] for p in parts]) for f in batch}, batch)
    assert streams[0].documents(2, 0, 8) == whole.documents(2, 0, 8)
    # Budgets count the weights of tokens, which are 1 on average and do not add up to the tokens.
    assert streams[0].steps_for_tokens(10**6) == whole.steps_for_tokens(10**6)
    learnt = {name: sum(map(np.sum, x.columns["loss_weights"].shards)) for name, x in local.items()}
    for source in (*whole._sources, *streams[0]._sources):
        assert source.loss_tokens == learnt[source.name] != source.plan.tokens()


def test_a_restart_goes_on_with_the_same_rows(local, opened):
    want = [make(local)[step] for step in range(8)]
    batches = iter(make(opened()))
    for step in range(4):
        assert_equal(next(batches), want[step])
    state = json.loads(json.dumps(batches.get_state()))
    after = iter(make(opened()))
    after.set_state(state)
    for step in range(4, 8):
        assert_equal(next(after), want[step])


def test_held_out_rows_are_equal_too(local, opened):
    def batches(caches):
        source = rows.plan_source("a", caches["a"], {"targets": LENGTH})
        return list(EvalStream(source, batch_size=16))

    for one, other in zip(batches(local), batches(opened()), strict=True):
        assert_equal(one, other)


def test_a_store_that_fails_every_tenth_request_changes_nothing(local, opened, store):
    count, lock, failed = itertools.count(1), threading.Lock(), []

    def fault(method, path):
        with lock:
            if method == "GET" and next(count) % 10 == 0:
                failed.append(path)
                return 503
        return 0.001

    stream, whole = make(opened()), make(local)
    store.fault = fault
    for step in range(30, 60):
        assert_equal(stream.batch(step, 0, 8), whole.batch(step, 0, 8))
    assert failed


def test_the_next_batches_are_read_before_they_are_asked_for(local, opened, store):
    stream = make(opened())
    store.fault = lambda method, path: 0.02
    for step in range(20, 30):
        stream.batch(step, 0, 8)
        time.sleep(0.3)
    assert stream._ahead.depth < ahead._MOST  # deep enough
    store.fault, begin = lambda method, path: 1.0, time.monotonic()
    batch = stream.batch(30, 0, 8)
    assert time.monotonic() - begin < 0.5
    assert_equal(batch, make(local).batch(30, 0, 8))


def test_damage_is_an_error_of_the_batch_that_needs_it(local, opened, store):
    address = f"{store.address}/b/00000.targets.bin"
    raw = bytearray(paths.read(address))
    raw[-1] ^= 1
    paths.write(address, bytes(raw))
    stream, failed = make(opened()), 0
    for step in range(40):
        try:
            got = stream.batch(step, 0, 8)
        except CacheCorruptError as error:
            assert f"{address}: the" in str(error) and "from byte" in str(error)
            failed += 1
            continue
        assert_equal(got, make(local).batch(step, 0, 8))
    assert 0 < failed < 40


class Steps:
    """A stream whose batches take a while."""

    def __init__(self, seconds=0.0, size=1):
        self.seconds, self.size, self.asked = seconds, size, []

    def read(self, step, lo, hi):
        self.asked.append(step)
        time.sleep(self.seconds)
        if step == 13:
            raise ValueError("13")
        return {"step": np.full((hi - lo, self.size), step)}


def test_batches_ahead_are_bounded_and_follow_jumps(monkeypatch):
    monkeypatch.setattr(ahead, "_MEMORY", 4 * 2 * 65536 + 64)
    steps = Steps(0.02)
    reader = ahead.Ahead(steps.read)
    assert reader.get(5, 0, 1)["step"] == 5 and steps.asked == [5]  # perhaps the only one
    for step in range(6, 12):
        assert reader.get(step, 0, 1)["step"] == step
    assert 1 < reader.depth <= 4 and max(steps.asked) <= 11 + 4
    assert reader.get(100, 0, 1)["step"] == 100
    assert not reader._pending
    for step in (12, 14):
        assert reader.get(step, 0, 1)["step"] == step
    with pytest.raises(ValueError, match="13"):
        reader.get(13, 0, 1)
    assert sorted(steps.asked)[:7] == [5, 6, 7, 8, 9, 10, 11]  # each was read once
