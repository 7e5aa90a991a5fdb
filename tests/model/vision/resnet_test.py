"""Residual networks: exact sizes, shapes, batch statistics, and blocks against their formula."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import axes
from espalier.model.low_rank import factors, lowrank
from espalier.model.low_rank.lowrank_conv import LowRankConv
from espalier.model.vision.resnet import Bottleneck, ResNet, ResNetConfig, Stem3x3, WideBlock

SMALL = ResNetConfig(num_classes=5, stages=(1, 2), widths=(8, 16), stem_width=8)


def wide(config=SMALL, block=WideBlock, **factories):
    return ResNet(config=config, stem=Stem3x3, block=block, final_norm=True, **factories)


def shapes_of(model, size):
    init = partial(model.init, jax.random.key(0))
    return nn.meta.unbox(jax.eval_shape(lambda: init(jnp.zeros((1, size, size, 3)))))


def initialised(module, x, *arguments):
    init = jax.jit(lambda: module.init(jax.random.key(0), x, *arguments))
    return nn.meta.unbox(init())


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def norm_size(*widths):
    return 2 * sum(widths)


def test_resnet_50_has_its_published_size():
    config = ResNetConfig(
        num_classes=1000, stages=(3, 4, 6, 3), widths=(256, 512, 1024, 2048), stem_width=64
    )
    found = shapes_of(ResNet(config=config), 224)
    assert count(found["params"]) == 25_557_032  # torchvision's
    assert count(found["batch_stats"]) == 53_120  # two for each of 26,560 normalised channels


def test_wrn_28_10_has_the_size_of_its_shapes():
    config = ResNetConfig(num_classes=100, stages=(4, 4, 4), widths=(160, 320, 640), stem_width=16)
    stages = 0
    for i, o in ((16, 160), (160, 320), (320, 640)):
        first = norm_size(i) + 9 * i * o + norm_size(o) + 9 * o * o + i * o
        stages += first + 3 * (2 * norm_size(o) + 2 * 9 * o * o)
    by_hand = 9 * 3 * 16 + stages + norm_size(640) + 640 * 100 + 100
    assert count(shapes_of(wide(config), 32)["params"]) == by_hand == 36_536_884


@pytest.mark.parametrize(
    ("model", "stem"), [(wide(), "stage_0"), (ResNet(config=SMALL), "stem")], ids=["wide", "v1.5"]
)
def test_images_of_any_size_become_logits(model, stem):
    variables = shapes_of(model, 16)
    assert stem in variables["batch_stats"]
    for size in (16, 20):
        logits = jax.eval_shape(model.apply, variables, jnp.ones((2, size, size, 3)))
        assert logits.shape == (2, 5) and logits.dtype == jnp.float32


def test_training_normalises_by_the_batch_and_evaluation_by_averages_of_it():
    model, x = wide(), jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    variables = initialised(model, x)
    stats = variables["batch_stats"]["stage_0"]["block_0"]["norm_0"]
    assert (stats["mean"] == 0).all() and (stats["var"] == 1).all()
    train = jax.jit(partial(model.apply, variables, train=True, mutable=["batch_stats"]))
    logits, written = train(x)
    stem = Stem3x3(SMALL).apply({"params": variables["params"]["stem"]}, x, True)
    found = written["batch_stats"]["stage_0"]["block_0"]["norm_0"]
    y = np.asarray(stem, np.float64)
    np.testing.assert_allclose(found["mean"], 0.1 * y.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found["var"], 0.9 + 0.1 * y.var((0, 1, 2)), atol=1e-5)
    # Averages do not depend on what else is in the batch; statistics of the batch do.
    evaluate, other = jax.jit(partial(model.apply, variables)), x.at[1:].multiply(3.0)
    np.testing.assert_allclose(evaluate(other)[0], evaluate(x)[0], atol=1e-5)
    assert float(jnp.abs(train(other)[0][0] - logits[0]).max()) > 1e-3


def test_a_wide_block_with_zero_convolutions_is_its_shortcut():
    block = WideBlock(SMALL, width=8, stride=1)
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    variables = initialised(block, x, False)
    variables["params"]["conv_1"]["kernel"] *= 0
    assert (block.apply(variables, x, False) == x).all()


def test_a_bottleneck_strides_in_its_3x3():
    block = Bottleneck(SMALL, width=16, stride=2)
    x = jax.random.normal(jax.random.key(1), (1, 4, 4, 8))
    variables = initialised(block, x, False)
    # A pixel that a strided 1x1 would throw away reaches the output through the window of the 3x3.
    variables["params"]["shortcut"]["kernel"] *= 0
    gradient = jax.jit(jax.grad(lambda x: block.apply(variables, x, False).sum()))(x)
    assert (jnp.abs(gradient).sum((0, 3)) > 0).all()


@pytest.mark.parametrize("block", [Bottleneck, WideBlock])
def test_by_default_blocks_are_factorised_and_stem_and_classifier_are_not(block):
    made = lowrank.Factorisation(rank=0.5)
    conv = partial(LowRankConv, factorisation=made)
    dense = partial(lowrank.LowRankDense, factorisation=made)
    params = shapes_of(wide(block=block, conv=conv, dense=dense), 8)["params"]
    assert "kernel" in params["stem"]["conv"] and "kernel" in params["head"]
    paths = {one.path for one in factors.find_factors(params)}
    convolutions = {"conv_0", "conv_1"} | ({"conv_2"} if block is Bottleneck else set())
    blocks = {"stage_0/block_0", "stage_1/block_0", "stage_1/block_1"}
    shortcuts = {"stage_1/block_0/shortcut"}  # the stem already gives the first stage's width
    assert paths == {f"{b}/{c}" for b in blocks for c in convolutions} | shortcuts


@pytest.mark.parametrize("block", [Bottleneck, WideBlock])
def test_scanned_blocks_are_the_unrolled_ones(block):
    """Losses, gradients and running averages, in factors, of equal parameters."""
    config = ResNetConfig(
        num_classes=3,
        stages=(4,),
        widths=(8,),
        stem_width=4,
        dtype="float64",
        param_dtype="float64",
    )
    made = lowrank.Factorisation(rank=0.5)
    factories = {
        "conv": partial(LowRankConv, factorisation=made),
        "dense": partial(lowrank.LowRankDense, factorisation=made),
    }
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3), "float64")

        def outcome(scan_blocks):
            own = dataclasses.replace(config, scan_blocks=scan_blocks)
            model = wide(own, block, **factories)
            variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), x))

            def loss(params):
                changed = {**variables, "params": params}
                out, written = model.apply(changed, x, train=True, mutable=["batch_stats"])
                return (out**2).sum(), written

            gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])
            return variables, gradients, jax.jit(model.apply)(variables, x)

        scanned, unrolled = outcome(True), outcome(False)
        assert jax.tree.structure(scanned) == jax.tree.structure(unrolled)
        assert "block_2" in scanned[1][0][1]["batch_stats"]["stage_0"]
        # The same variables, bit for bit, and results to rounding.
        jax.tree.map(np.testing.assert_array_equal, scanned[0], unrolled[0])
        close = partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)
        jax.tree.map(close, scanned[1:], unrolled[1:])


def text_of(model, x):
    def loss(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])[0].sum()

    return str(jax.make_jaxpr(jax.grad(loss))(shapes_of(model, x.shape[1]), x))


def test_programs_of_small_networks_and_of_observed_ones_are_not_scanned():
    x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    deep = dataclasses.replace(SMALL, stages=(1, 3))
    unrolled, scanned = (
        text_of(wide(dataclasses.replace(config, scan_blocks=scans)), x)
        for config, scans in ((SMALL, False), (SMALL, True))
    )
    assert scanned == unrolled  # stages of one or two blocks, as in every network for a CPU
    assert "scan[" in text_of(wide(deep), x) and "scan[" not in scanned
    model = wide(deep)
    states = jax.eval_shape(
        lambda v, x: model.apply(v, x, capture_intermediates=True, mutable=["intermediates"])[1],
        *(shapes_of(model, 8), x),
    )
    assert {"block_0", "block_1", "block_2"} <= states["intermediates"]["stage_1"].keys()


def test_wrn_28_10_has_half_the_convolutions_to_compile():
    config = ResNetConfig(num_classes=100, stages=(4, 4, 4), widths=(160, 320, 640), stem_width=16)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    scanned, unrolled = (
        text_of(wide(dataclasses.replace(config, scan_blocks=scans)), x).count(
            "conv_general_dilated["
        )
        for scans in (True, False)
    )
    # Three of each convolution: forward, and two gradients; the images have none.
    assert unrolled == 3 * (1 + 3 * 4 * 2) - 1
    assert scanned == 3 * (1 + 3 * 2 * 2) - 1


def test_sizes_that_make_no_network_are_told_together():
    with pytest.raises(ValueError) as caught:
        ResNetConfig(num_classes=0, stages=(1,), widths=(8, 8), stem_width=8, dtype="int8")
    for part in ("must have equal lengths", "must be positive", "dtype = 'int8'"):
        assert part in str(caught.value)


def test_logical_names_are_on_every_parameter():
    boxed = jax.eval_shape(lambda: wide().init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))))
    leaves = jax.tree.leaves(boxed["params"], is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata))
    assert all(isinstance(leaf, nn.LogicallyPartitioned) for leaf in leaves)
    convolutions = [leaf.names for leaf in leaves if len(leaf.names) == 4]
    assert set(convolutions) == {(None, None, axes.CHANNELS_IN, axes.CHANNELS)}
