"""Classification: the loss in float64, rows of no weight, batch statistics through step and evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.vision.resnet import ResNet, ResNetConfig, Stem3x3, WideBlock
from espalier.trainers import partitioning
from espalier.trainers.batches import global_batch
from espalier.trainers.evaluate import evaluate
from espalier.trainers.inputs import Images
from espalier.trainers.objectives.classification import classification
from espalier.trainers.optim import optimizers, schedules
from espalier.trainers.recipe import Recipe

ROWS, SIZE = 8, 8
CONFIG = ResNetConfig(num_classes=3, stages=(1,), widths=(8,), stem_width=8)
MODEL = ResNet(config=CONFIG, stem=Stem3x3, block=WideBlock, final_norm=True)


class Logits:
    """A model whose images are its logits."""

    def row_context(self, variables, batch):
        return None

    def apply(self, variables, images, *, train, mutable, rngs, method):
        del train, rngs
        assert method is None
        return images, {name: variables[name] for name in mutable if name in variables}


def batch_of(logits, labels, weights):
    return {
        "images": jnp.asarray(logits, jnp.float32),
        "labels": jnp.asarray(labels),
        "weights": jnp.asarray(weights, jnp.float32),
    }


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_cross_entropy_with_a_smoothed_label(smoothing):
    logits = np.random.default_rng(0).normal(size=(4, 3))
    labels, weights = np.array([0, 2, 1, 1]), np.array([1.0, 1.0, 0.0, 0.5])
    out = classification(model=Logits(), label_smoothing=smoothing)(
        {}, batch_of(logits, labels, weights), None
    )
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    target = (1 - smoothing) * np.eye(3)[labels] + smoothing / 3
    assert float(out.sum) == pytest.approx((-(target * log_p).sum(-1) * weights).sum(), rel=1e-5)
    assert float(out.weight) == 2.5
    right = ((logits.argmax(-1) == labels) * weights).sum()
    assert float(out.metrics["accuracy"][0]) == pytest.approx(right)
    plain = (-log_p[np.arange(4), labels] * weights).sum()
    assert float(out.metrics["loss"][0]) == pytest.approx(plain, rel=1e-5)


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match="label_smoothing = 1.0 must lie in"):
        classification(model=MODEL, label_smoothing=1.0)


class Split:
    """Five images in batches of eight: three rows of padding."""

    name, num_steps, bytes_per_token = "split", 1, 0.0
    batch_size, length = ROWS, 1

    def __init__(self, padding):
        self.padding = padding

    def batch(self, step, lo, hi):
        rng = np.random.default_rng(0)
        images = rng.normal(size=(ROWS, SIZE, SIZE, 3)).astype(np.float32)
        images[5:] = self.padding
        weights = (np.arange(ROWS) < 5).astype(np.float32)
        whole = {
            "images": images,
            "labels": np.arange(ROWS, dtype=np.int32) % 3,
            "weights": weights,
        }
        return {name: value[lo:hi] for name, value in whole.items()}


def recipe(**given):
    return Recipe(
        model=MODEL,
        inputs=Images(SIZE),
        batch_size=ROWS,
        objective=classification,
        optimizer=optimizers.sgd,
        learning_rate=schedules.constant(peak=0.1),
        **given,
    )


def run(mesh, padding=0.0, steps=2, **given):
    """(state, evaluation) after steps on the same batch."""
    count = int(np.prod(list(mesh.values())))
    program = recipe(mesh=mesh, **given).program(devices=jax.devices()[:count])
    with partitioning.use_mesh(program.mesh, program.rules):
        state, split, compiled = program.init(), Split(padding), program.steps(1)
        for _ in range(steps):
            batch = global_batch(split, 0, program.batch_sharding)
            state, _ = compiled.train(state, batch)
        found = evaluate(
            compiled.evaluate,
            state.params,
            split,
            program.batch_sharding,
            variables=state.variables,
            unit="images",
        )
    return jax.device_get(state), found


@pytest.fixture(scope="module")
def alone():
    return run({"data": 1})


def test_rows_of_weight_zero_change_nothing_in_evaluation(alone):
    _, found = alone
    assert found["images"] == 5 and "perplexity" not in found
    assert set(found) == {"loss", "accuracy", "images"}
    _, other = run({"data": 1}, padding=3.0, steps=0)
    _, plain = run({"data": 1}, padding=0.0, steps=0)
    assert other == plain


def test_a_step_keeps_the_statistics_of_its_batch(alone):
    state, _ = alone
    stats = state.variables["batch_stats"]["norm"]
    assert (stats["mean"] != 0).any() and (stats["var"] != 1).any()


def test_statistics_are_of_the_whole_batch_on_any_mesh(alone):
    state, found = alone
    other, elsewhere = run({"fsdp": 8})
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)
    assert elsewhere == pytest.approx(found, rel=1e-4)
