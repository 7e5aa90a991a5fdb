"""Means of final hidden states against a call of the model for each row, whatever the batch."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.embed import Positions
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Transformer
from espalier.trainers.scoring.scoring import MeanStates, Row
from tests.drawn import drawn

V = 11


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(
        vocab_size=V, num_layers=1, scan_layers=False, embed_dim=16, num_heads=2, mlp_dim=16
    )
    return Transformer(config=config)


@pytest.fixture(scope="module")
def params(model):
    return nn.meta.unbox(drawn(model, jnp.zeros((1, 4), jnp.int32)))


def test_the_mean_is_over_targets_alone_in_batches_of_other_lengths(model, params):
    rng = np.random.default_rng(0)
    rows = [
        Row(context=[0, 5][:context], targets=rng.integers(1, V, targets).tolist())
        for context, targets in ((0, 1), (1, 13), (2, 7), (1, 16), (1, 20))
    ]
    found = list(MeanStates(model, params, batch_size=3).stream(rows))
    # One row at a time, and padding that a causal model does not see.
    hidden = jax.jit(lambda ids: model.apply({"params": params}, ids, method="hidden").hidden_BTD)
    for row, mean_D in zip(rows, found, strict=True):
        text = [*row.context, *row.targets]
        states_TD = np.asarray(hidden(np.array([text + [0] * (24 - len(text))])), np.float64)[0]
        want_D = states_TD[len(row.context) : len(text)].mean(0)
        np.testing.assert_allclose(mean_D, want_D, atol=1e-5)


def test_of_an_encoder_decoder_the_states_are_its_encoders(model):
    encodes = EncoderDecoder(config=model.config)
    params = nn.meta.unbox(drawn(encodes, jnp.zeros((1, 4), jnp.int32)))
    rows = [Row(context=[5], targets=[3, 7, 2]), Row(context=[], targets=[1, 9, 4, 2])]
    found = list(MeanStates(encodes, params, batch_size=3).stream(rows))
    states_of = jax.jit(lambda ids: encodes.apply({"params": params}, ids, method="encode"))
    for row, mean_D in zip(rows, found, strict=True):
        states = states_of(jnp.array([[*row.context, *row.targets]])).states_BSD
        want_D = np.asarray(states, np.float64)[0, len(row.context) :].mean(0)
        np.testing.assert_allclose(mean_D, want_D, atol=1e-5)


def test_a_row_longer_than_learned_positions_is_an_error(model):
    limited = model.clone(position_embed=functools.partial(Positions, num_positions=8))
    rows = [Row(context=[0], targets=[1] * 7), Row(context=[0], targets=[1] * 8)]
    with pytest.raises(ValueError, match="Row 1 has 9 tokens, but the model learned only 8"):
        MeanStates(limited, {}, batch_size=1).stream(rows)
