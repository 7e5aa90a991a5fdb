"""Sizes are checked when a config is made, all problems at once."""

import pytest

from espalier.model.config import TransformerConfig

SIZES = {"vocab_size": 64, "num_layers": 4, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48}


def test_defaults_derive_heads():
    config = TransformerConfig(**SIZES)
    assert (config.kv_heads, config.per_head_dim) == (4, 8)


def test_layer_pattern_repeats():
    config = TransformerConfig(**SIZES, layer_pattern=("sliding", "full_nope"), sliding_window=3)
    assert [config.layer_kind(i).window for i in range(4)] == [3, None, 3, None]
    assert [config.layer_kind(i).rope for i in range(4)] == [True, False, True, False]


def test_a_pattern_may_end_in_part_and_name_mlps():
    config = TransformerConfig(
        **SIZES, layer_pattern=("full:dense", "sliding", "sliding:dense"), sliding_window=3
    )
    assert [config.layer_kind(i).window for i in range(4)] == [None, 3, 3, None]
    assert [config.layer_kind(i).mlp for i in range(4)] == ["dense", "", "dense", "dense"]
    assert config.kind_names[3] == "full:dense"
    encoder = config.bidirectional(2)
    assert encoder.layer_pattern == ("bidirectional:dense", "bidirectional")
    assert not encoder.layer_kind(0).causal and encoder.layer_kind(0).mlp == "dense"


def test_every_problem_is_reported():
    bad = {
        **SIZES,
        "num_heads": 5,
        "num_kv_heads": 2,
        "layer_pattern": ("full", "wide", "full:", "x", "y"),
    }
    with pytest.raises(ValueError) as error:
        TransformerConfig(**bad, remat="half", dtype="int8")
    message = str(error.value)
    for part in (
        "embed_dim = 32",
        "num_kv_heads = 2",
        "layer_pattern has 5 kinds for num_layers = 4",
        "'wide'",
        "no MLP after the colon of 'full:'",
        "'half'",
        "'int8'",
    ):
        assert part in message


def test_sliding_needs_a_window():
    for kind in ("sliding", "sliding:dense"):
        with pytest.raises(ValueError, match="sliding_window"):
            TransformerConfig(**SIZES, layer_pattern=(kind,))


def test_no_heads_are_one_error_that_names_them():
    sizes = {"vocab_size": 8, "num_layers": 1, "embed_dim": 8, "mlp_dim": 8}
    with pytest.raises(ValueError, match="num_heads = 0 must be positive"):
        TransformerConfig(num_heads=0, num_kv_heads=1, **sizes)
