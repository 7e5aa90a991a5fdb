"""The forward pass and the loss that objectives share."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model.kernels import cross_entropy
from espalier.model.kernels.cross_entropy import map_tokens
from espalier.model.protocol import OfLayers
from espalier.trainers.objectives.forward import Forward, forward, forward_objective, frozen_forward
from espalier.trainers.step import make_train_step
from espalier.trainers.train_state import TrainState

BATCH = {
    "decoder_input_tokens": jnp.array([[1, 2, 0], [3, 1, 2]]),
    "decoder_segment_ids": jnp.ones((2, 3), jnp.int32),
    "decoder_loss_weights": jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]),
    "source_ids": jnp.array([1, 0]),
}
WEIGHTS = np.asarray(BATCH["decoder_loss_weights"])


@dataclasses.dataclass(frozen=True)
class _Config:
    scan_layers: bool = False


class Model(OfLayers, nn.Module):
    """Sows a loss and a metric, counts its batches, and draws."""

    config: _Config

    def layer_settings(self):
        return ()

    @nn.compact
    def hidden(self, tokens_BT, *, positions_BT=None, segments_BT=None):
        del positions_BT, segments_BT
        scale = self.param("scale", nn.initializers.ones, ())
        if self.is_mutable_collection("batches"):
            self.put_variable("batches", "seen", self.get_variable("batches", "seen") + 1.0)
        self.sow("losses", "balance", 0.5 * scale)
        self.sow("metrics", "load", jnp.array([2.0, 4.0]))
        drawn = self.make_rng("dropout") if self.has_rng("dropout") else None
        noise = 0.0 if drawn is None else jax.random.uniform(drawn)
        return scale * tokens_BT + noise


MODEL = Model(config=_Config())
PARAMS = {"scale": jnp.array(3.0)}
COUNTS = {"batches": {"seen": jnp.array(4.0)}}


def test_training_collects_and_evaluation_does_not():
    out = forward(MODEL, PARAMS, BATCH, jax.random.key(0), COUNTS)
    assert float(out.updates["batches"]["seen"]) == 5.0
    assert {"losses", "metrics", "batches"} == set(out.written)
    assert not np.array_equal(out.output, 3.0 * BATCH["decoder_input_tokens"])  # drawn
    out = forward(MODEL, PARAMS, BATCH, None, COUNTS)
    assert out.updates == {} and set(out.written) == {"losses"}
    np.testing.assert_array_equal(out.output, 3.0 * BATCH["decoder_input_tokens"])


def test_a_frozen_model_has_no_gradient_and_collects_nothing():
    def loss(params):
        out = frozen_forward(MODEL, params, BATCH)
        assert out.written == {}
        return out.output.sum()

    assert float(jax.grad(loss)(PARAMS)["scale"]) == 0.0


def test_the_mean_loss_of_tokens_with_all_that_belongs_to_it():
    losses_BT = jnp.arange(6.0).reshape(2, 3)
    out = forward(MODEL, PARAMS, BATCH, jax.random.key(0), COUNTS)
    extra = {"more": (jnp.array(1.0), jnp.array(2.0))}
    got = out.mean_loss(losses_BT, BATCH["decoder_loss_weights"], metrics=extra, num_sources=3)
    weighted = np.asarray(losses_BT) * WEIGHTS
    assert float(got.weight) == 4.0
    assert float(got.sum) == weighted.sum() + 4.0 * 0.5 * 3.0  # with the balance loss
    assert float(got.metrics["loss"][0]) == weighted.sum()
    assert float(got.metrics["auxiliary_loss"][0]) == 6.0
    assert got.metrics["more"] == extra["more"]
    np.testing.assert_array_equal(got.metrics["source_loss"][0], [3.0 + 5.0, 0.0 + 1.0, 0.0])
    np.testing.assert_array_equal(got.metrics["source_loss"][1], [2.0, 2.0, 0.0])
    np.testing.assert_array_equal(got.metrics["load"][0] / got.metrics["load"][1], [2.0, 4.0])
    assert float(got.variables["batches"]["seen"]) == 5.0
    other = out.mean_loss(losses_BT, BATCH["decoder_loss_weights"], total=jnp.array(10.0))
    assert float(other.sum) == 16.0 and float(other.metrics["loss"][0]) == weighted.sum()
    assert "source_loss" not in other.metrics


def test_rows_of_several_values_are_counted_for_their_source():
    out = forward(MODEL, PARAMS, BATCH, None, COUNTS)
    weights_P = jnp.array([1.0, 1.0, 1.0, 0.0])  # two pairs of each row
    got = out.mean_loss(jnp.array([1.0, 2.0, 3.0, 4.0]), weights_P, num_sources=2)
    np.testing.assert_array_equal(got.metrics["source_loss"][0], [3.0, 3.0])
    np.testing.assert_array_equal(got.metrics["source_loss"][1], [1.0, 2.0])


def test_an_objective_of_a_forward_pass_trains_and_keeps_what_the_model_wrote():
    def loss(out: Forward, extras):
        assert extras is None
        return out.mean_loss(out.output - 1.0, out.batch["decoder_loss_weights"])

    optimizer = optax.sgd(0.1)
    step = make_train_step(loss_fn=forward_objective(MODEL, loss), optimizer=optimizer)
    state = TrainState(
        step=jnp.array(0),
        params=PARAMS,
        opt_state=optimizer.init(PARAMS),
        ema_params=None,
        variables=COUNTS,
    )
    new, metrics = step(state, BATCH)
    tokens = (np.asarray(BATCH["decoder_input_tokens"]) * WEIGHTS).sum()
    np.testing.assert_allclose(
        new.params["scale"], 3.0 - 0.1 * (tokens + 4.0 * 0.5) / 4.0, rtol=1e-6
    )
    assert float(new.variables["batches"]["seen"]) == 5.0
    assert "auxiliary_loss" in metrics


@pytest.mark.parametrize("chunk", [1, 3, 7, 512])
def test_chunks_of_tokens_give_what_all_at_once_do(chunk, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 4 * 11)  # four tokens of 11 logits
    keys = jax.random.split(jax.random.key(0), 3)
    h_TD, other_TD = (jax.random.normal(key, (10, 5)) for key in keys[:2])
    head_VD = jax.random.normal(keys[2], (11, 5))

    def divergence(h_CD, other_CD, head_VD):
        log_p, log_q = (jax.nn.log_softmax(x @ head_VD.T) for x in (h_CD, other_CD))
        return (jnp.exp(log_q) * (log_q - log_p)).sum(-1)

    def chunked(h_TD, head_VD):
        return map_tokens(
            lambda h, other: divergence(h, other, head_VD), h_TD, other_TD, vocab=11, chunk=chunk
        )

    np.testing.assert_allclose(
        chunked(h_TD, head_VD), divergence(h_TD, other_TD, head_VD), rtol=1e-5, atol=1e-6
    )
    got = jax.grad(lambda *x: chunked(*x).sum(), argnums=(0, 1))(h_TD, head_VD)
    want = jax.grad(lambda h, w: divergence(h, other_TD, w).sum(), argnums=(0, 1))(h_TD, head_VD)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_a_chunk_that_is_no_chunk_is_refused():
    with pytest.raises(ValueError, match="chunk = 0"):
        map_tokens(lambda x: x, jnp.zeros((2, 3)), vocab=4, chunk=0)


def test_a_largest_value_is_reported_of_the_worst_layer_too():
    def layer(load, largest):
        return {"mlp": {"share": (jnp.array(load),), "share_max": (jnp.array(largest),)}}

    sown = {"layers": {"block_0": layer(1.0, 0.25), "block_1": layer(2.0, 0.75)}}
    out = Forward(
        model=MODEL, variables={}, batch=BATCH, output=None, written={"metrics": sown}
    ).loss_out(jnp.array(1.0), jnp.array(2.0), {})
    values = {name: float(total / weight) for name, (total, weight) in out.metrics.items()}
    assert values == {"mlp/share": 1.5, "mlp/share_max": 0.5, "mlp/share_max_worst_layer": 0.75}
