"""The language-modelling loss against numpy: weights, sources, z-loss."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import TransformerConfig
from model.transformer import Transformer
from trainers.objectives.lm import language_modelling


@pytest.fixture(scope="module")
def setup():
    config = TransformerConfig(vocab_size=31, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8)
    model = Transformer(config=config, logit_scale=3.0)
    key = jax.random.key(0)
    params = nn.meta.unbox(model.init(key, jnp.zeros((1, 4), jnp.int32)))["params"]
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 31, (4, 7)).astype(np.int32)
    batch = {
        "decoder_input_tokens": np.roll(ids, 1, axis=1),
        "decoder_target_tokens": ids,
        "decoder_loss_weights": rng.integers(0, 3, (4, 7)).astype(np.float32),
        "decoder_segment_ids": np.ones((4, 7), np.int32),
        "decoder_positions": np.broadcast_to(np.arange(7, dtype=np.int32), (4, 7)),
        "source_ids": np.array([0, 2, 2, 0], np.int32),
    }
    logits = np.asarray(model.apply({"params": params}, batch["decoder_input_tokens"]), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, ids[..., None].astype(int), -1)[..., 0]
    return model, params, batch, nll, log_z


def test_sum_weight_and_sources(setup):
    model, params, batch, nll, _ = setup
    out = language_modelling(model=model, num_sources=3)(params, batch, jax.random.key(0))
    weights = batch["decoder_loss_weights"]
    assert float(out.sum) == pytest.approx((weights * nll).sum(), rel=1e-5)
    assert float(out.weight) == weights.sum()
    sums, counts = out.metrics["source_loss"]
    rows = (weights * nll).sum(-1)
    np.testing.assert_allclose(sums, [rows[0] + rows[3], 0.0, rows[1] + rows[2]], rtol=1e-5)
    np.testing.assert_allclose(counts, [weights[[0, 3]].sum(), 0, weights[[1, 2]].sum()])


def test_z_loss_is_added_and_reported_apart(setup):
    model, params, batch, nll, log_z = setup
    out = language_modelling(model=model, z_loss=0.1)(params, batch, jax.random.key(0))
    weights = batch["decoder_loss_weights"]
    assert float(out.sum) == pytest.approx((weights * (nll + 0.1 * log_z**2)).sum(), rel=1e-5)
    assert float(out.metrics["loss"][0]) == pytest.approx((weights * nll).sum(), rel=1e-5)
    assert float(out.metrics["z_loss"][0]) == pytest.approx(
        (weights * 0.1 * log_z**2).sum(), rel=1e-5
    )
