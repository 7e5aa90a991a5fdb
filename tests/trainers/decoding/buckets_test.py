"""Few shapes for many lengths."""

from espalier.trainers.decoding import buckets
from espalier.trainers.decoding.buckets import batches_by_length, bucket_length, in_order


def test_buckets_hold_their_rows_with_bounded_padding_and_few_shapes():
    buckets = {n: bucket_length(n) for n in range(1, 1025)}
    assert all(n <= bucket for n, bucket in buckets.items())
    assert all(bucket - n <= bucket / 3 for n, bucket in buckets.items() if n >= 17)
    assert sorted(set(buckets.values())) == [
        16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024,
    ]  # fmt: skip


def test_buckets_stop_at_the_learned_positions():
    assert bucket_length(17, limit=20) == 20


def test_batches_cover_every_row_once_longest_first():
    batches = batches_by_length([3, 9, 1, 9, 5], 2)
    assert batches == [[1, 3], [4, 0], [2]]


def test_the_first_rows_come_early_and_in_order(monkeypatch):
    monkeypatch.setattr(buckets, "BATCHES_SORTED", 2)
    batches = batches_by_length([3, 9, 1, 9, 5, 6, 7], 2)
    assert batches == [[1, 3], [0, 2], [6, 5], [4]]
    taken = []
    found = ((taken.append(i), (i, str(i)))[1] for batch in batches for i in batch)
    rows = in_order(found)
    assert next(rows) == "0" and taken == [1, 3, 0]
    assert list(rows) == list("123456")
