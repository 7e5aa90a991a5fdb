"""Few shapes for many lengths, and few programs: groups and their costs, and the cost of a program against FLOPs written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.flops import variable_shapes
from espalier.model.transformer import Transformer
from espalier.trainers.decoding import buckets
from espalier.trainers.decoding.buckets import batches_by_length, bucket_length, grouped, in_order


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


def joined(one, other):
    """The longer length, and the number of rows of both."""
    return max(one[0], other[0]), one[1] + other[1]


@pytest.mark.parametrize("program", [0, 10, 100, 1000, 10**6])
def test_no_two_groups_would_cost_less_together_and_all_items_are_there(program):
    rng = np.random.default_rng(program)
    items = list(dict(zip(rng.integers(1, 99, 12).tolist(), range(1, 13), strict=True)).items())

    def cost(item):
        return program + item[0] * item[1]

    groups = grouped(items, joined, cost)
    assert sorted(item for _, members in groups for item in members) == sorted(items)
    for (length, rows), members in groups:
        assert length == max(size for size, _ in members) and rows == sum(n for _, n in members)
    for (one, _), (other, _) in itertools.combinations(groups, 2):
        assert cost(joined(one, other)) > cost(one) + cost(other)
    total = sum(cost(item) for item, _ in groups)
    assert total <= min(sum(map(cost, items)), program + max(items)[0] * sum(n for _, n in items))
    assert len(groups) == {0: len(items), 10**6: 1}.get(program, len(groups))


def test_of_equal_costs_the_one_with_fewer_groups_is_taken():
    assert grouped([(5, 1), (3, 2)], joined, lambda item: 4 + item[0] * item[1]) == [
        ((5, 3), [(5, 1), (3, 2)])
    ]
    assert grouped([], joined, float) == []


def test_a_program_costs_the_tokens_that_a_device_reads_meanwhile(monkeypatch):
    sizes = {"vocab_size": 32, "num_layers": 3, "embed_dim": 16, "num_heads": 2, "mlp_dim": 24}
    model = Transformer(config=TransformerConfig(**sizes, scan_layers=False))
    weights = 4 * 16 * 16 + 3 * 16 * 24  # of a layer
    flops = 3 * (2 * weights + 4 * 16) + 2 * 32 * 16  # with one key for each query, and logits
    params = variable_shapes(model, jax.ShapeDtypeStruct((1, 1), jnp.int32))["params"]
    for platform, layer in (("cpu", 2e10), ("tpu", 1e13)):
        monkeypatch.setattr(buckets, "target_platform", lambda platform=platform: platform)
        assert buckets.program_tokens(model, params) == pytest.approx(3 * layer / flops)
