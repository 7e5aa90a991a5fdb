"""The loader's calculated index: the rows of a real cache, constant memory, and hosts that share an epoch."""

import collections
import tracemalloc

import numpy as np
import pytest

from espalier.data.cache import store
from espalier.data.stream import rows
from espalier.data.stream.plan import Plan
from tests.benchmarks import data_loader, virtual_source

LENGTHS = np.array([5, 70, 3, 16, 40, 1, 33, 8])
SIZES = {"hosts": 4, "rows_per_host": 2, "length": 32, "records": 24, "seconds": 0.0}


def test_a_calculated_source_has_the_rows_of_a_real_cache(tmp_path):
    made = virtual_source.make("text", LENGTHS, row_length=32, tokens=400)
    assert made.cache.tokens() == 3 * LENGTHS.sum() == made.plan.tokens()
    lengths = np.tile(LENGTHS, 3)
    ends = np.cumsum(lengths)
    tokens = virtual_source.tokens_at(np.arange(ends[-1]))
    assert tokens.min() >= 1 and len(np.unique(tokens)) > 0.98 * len(tokens)
    cache = store.write(
        tmp_path / "cache",
        [{"targets": x} for x in np.split(tokens, ends[:-1])],
        features={"targets": virtual_source.VOCABULARY},
    )
    plan = made.plan
    real = Plan(
        row_starts=plan.row_starts[:],
        records=plan.records[:],
        offsets=plan.offsets[:],
        lengths={"targets": plan.lengths["targets"][:]},
        row_lengths=plan.row_lengths,
        packing=plan.packing,
        long_documents=plan.long_documents,
        counts={},
    )
    # Every token of every period is in one row.
    places = np.concatenate(
        [
            np.arange(o, o + n) + (ends - lengths)[r]
            for r, o, n in zip(real.records, real.offsets, real.lengths["targets"], strict=True)
        ]  # fmt: skip
    )
    np.testing.assert_array_equal(np.sort(places), np.arange(ends[-1]))
    assert real.num_rows == plan.num_rows and real.fill() == plan.fill()
    every = np.arange(plan.num_rows)
    batches = [
        rows.read_rows([source], np.zeros_like(every), every)
        for source in (made, rows.Source("text", cache, real))
    ]
    for name, wanted in batches[1].items():
        np.testing.assert_array_equal(batches[0][name], wanted, err_msg=name)


def test_hosts_read_disjoint_rows_that_complete_an_epoch():
    # Every host makes a stream of its own.
    stream, *hosts = (data_loader.make_stream({**SIZES, "tokens": 60_000}) for _ in range(5))
    all_rows = collections.defaultdict(list)
    steps = 0
    while min(stream.epochs(steps).values()) < 1:
        whole = stream.batch(steps, 0, stream.batch_size)
        for host, own in enumerate(hosts):
            lo, hi = 2 * host, 2 * host + 2
            part = own.batch(steps, lo, hi)
            np.testing.assert_array_equal(
                part["decoder_target_tokens"], whole["decoder_target_tokens"][lo:hi]
            )
            for row in own.documents(steps, lo, hi):
                all_rows[row["source"]].append((row["epoch"], row["row"]))
        steps += 1
    for source in stream._sources:
        seen = all_rows[source.name]
        assert len(set(seen)) == len(seen)  # no row twice within an epoch
        first = sorted(row for epoch, row in seen if epoch == 0)
        assert first == list(range(source.plan.num_rows))


def traced(tokens):
    """Peak bytes that Python and NumPy allocate to make a stream of so many tokens and read from both its ends."""
    sizes = {**SIZES, "tokens": tokens}
    tracemalloc.start()
    try:
        stream = data_loader.make_stream(sizes)
        for step in (0, 1, 2, stream.steps_for_epochs(1.0) - 1):
            stream.batch(step, 2, 4)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_index():
    traced(10**6)  # fills the caches of schedules and of NumPy
    small, large = traced(10**8), traced(10**11)
    assert large == pytest.approx(small, rel=0.02)
    assert large < 10**7


def test_a_host_reads_its_rows_at_both_ends_of_an_epoch(monkeypatch):
    asked = []
    host = data_loader.Host({**SIZES, "tokens": 10**11}, 3)
    batch = host._stream.batch

    def recorded(step, lo, hi):
        asked.append((step, lo, hi))
        return batch(step, lo, hi)

    monkeypatch.setattr(host._stream, "batch", recorded)
    report = host.feed()
    assert report["last_step"] > 10**11 / (8 * 32)
    assert asked == [(0, 6, 8), (report["last_step"] - 1000, 6, 8)]
    assert report["begin"] > 0 and report["peak_mb"] >= report["before_mb"]
