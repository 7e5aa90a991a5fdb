"""The language-modelling loss against numpy: weights, sources, z-loss, label smoothing."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.mlp import GatedMlp
from espalier.model.transformer import Block, Transformer
from espalier.model.transforms import layer_stack
from espalier.trainers.objectives.lm import language_modelling
from espalier.trainers.step import make_train_step
from espalier.trainers.train_state import TrainState
from tests.drawn import drawn


@pytest.fixture(scope="module")
def setup():
    config = TransformerConfig(vocab_size=31, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8)
    model = Transformer(config=config, logit_scale=3.0)
    params = nn.meta.unbox(drawn(model, jnp.zeros((1, 4), jnp.int32)))
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
    apply = jax.jit(model.apply)
    logits = np.asarray(apply({"params": params}, batch["decoder_input_tokens"]), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, ids[..., None].astype(int), -1)[..., 0]
    return model, params, batch, nll, log_z


@pytest.fixture(scope="module")
def logits_of(setup):
    """The logits of one sequence, compiled once for each length."""
    model, params, *_ = setup
    apply = jax.jit(model.apply)
    return lambda ids: apply({"params": params}, ids[None].astype(np.int32))[0]


def test_sum_weight_and_sources(setup):
    model, params, batch, nll, _ = setup
    loss = jax.jit(language_modelling(model=model, num_sources=3))
    out = loss(params, batch, jax.random.key(0))
    weights = batch["decoder_loss_weights"]
    assert float(out.sum) == pytest.approx((weights * nll).sum(), rel=1e-5)
    assert float(out.weight) == weights.sum()
    sums, counts = out.metrics["source_loss"]
    rows = (weights * nll).sum(-1)
    np.testing.assert_allclose(sums, [rows[0] + rows[3], 0.0, rows[1] + rows[2]], rtol=1e-5)
    np.testing.assert_allclose(counts, [weights[[0, 3]].sum(), 0, weights[[1, 2]].sum()])


def test_z_loss_is_added_and_reported_apart(setup):
    model, params, batch, nll, log_z = setup
    out = jax.jit(language_modelling(model=model, z_loss=0.1))(params, batch, jax.random.key(0))
    weights = batch["decoder_loss_weights"]
    assert float(out.sum) == pytest.approx((weights * (nll + 0.1 * log_z**2)).sum(), rel=1e-5)
    assert float(out.metrics["loss"][0]) == pytest.approx((weights * nll).sum(), rel=1e-5)
    assert float(out.metrics["z_loss"][0]) == pytest.approx(
        (weights * 0.1 * log_z**2).sum(), rel=1e-5
    )


def test_label_smoothing_spreads_a_share_over_the_other_tokens(setup):
    """T5X's loss, without its constant; the metric 'loss' has no smoothing."""
    model, params, batch, nll, _ = setup
    weights, share = batch["decoder_loss_weights"], 0.2

    def expected(params):
        logits = model.apply({"params": params}, batch["decoder_input_tokens"])
        target = jax.nn.one_hot(batch["decoder_target_tokens"], 31)
        spread = (1 - share) * target + share / 30 * (1 - target)
        return -(weights * (spread * jax.nn.log_softmax(logits)).sum(-1)).sum()

    loss = language_modelling(model=model, label_smoothing=share)
    out = jax.jit(loss)(params, batch, jax.random.key(0))
    assert float(out.sum) == pytest.approx(float(jax.jit(expected)(params)), rel=1e-5)
    assert float(out.metrics["loss"][0]) == pytest.approx((weights * nll).sum(), rel=1e-5)
    got = jax.jit(jax.grad(lambda params: loss(params, batch, jax.random.key(0)).sum))(params)
    want = jax.jit(jax.grad(expected))(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4), got, want)
    with pytest.raises(ValueError, match=r"1.0 must lie in \[0, 1\)"):
        language_modelling(model=model, label_smoothing=1.0)
    with pytest.raises(ValueError, match="does not support logit_softcap = 9.0"):
        language_modelling(model=model.clone(logit_softcap=9.0), label_smoothing=share)


SEQUENCES = [5, 2, 4, 3, 6]  # tokens of each


def _sequences():
    """(input ids, target ids, loss weights) of each sequence; the last one has nothing to learn."""
    rng = np.random.default_rng(1)
    found = []
    for i, length in enumerate(SEQUENCES):
        ids = rng.integers(1, 31, length)
        weights = rng.choice([0.0, 0.5, 1.0, 2.0], length)
        weights[-1] = 1.0
        found.append((np.roll(ids, 1), ids, weights * (i < 4)))
    return found


def _packed(rows, length):
    """A batch whose rows hold these sequences, by number."""
    sequences = _sequences()
    names = ("input_tokens", "target_tokens", "segment_ids", "positions")
    batch = {f"decoder_{name}": np.zeros((len(rows), length), np.int32) for name in names}
    batch["decoder_loss_weights"] = np.zeros((len(rows), length), np.float32)
    batch["source_ids"] = np.zeros(len(rows), np.int32)
    for b, row in enumerate(rows):
        at = 0
        for k, number in enumerate(row, 1):
            read, learnt, weights = sequences[number]
            place = (b, slice(at, at + len(read)))
            batch["decoder_input_tokens"][place] = read
            batch["decoder_target_tokens"][place] = learnt
            batch["decoder_loss_weights"][place] = weights
            batch["decoder_segment_ids"][place] = k
            batch["decoder_positions"][place] = np.arange(len(read))
            at += len(read)
    return batch


PACKINGS = {
    "packed": ([[0, 1], [3, 2], [4], []], 8),
    "one in a row": ([[0], [1], [2], [3], [4], []], 6),
    "all in one row": ([[4, 2, 0, 3, 1], []], 24),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_loss_is_normalised_by_sequences_or_places_however_they_are_packed(
    setup, logits_of, packing
):
    """Against a float64 sum over sequences, with z-loss and smoothing, which have the same weights."""
    model, params, *_ = setup
    losses, nlls, tokens, learnt = [], [], 0.0, 0.0
    for read, target, weights in _sequences():
        logits = np.asarray(logits_of(read), np.float64)
        log_z = np.log(np.exp(logits).sum(-1))
        target_logit = logits[np.arange(len(target)), target]
        nll = log_z - target_logit
        others = (logits.sum(-1) - target_logit) / 30
        per_token = nll + 0.1 * log_z**2 + 0.2 * (target_logit - others)
        tokens += (weights * per_token).sum()
        learnt += weights.sum()
        if weights.any():
            losses.append((weights * per_token).sum() / weights.sum())
            nlls.append((weights * nll).sum() / weights.sum())
    rows, length = PACKINGS[packing]
    batch = _packed(rows, length)
    of = {
        "AVERAGE_PER_SEQUENCE": (sum(losses), 4.0),
        "NUM_REAL_TARGET_TOKENS": (tokens, learnt),
        "NUM_TOTAL_TARGET_TOKENS": (tokens, float(len(rows) * length)),
    }
    for name, (total, weight) in of.items():
        loss = language_modelling(
            model=model, z_loss=0.1, label_smoothing=0.2, loss_normalizing_factor=name
        )
        out = jax.jit(loss)(params, batch, jax.random.key(0))
        assert float(out.sum) == pytest.approx(total, rel=1e-5), name
        assert float(out.weight) == pytest.approx(weight, rel=1e-6), name
        assert float(out.metrics["loss"][1]) == pytest.approx(learnt)  # per token in all
        if name == "AVERAGE_PER_SEQUENCE":
            got, count = out.metrics["loss_per_sequence"]
            assert float(got / count) == pytest.approx(np.mean(nlls), rel=1e-5)


def test_the_mean_over_sequences_does_not_depend_on_microbatches(setup):
    model, params, *_ = setup
    loss_fn = language_modelling(model=model, loss_normalizing_factor="AVERAGE_PER_SEQUENCE")
    optimizer = optax.sgd(1.0)
    batch = _packed(*PACKINGS["packed"])
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    found = []
    for microbatches in (1, 2, 4):  # of which the last has a part without sequences
        step = make_train_step(loss_fn=loss_fn, optimizer=optimizer, microbatches=microbatches)
        found.append(jax.jit(step)(state, batch)[0].params)
    for other in found[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found[0], other)

    def mean(params):
        means = []
        for read, target, weights in _sequences()[:4]:
            logits = model.apply({"params": params}, read[None].astype(np.int32))[0]
            nll = -jax.nn.log_softmax(logits)[np.arange(len(target)), target]
            means.append((weights * nll).sum() / weights.sum())
        return sum(means) / 4

    gradient = jax.jit(jax.grad(mean))(params)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(old - new, g, atol=1e-5),
        found[0],
        params,
        gradient,
    )


@pytest.mark.parametrize("factor", [None, 233472, "AVERAGE"])
def test_a_normalisation_that_microbatches_cannot_have_is_refused(setup, factor):
    with pytest.raises(ValueError, match=r"LOSS_NORMALIZING_FACTOR = .* must be one of NUM_REAL_T"):
        language_modelling(model=setup[0], loss_normalizing_factor=factor)


class _Sowing(Block):
    """A block with an auxiliary loss, and dropout where there is an rng for it."""

    @nn.compact
    def __call__(self, x_BTD, **context):
        y_BTD, cache = super().__call__(x_BTD, **context)
        self.sow("losses", "constant", jnp.float32(0.25))
        self.sow("losses", "size", (y_BTD**2).mean())
        return nn.Dropout(0.5, deterministic=not self.has_rng("dropout"))(y_BTD), cache


def test_sown_losses_are_added_per_token(setup):
    _, _, batch, _, _ = setup
    config = TransformerConfig(vocab_size=31, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=8)
    model, plain = Transformer(config=config, block=_Sowing), Transformer(config=config)
    init = jax.jit(plain.init)
    params = nn.meta.unbox(init(jax.random.key(0), batch["decoder_input_tokens"]))["params"]
    losses = [language_modelling(model=m) for m in (model, plain)]
    out, want = (jax.jit(loss)(params, batch, None) for loss in losses)
    weight = batch["decoder_loss_weights"].sum()
    watched = lambda module, method: type(module) is Block  # noqa: E731
    watching = jax.jit(functools.partial(plain.apply, capture_intermediates=watched))
    _, kept = watching({"params": params}, batch["decoder_input_tokens"])
    out_LBTD = jax.tree.leaves(kept["intermediates"])[0]
    added = weight * (2 * 0.25 + (np.asarray(out_LBTD) ** 2).mean((1, 2, 3)).sum())
    assert float(out.sum - want.sum) == pytest.approx(added, rel=1e-4)
    assert float(out.metrics["auxiliary_loss"][0]) == pytest.approx(added, rel=1e-4)
    assert "auxiliary_loss" not in want.metrics
    gradient = jax.jit(jax.grad(lambda p: losses[0](p, batch, None).sum))(params)
    plain_gradient = jax.jit(jax.grad(lambda p: losses[1](p, batch, None).sum))(params)
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), gradient, plain_gradient)
    assert max(jax.tree.leaves(difference["layers"])) > 1e-3


def test_dropout_draws_from_the_rng_of_the_step(setup):
    _, _, batch, _, _ = setup
    config = TransformerConfig(vocab_size=31, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=8)
    model = Transformer(config=config, block=_Sowing)
    init = jax.jit(model.init)
    params = nn.meta.unbox(init(jax.random.key(0), batch["decoder_input_tokens"]))["params"]
    loss = jax.jit(language_modelling(model=model))
    keys = (None, None, jax.random.key(1), jax.random.key(1), jax.random.key(2))
    sums = [float(loss(params, batch, key).sum) for key in keys]
    assert sums[0] == sums[1] and sums[2] == sums[3]
    assert len(set(sums)) == 3


class _Watched(GatedMlp):
    """Sows what it computes as metrics: a number and a vector."""

    @nn.compact
    def __call__(self, x_BTD, **context):
        y_BTD = super().__call__(x_BTD, **context)
        self.sow("metrics", "size", (y_BTD**2).mean())
        self.sow("metrics", "by_width", y_BTD.mean((0, 1)))
        return y_BTD


@pytest.mark.parametrize("pattern", [("full",), ("full", "full_nope")])
def test_sown_metrics_are_means_over_layers_in_training_alone(setup, pattern):
    _, _, batch, _, _ = setup
    config = TransformerConfig(
        **{"vocab_size": 31, "num_layers": 4, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8},
        layer_pattern=pattern,
    )
    model = Transformer(config=config, block=functools.partial(Block, mlp=_Watched))
    ids = batch["decoder_input_tokens"]
    params = nn.meta.unbox(drawn(model, ids))
    plain = layer_stack.unrolled(model)
    loss = jax.jit(language_modelling(model=model))
    out = loss(params, batch, jax.random.key(0))
    unrolled = jax.jit(language_modelling(model=plain))(
        layer_stack.unroll(params, config), batch, jax.random.key(0)
    )
    watching = functools.partial(
        plain.apply,
        capture_intermediates=lambda module, method: (
            isinstance(module, _Watched) and method == "__call__"
        ),
        mutable=["intermediates"],
    )
    _, kept = jax.jit(watching)(
        {"params": layer_stack.unroll(params, config)},
        ids,
        positions_BT=batch["decoder_positions"],
        segments_BT=batch["decoder_segment_ids"],
    )
    outs_LBTD = np.stack(jax.tree.leaves(kept["intermediates"]))
    assert len(outs_LBTD) == 2 * 4  # what a call returns, and that of its parent within: the same
    for metrics in (out.metrics, unrolled.metrics):
        size, weight = metrics["mlp/size"]
        assert float(size / weight) == pytest.approx((outs_LBTD**2).mean(), rel=1e-4)
        by_width, weight_D = metrics["mlp/by_width"]
        np.testing.assert_allclose(by_width / weight_D, outs_LBTD.mean((0, 1, 2)), atol=1e-5)
        assert float(weight) == float(weight_D[0]) == batch["decoder_loss_weights"].sum()
    assert set(loss(params, batch, None).metrics) == {"loss"}
