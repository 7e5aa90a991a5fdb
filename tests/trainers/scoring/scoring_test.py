"""Scores against a log-softmax in float64."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.embed import Positions
from espalier.model.transformer import Transformer
from espalier.trainers.scoring.scoring import Row, Scorer
from tests.drawn import drawn

V = 31


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(
        vocab_size=V, num_layers=1, scan_layers=False, embed_dim=16, num_heads=2, mlp_dim=16
    )
    return Transformer(config=config, tie_embeddings=False, logit_scale=2.0, logit_softcap=3.0)


@pytest.fixture(scope="module")
def params(model):
    params = nn.meta.unbox(drawn(model, jnp.zeros((1, 4), jnp.int32)))
    return jax.tree.map(lambda x: 4 * x, params)


@pytest.fixture(scope="module")
def scorer(model, params):
    return Scorer(model, params, batch_size=2)


ROWS = [
    Row(context=[0], targets=[4, 5, 6]),
    Row(context=[3, 9, 1], targets=[30]),
    Row(context=[0, 7], targets=[*range(20)]),
    Row(context=[2], targets=[]),
    Row(context=[5, 5], targets=[1, 2]),
]


def test_scores_equal_a_log_softmax_in_float64(scorer, model, params):
    hidden = jax.jit(lambda ids: model.apply({"params": params}, ids, method="hidden").hidden_BTD)
    head = np.asarray(params["lm_head"]["embedding"], np.float64)
    scores = scorer(ROWS)
    assert [len(row) for row in scores] == [len(row.targets) for row in ROWS]
    for row, got in zip(ROWS, scores, strict=True):
        text = [*row.context, *row.targets]
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        logits = 3.0 * np.tanh(2.0 * np.asarray(hidden(padded)[0], np.float64) @ head.T / 3.0)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        first = len(row.context) - 1
        want = [table[first + i, target] for i, target in enumerate(row.targets)]
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_row_without_context_is_refused(scorer):
    with pytest.raises(ValueError, match="Row 1 has no context"):
        scorer([Row(context=[0], targets=[1]), Row(context=[], targets=[1])])


def test_rows_beyond_learned_positions_are_refused(model, params):
    limited = model.clone(position_embed=functools.partial(Positions, num_positions=4))
    scorer = Scorer(limited, params, batch_size=2)
    with pytest.raises(ValueError, match="Row 0 has 5 tokens.* 4 positions"):
        scorer([Row(context=[0], targets=[1, 2, 3, 4, 5])])
