"""Groups and their costs, and the cost of a program against FLOPs written out."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.flops import variable_shapes
from espalier.model.transformer import Transformer
from espalier.trainers.decoding import few_programs
from espalier.trainers.decoding.few_programs import grouped


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
        monkeypatch.setattr(few_programs, "target_platform", lambda platform=platform: platform)
        assert few_programs.program_tokens(model, params) == pytest.approx(3 * layer / flops)
