"""Row plans that are made shard by shard and stored: their rows, against plans of each shard and the documents themselves."""

import concurrent.futures
import dataclasses
import itertools
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from espalier.common.storage import mirror, paths
from espalier.data.cache import blocks, in_place, pool
from espalier.data.cache import store as token_cache
from espalier.data.cache.cache_files import CacheCorruptError
from espalier.data.stream import plan, rows, stored_plan
from espalier.data.stream.row_stream import EvalStream
from espalier.data.stream.train_stream import Stream

SHARDS = 5
LENGTHS = {"targets": 64}
PAIRS = {"inputs": 90, "targets": 64}
FEATURES = {"inputs": 500, "targets": 500, "loss_weights": "float32", "document_id": "text"}
POLICIES = [
    (LENGTHS, packing, long_documents, ())
    for packing, long_documents in itertools.product(
        ("best_fit", "concat", "examples"), ("split", "truncate", "drop")
    )
] + [
    (PAIRS, packing, long_documents, prefix)
    for packing in ("best_fit", "examples")
    for long_documents, prefix in (("truncate", ()), ("drop", (1, 2)))
]


def _records(count=240, mean=3.0):
    rng = np.random.default_rng(0)
    sizes = {f: np.minimum(rng.lognormal(mean, 1.0, count).astype(int), 300) for f in PAIRS}
    sizes["targets"][::17] = 0  # empty ones
    made = [{f: rng.integers(1, 500, sizes[f][i]) for f in PAIRS} for i in range(count)]
    for number, record in enumerate(made):
        record["loss_weights"] = rng.random(len(record["targets"])).astype(np.float32)
        record["document_id"] = f"d{number}"
    return made


RECORDS = _records()
# In the order of the cache: `write` deals them out to the shards.
BY_SHARD = [RECORDS[shard::SHARDS] for shard in range(SHARDS)]
IN_ORDER = [record for shard in BY_SHARD for record in shard]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    place = tmp_path_factory.mktemp("caches") / "a"
    return token_cache.write(place, RECORDS, features=FEATURES, num_shards=SHARDS)


@pytest.fixture
def cache(written, tmp_path, monkeypatch):
    """A cache of several shards without a plan, for which the limit of shards is lowered."""
    monkeypatch.setattr(stored_plan, "IN_MEMORY", 1)
    monkeypatch.setattr(pool, "_limit", 1)
    shutil.copytree(written.directory, tmp_path / "a")
    return token_cache.open_cache(tmp_path / "a")


def _plan(cache, lengths=LENGTHS, packing="best_fit", long_documents="split", prefix=(), **how):
    how |= {"packing": packing, "long_documents": long_documents, "inputs_prefix": prefix}
    return rows.plan_source("a", cache, lengths, **how)


def _folder(cache):
    (folder,) = (p for p in cache.directory.with_name("a.plans").iterdir() if p.is_dir())
    return folder


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_rows_are_those_of_each_shard_in_turn(cache, policy):
    lengths, packing, long_documents, prefix = policy
    source = _plan(cache, *policy)
    made, first_row, first_segment, first_record = source.plan, 0, 0, 0
    counts = dict.fromkeys(made.counts, 0)
    for shard in BY_SHARD:
        sizes = {f: np.array([len(record[f]) for record in shard]) for f in lengths}
        want = plan.make_plan(
            sizes,
            lengths,
            packing=packing,
            long_documents=long_documents,
            inputs_prefix=prefix,
        )
        row = slice(first_row, first_row + want.num_rows + 1)
        part = slice(first_segment, first_segment + len(want.records))
        np.testing.assert_array_equal(made.row_starts[row], want.row_starts + first_segment)
        np.testing.assert_array_equal(made.records[part], want.records + first_record)
        np.testing.assert_array_equal(made.offsets[part], want.offsets)
        for f in lengths:
            np.testing.assert_array_equal(made.lengths[f][part], want.lengths[f])
        counts = {key: count + want.counts[key] for key, count in counts.items()}
        first_row, first_segment = first_row + want.num_rows, part.stop
        first_record += len(shard)
    assert (made.num_rows, len(made.records), first_record) == (
        first_row,
        first_segment,
        len(RECORDS),
    )
    assert made.counts == counts and made.policy == want.policy
    for f in lengths:
        total = int(np.asarray(made.lengths[f][:], np.int64).sum())
        assert made.tokens(f) == total and made.fill(f) == total / (first_row * lengths[f])
    # What is counted, and the first id, as in memory.
    whole = {f: np.array([len(record[f]) for record in IN_ORDER]) + (f == "inputs") * len(prefix) for f in lengths}  # fmt: skip
    too_long = np.any([whole[f] > lengths[f] for f in lengths], axis=0)
    assert made.first_long == int(too_long.argmax()) and counts["long_records"] == too_long.sum()
    if long_documents != "split":
        assert made.first == {"long_records": IN_ORDER[int(too_long.argmax())]["document_id"]}
        assert source.notices(lengths)[0][1].endswith(f"(first: {made.first['long_records']})")


@pytest.mark.parametrize("packing", ["best_fit", "concat", "examples"])
def test_an_epoch_rebuilds_the_corpus(cache, packing):
    source = _plan(cache, packing=packing)
    stream = Stream([source], ((0, {"a": 1.0}),), batch_size=8)
    found = [np.zeros((2, len(record["targets"])), np.float32) for record in IN_ORDER]
    weight, places = 0.0, []
    for step in range(-(-source.plan.num_rows // 8)):
        batch = stream.batch(step, 0, 8)
        for b, row in enumerate(stream.documents(step, 0, 8)):
            if row["epoch"] == 0:
                places.append(row["row"])
                weight += batch["decoder_loss_weights"][b].sum(dtype=np.float64)
                at = 0
                for part in row["documents"]:
                    assert part["id"] == IN_ORDER[part["record"]]["document_id"]
                    here = slice(at, at + part["length"])
                    there = slice(part["offset"], part["offset"] + part["length"])
                    tokens, weights = found[part["record"]]
                    assert not tokens[there].any()
                    tokens[there] = batch["decoder_target_tokens"][b, here]
                    weights[there] = batch["decoder_loss_weights"][b, here]
                    document = IN_ORDER[part["record"]]["targets"]
                    before = document[part["offset"] - 1] if part["offset"] else 0
                    assert batch["decoder_input_tokens"][b, at] == before
                    at = here.stop
    assert sorted(places) == list(range(source.plan.num_rows))
    for record, (tokens, weights) in zip(IN_ORDER, found, strict=True):
        np.testing.assert_array_equal(tokens, record["targets"])
        np.testing.assert_array_equal(weights, record["loss_weights"])
    assert weight == pytest.approx(sum(record["loss_weights"].sum() for record in RECORDS))
    assert source.loss_tokens == pytest.approx(weight) and weight < 0.6 * source.plan.tokens()
    cut = _plan(cache, packing=packing, long_documents="truncate")
    length = cut.plan.row_lengths["targets"]
    learnt = sum(record["loss_weights"][:length].sum(dtype=np.float64) for record in RECORDS)
    assert cut.loss_tokens == pytest.approx(learnt) and learnt < weight


def test_rows_read_alike_from_both_forms(cache, monkeypatch):
    """A cache of one shard, which can be planned both ways, gives the same batches and fingerprints."""
    for lengths in (LENGTHS, PAIRS):
        how = {"long_documents": "truncate", "prefix": (3,) if lengths is PAIRS else ()}
        place = cache.directory.with_name(f"one{len(lengths)}")
        one = token_cache.write(place, RECORDS, features=FEATURES)
        monkeypatch.setattr(stored_plan, "IN_MEMORY", 1)
        in_memory = EvalStream(_plan(one, lengths, **how), batch_size=7)
        monkeypatch.setattr(stored_plan, "IN_MEMORY", 0)
        stored = EvalStream(_plan(one, lengths, **how), batch_size=7)
        assert stored._sources[0].plan.begins and not in_memory._sources[0].plan.begins
        assert stored.summary() == in_memory.summary()
        for step in range(stored.num_steps):
            batch = stored.batch(step, 0, 7)
            for name, array in in_memory.batch(step, 0, 7).items():
                np.testing.assert_array_equal(batch[name], array, name)
            assert stored.documents(step, 0, 7) == in_memory.documents(step, 0, 7)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_and_restarts_see_the_same_rows(cache, hosts):
    def make():
        return Stream([_plan(cache)], ((0, {"a": 1.0}),), batch_size=8, seed=3)

    whole, share = make(), 8 // hosts
    for step in (0, 1, 50, 10**9):
        mine = make()  # as after a restart
        parts = [mine.batch(step, h * share, (h + 1) * share) for h in range(hosts)]
        for name, array in whole.batch(step, 0, 8).items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), array, name)


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


_KILLED = """
import os, signal, sys
from espalier.common import files
from espalier.data.cache import pool, store
from espalier.data.stream import rows, stored_plan
directory, left = sys.argv[1], int(sys.argv[2])
cache = store.open_cache(directory)

def write(path, content, **how):
    global left
    if left == 0:
        with open(path, "wb") as file:  # what is written is not all
            file.write(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    real(path, content, **how)

real, files.write, stored_plan.IN_MEMORY = files.write, write, 1
with pool.limited(1):
    rows.plan_source("a", cache, {"targets": 64})
"""


def test_bytes_do_not_depend_on_workers_or_kills(cache):
    _plan(cache)
    want, folder = _bytes(_folder(cache)), _folder(cache)
    for workers in (2, 3):
        shutil.rmtree(folder)
        with pool.limited(workers):
            _plan(cache)
        assert _bytes(folder) == want
    shutil.rmtree(folder)
    for writes in random.Random(0).sample(range(8), 3):  # of 23 writes
        command = [sys.executable, "-c", _KILLED, str(cache.directory), str(writes)]
        assert subprocess.run(command).returncode == -signal.SIGKILL
    with pool.limited(2):
        _plan(cache)
    assert _bytes(folder) == want
    left = {path.name for path in folder.parent.iterdir()} - {f"{folder.name}.lock"}
    assert {name for name in left if not name.startswith(".")} == {folder.name}


def test_complete_shards_are_not_planned_again(cache, monkeypatch):
    """A build that stops in its third shard goes on there, unless a file of an earlier one is damaged."""
    planned = []

    def stopping(build, shard, *made, write=stored_plan.PlanBuild._write):
        planned.append(shard.number)
        if planned == [0, 1, 2]:
            raise KeyboardInterrupt
        write(build, shard, *made)

    monkeypatch.setattr(stored_plan.PlanBuild, "_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        _plan(cache)
    (waiting,) = cache.directory.with_name("a.plans").glob("*.building")
    assert not (waiting.parent / waiting.stem).exists()
    (waiting / "00001.segments").write_bytes(b"")  # as after a power cut
    _plan(cache)
    assert planned == [0, 1, 2, 1, 2, 3, 4]


def test_processes_that_start_together_plan_once(cache, monkeypatch):
    made = []
    monkeypatch.setattr(
        stored_plan, "_make", lambda *how, make=stored_plan._make: (made.append(how), make(*how))
    )
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        plans = [found.plan for found in threads.map(lambda _: _plan(cache), range(3))]
    assert len(made) == 1
    assert len({found.row_starts.tobytes() for found in plans}) == 1


@pytest.mark.parametrize("name", ["row_starts", "segments", "records", "plan.json", "plan.sums"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_named_with_its_remedy(cache, name, damage):
    want = _plan(cache).plan.row_starts[:]
    path = _folder(cache) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(CacheCorruptError, match=f"{name}.*[Dd]elete the (folder|directory)"):
        _plan(cache)
    shutil.rmtree(path.parent)
    np.testing.assert_array_equal(_plan(cache).plan.row_starts, want)


def test_without_verification_only_sizes_are_checked(cache):
    _plan(cache)
    path = _folder(cache) / "segments"
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    _plan(cache, verify=False)
    path.write_bytes(content[:-16])
    with pytest.raises(CacheCorruptError, match="segments"):
        _plan(cache, verify=False)


def test_a_damaged_cache_is_not_planned(cache):
    path = cache.directory / "00003.targets.len"
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(CacheCorruptError, match=r"00003.targets.len does not match its checksum"):
        _plan(cache)
    assert not list(cache.directory.with_name("a.plans").glob("*/" + blocks.INDEX))


def test_errors_name_the_shard(cache, tmp_path):
    with pytest.raises(ValueError, match=r"Shard 1 of .*records are longer .*'truncate'"):
        _plan(cache, PAIRS)
    wrong = [dict(record) for record in RECORDS]
    wrong[7]["loss_weights"] = wrong[7]["loss_weights"] - 1  # of the third shard
    other = token_cache.write(tmp_path / "w", wrong, features=FEATURES, num_shards=SHARDS)
    with pytest.raises(ValueError, match=r"Shard 3 of .*'loss_weights' has values that are neg"):
        _plan(other)
    wrong[7]["loss_weights"] = np.zeros(1, np.float32)
    other = token_cache.write(tmp_path / "v", wrong, features=FEATURES, num_shards=SHARDS)
    with pytest.raises(ValueError, match=r"Shard 3 of .*has 1 values for the .* of record 1: "):
        _plan(other)
    long = [{"targets": np.ones(9, int)}] * 4
    other = token_cache.write(tmp_path / "u", long, features={"targets": 5}, num_shards=2)
    with pytest.raises(ValueError, match="drops all of its records"):
        _plan(other, {"targets": 8}, long_documents="drop")


def test_a_place_that_cannot_be_written_is_named(cache):
    cache.directory.with_name("a.plans").write_text("a file")
    with pytest.raises(OSError, match=r"The row plan .*a\.plans.* cannot be written.*cache_dir"):
        _plan(cache)


def test_small_caches_are_planned_in_memory(written):
    assert stored_plan.IN_MEMORY == 64
    assert not _plan(written).plan.begins
    assert not written.directory.with_name("a.plans").exists()


def test_numbers_of_records_have_as_many_bits_as_they_need(cache):
    assert plan.record_dtype(2**32) == np.uint32
    assert plan.record_dtype(2**32 + 1) == np.int64
    assert np.array([2**32 - 1]).astype(plan.record_dtype(2**32))[0] == 2**32 - 1
    # A shard that begins beyond 32 bits, as in a cache of 10^10 records.
    shard = dataclasses.replace(next(stored_plan._shards(cache)), first_record=10**10, first_values={"targets": 10**13})  # fmt: skip
    build = stored_plan.PlanBuild(
        name="x", cache=str(cache.directory), folder=cache.directory.with_name("b"), weighted=False, records=10**10 + 10**3,
        row_lengths=LENGTHS, packing="best_fit", long_documents="split", inputs_prefix=(),
    )  # fmt: skip
    build.folder.mkdir()
    build.write_shard(shard)
    records = np.fromfile(build.folder / "00000.records", "<i8")
    assert sorted(set(records.tolist()))[:2] == [10**10 + 1, 10**10 + 2]  # the first is empty
    begins = np.fromfile(build.folder / "00000.segments", stored_plan.segment_dtype(["targets"]))
    assert begins["targets.begin"].min() == 10**13


def test_plans_in_a_store_are_read_in_place(cache, store, tmp_path):
    want = EvalStream(_plan(cache), batch_size=8)
    address = f"{store.address}/tokens/a"
    mirror.publish(cache.directory, address)
    for _ in range(2):  # the first makes it
        there = EvalStream(_plan(in_place.open_cache(address)), batch_size=8)
        assert there.fingerprint == want.fingerprint
        for step in range(want.num_steps):
            batch = there.batch(step, 0, 8)
            for name, array in want.batch(step, 0, 8).items():
                np.testing.assert_array_equal(batch[name], array, name)
    (name,) = paths.names(f"{address}.plans")
    assert name == _folder(cache).name
    assert sorted(paths.names(f"{address}.plans/{name}")) == sorted(_bytes(_folder(cache)))
    here = [p for p in (tmp_path / "copies").rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert here == []
    damaged = bytearray(paths.read(f"{address}.plans/{name}/segments"))
    damaged[5] ^= 1
    paths.write(f"{address}.plans/{name}/segments", bytes(damaged))
    stream = EvalStream(_plan(in_place.open_cache(address)), batch_size=8)
    with pytest.raises(CacheCorruptError, match=f"{address}.plans/{name}/segments.*elete the fold"):
        stream.batch(0, 0, 8)
    token_cache.remove_plans(address)
    assert paths.entries(f"{address}.plans") == {}
