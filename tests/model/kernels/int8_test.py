"""Int8 kernels: the error of their values and products against float64, and which parameters of a model have them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from espalier.model import attention, config, mlp, transformer
from espalier.model.adapters import adapter, lora
from espalier.model.kernels import int8, narrow, taps
from espalier.model.kernels.platform import use_reference_forms
from espalier.model.linear import Dense
from espalier.model.moe.moe import ExpertDense, MoeMlp
from espalier.model.transforms import int8_weights, layer_stack
from espalier.trainers import initialise, partitioning
from tests.drawn import drawn as drawn_params

RNG = np.random.default_rng(0)


def drawn(*shape, dtype=np.float32):
    """Normal numbers, with scales from 1e-6 to 1e3 by channel."""
    return (RNG.normal(size=shape) * 10.0 ** RNG.uniform(-6, 3, shape[-1])).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("of", ["numpy", "jax"])
def test_values_are_the_nearest_multiples_of_a_scale(of, dtype):
    w = np.array(jnp.asarray(drawn(3, 40, 30), dtype))
    w[1, :, 4] = 0
    q, scale = jax.jit(int8.quantise)(w) if of == "jax" else int8.quantise(w)
    assert isinstance(q, np.ndarray) == (of == "numpy")
    assert (q.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.float32, (3, 30))
    w64 = w.astype(np.float64)
    most = abs(w64).max(-2)
    np.testing.assert_allclose(scale, np.where(most == 0, 1, most / 127), rtol=2e-7)
    found = np.asarray(q, np.float64) * np.asarray(scale, np.float64)[:, None]
    # Half a step; float32 rounds the quotient, which is at most 127, by 2**-18.
    assert (abs(found - w64) <= most[:, None] / 254 * (1 + 2**-16)).all()
    largest = abs(np.asarray(q, int)).max(-2)
    assert (largest == np.where(most == 0, 0, 127)).all()  # the whole range is used


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_channel_that_is_not_finite_is_not_hidden(wrong):
    w = np.ones((4, 3), np.float32)
    w[2, 1] = wrong
    with np.errstate(invalid="ignore"):
        q, scale = int8.quantise(w)
    y = int8.matmul(jnp.ones((2, 4)), jnp.asarray(q), jnp.asarray(scale))
    assert np.isfinite(y).all(0).tolist() == [True, False, True]


@pytest.mark.parametrize("block", [2**20, 16])  # below and above the size of the product by blocks
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_against_float64(dtype, block, monkeypatch):
    monkeypatch.setattr(narrow, "_BLOCK", block)
    w = RNG.normal(size=(24, 50)).astype(np.float32)
    # Sums of x times 127 are beyond float16.
    x = jnp.asarray(RNG.uniform(20, 60, (2, 3, 24)), dtype)
    q, scale = int8.quantise(w)
    params = {"kernel": q, int8.SCALE: scale, "bias": np.ones(50, np.float32)}
    dense = Dense(features=50, axes=("embed", "mlp"), use_bias=True, dtype=dtype)
    y = jax.jit(dense.apply)({"params": params}, x)
    assert y.dtype == dtype
    wanted = np.asarray(x, np.float64) @ (q * scale.astype(np.float64)) + 1
    size = np.asarray(x, np.float64) @ abs(w) + 1
    assert (abs(np.asarray(y, np.float64) - wanted) <= 2 * jnp.finfo(dtype).eps * size).all()
    matrix = dense.apply({"params": params}, x, method=lambda m, x: (m(x), m.matrix())[1])
    np.testing.assert_array_equal(matrix, q * scale)


@pytest.mark.parametrize("form", ["blocks", "large blocks", "ragged_dot"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_products_of_experts_against_float64(dtype, form, monkeypatch):
    monkeypatch.setattr(narrow, "_BLOCK", 16 if form == "large blocks" else 2**20)
    w, sizes = RNG.normal(size=(3, 8, 5)).astype(np.float32), np.array([4, 0, 7])
    x = jnp.asarray(RNG.uniform(50, 150, (12, 8)), dtype)  # one row is no expert's
    q, scale = int8.quantise(w)
    dense = ExpertDense(
        num_experts=3, features=5, axes=("expert", "embed", "mlp"), dtype=jnp.dtype(dtype)
    )
    params = {"params": {"kernel": q, int8.SCALE: scale}}

    def run():
        return jax.jit(dense.apply)(params, x, jnp.asarray(sizes))

    if form == "ragged_dot":
        with use_reference_forms():
            y = run()
    else:
        y = run()
    assert y.dtype == dtype
    experts = np.repeat(np.arange(3), sizes)
    wanted = np.einsum(
        "rx,rxy->ry", np.asarray(x[:11], np.float64), (q * scale[:, None])[experts].astype(float)
    )
    np.testing.assert_allclose(
        np.asarray(y[:11], float), wanted, rtol=0, atol=8e2 * jnp.finfo(dtype).eps * 4
    )


SIZES = {"vocab_size": 64, "num_layers": 2, "embed_dim": 16, "num_heads": 4, "num_kv_heads": 2}


def made(*, experts=0, scanned=True, adapters=None, **settings):
    """A model of two layers, and its boxed abstract parameters."""
    attend = functools.partial(attention.Attention, qkv_bias=True, adapters=adapters)
    ffn = functools.partial(mlp.GatedMlp, adapters=adapters)
    if experts:
        ffn = functools.partial(MoeMlp, num_experts=experts, shared=mlp.GatedMlp, adapters=adapters)
    model = transformer.Transformer(
        config=config.TransformerConfig(**SIZES, mlp_dim=24, scan_layers=scanned),
        block=functools.partial(transformer.Block, attention=attend, mlp=ffn),
        **settings,
    )
    return model, initialise.abstract_variables(model)["params"]


def with_values(model):
    """The model's float parameters by path, far from uniform; biases and adapters are not 0."""
    params = nn.unbox(drawn_params(model, jnp.zeros((1, 4), jnp.int32)))
    keys = iter(jax.random.split(jax.random.key(1), 99))
    flat = traverse_util.flatten_dict(params, sep="/")
    return {path: x + 0.1 * jax.random.normal(next(keys), x.shape) for path, x in flat.items()}


def nested(flat):
    return traverse_util.unflatten_dict(flat, sep="/")


def quantised(flat):
    """The parameters with int8 kernels, and float ones of equal values."""
    whole = {
        p: x for path, value in flat.items() for p, x in int8_weights.quantised(path, value).items()
    }
    same = dict(whole)
    for path in whole:
        if path.endswith(int8.SCALE):
            kernel = path.replace(int8.SCALE, "kernel")
            same[kernel] = int8.dequantised(same[kernel], same.pop(path))
    return whole, same


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("experts", [0, 3])
def test_the_tree_is_as_large_as_it_should_be(experts, tied):
    L, D, F, N, V = 2, 16, 24, 4, 64
    _, boxed = made(experts=experts, tie_embeddings=tied)
    found = traverse_util.flatten_dict(int8_weights.declared(boxed), sep="/")
    attended = L * (2 * D * D + 2 * D * D // 2)  # query and out; key and value of half the heads
    channels = L * (D + D + D // 2 + D // 2)
    fed, outputs = (
        (experts + 1 if experts else 1) * L * 3 * D * F,
        (experts + 1 if experts else 1) * L * (F + F + D),
    )
    floats = (
        V * D * (1 if tied else 2) + (2 * L + 1) * D + L * (D + D // 2 + D // 2) + L * D * experts
    )
    sizes = {"int8": 0, "float32": 0}
    for box in found.values():
        sizes[box.value.dtype.name] += box.value.size
    assert sizes == {"int8": attended + fed, "float32": floats + channels + outputs}
    assert N * 4 == D
    small = {path.rpartition("/")[0] for path, box in found.items() if box.value.dtype == jnp.int8}
    assert small == {path.rpartition("/")[0] for path in found if path.endswith(int8.SCALE)}
    for path in small:
        kernel, scale = found[f"{path}/kernel"], found[f"{path}/{int8.SCALE}"]
        assert scale.names == (*kernel.names[:-2], kernel.names[-1])
    assert not any("router" in path or "embed" in path or "norm" in path for path in small)


@pytest.mark.parametrize(("experts", "scanned"), [(0, True), (0, False), (3, True)])
def test_logits_are_those_of_the_same_float_weights(experts, scanned):
    model, boxed = made(experts=experts, scanned=scanned)
    whole, same = quantised(with_values(model))
    shapes = {
        p: (x.value.shape, x.value.dtype)
        for p, x in traverse_util.flatten_dict(int8_weights.declared(boxed), sep="/").items()
    }
    assert {p: (x.shape, x.dtype) for p, x in whole.items()} == shapes
    ids_BT = jnp.asarray(RNG.integers(0, 64, (3, 9)))
    apply = jax.jit(lambda flat: model.apply({"params": nested(flat)}, ids_BT))
    found, wanted = apply(whole), apply(same)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * float(abs(wanted).max()))
    if scanned:  # layers are unrolled with their scales
        params = layer_stack.unroll(nested(whole), model.config)
        again = jax.jit(layer_stack.unrolled(model).apply)({"params": params}, ids_BT)
        np.testing.assert_allclose(again, found, atol=1e-5 * float(abs(wanted).max()))


@pytest.mark.parametrize(("experts", "dora"), [(0, False), (0, True), (3, False)])
def test_adapters_change_int8_weights(experts, dora):
    make = functools.partial(lora.Lora, rank=2, dora=dora)
    model, _ = made(experts=experts, adapters=adapter.named(lora=make))
    whole, same = quantised(with_values(model))
    assert not any("adapter_" in path for path in whole if path.endswith(int8.SCALE))
    ids_BT = jnp.asarray(RNG.integers(0, 64, (2, 5)))
    apply = jax.jit(lambda flat: model.apply({"params": nested(flat)}, ids_BT))
    wanted = apply(same)
    np.testing.assert_allclose(apply(whole), wanted, atol=2e-5 * float(abs(wanted).max()))
    base = {path: x for path, x in whole.items() if "adapter_" not in path}
    assert abs(apply(base) - wanted).max() > 0.1


@pytest.mark.parametrize(
    ("rules", "shape"),
    [("fsdp_tp", {"fsdp": 2, "tensor": 2}), ("fsdp_ep", {"fsdp": 2, "expert": 2})],
)
def test_a_mesh_computes_the_same(rules, shape):
    model, boxed = made(experts=4)
    whole, _ = quantised(with_values(model))
    ids_BT = jnp.asarray(RNG.integers(0, 64, (4, 6)))

    def apply(params):
        return jax.jit(lambda params: model.apply({"params": params}, ids_BT))(params)

    wanted = apply(nested(whole))
    mesh = partitioning.make_mesh(shape=shape, devices=jax.devices()[:4])
    named = partitioning.rules_named(rules)
    abstract = initialise.abstract_params(model, mesh, named, weights_dtype="int8")
    floats, finish = int8_weights.reading(abstract, jnp.float32)
    given = with_values(model)
    placed = {}
    for path, leaf in traverse_util.flatten_dict(floats, sep="/").items():
        placed |= finish(path, jax.device_put(given[path], leaf.sharding))
    for path, leaf in traverse_util.flatten_dict(abstract, sep="/").items():
        assert placed[path].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
        np.testing.assert_array_equal(placed[path], whole[path])
    kernel = placed["layers/block_0/mlp/up/kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) != kernel.shape
    with partitioning.use_mesh(mesh, named):
        np.testing.assert_allclose(apply(nested(placed)), wanted, atol=1e-4)


def test_what_has_no_kernel_or_needs_float_weights_is_refused():
    _, boxed = made()
    tables = {name: boxed[name] for name in ("token_embed", "final_norm")}
    with pytest.raises(int8.Int8WeightsError, match="WEIGHTS_DTYPE = 'int8' changes kernels"):
        int8_weights.declared(tables)
    q, scale = int8.quantise(np.ones((2, 3), np.float32))
    dense = Dense(features=3, axes=("embed", "mlp"))
    with taps.installed(object()), pytest.raises(int8.Int8WeightsError, match="remove WEIGHTS"):
        dense.apply({"params": {"kernel": q, int8.SCALE: scale}}, jnp.ones((1, 2)))
