"""The encoder-decoder: who sees whom, packed rows, layouts of layers, dropout, and its FLOPs."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import flops, rows
from espalier.model.attention import Attention, CrossAttention
from espalier.model.config import TransformerConfig
from espalier.model.kernels import platform
from espalier.model.kv_cache.full import FullCache
from espalier.model.mlp import GatedMlp, Mlp
from espalier.model.protocol import LanguageModel
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.t5.relative_bias import RelativeBias, bucket_table
from espalier.model.transformer import Block, Transformer
from espalier.model.transforms import layer_stack
from espalier.trainers import initialise, partitioning
from espalier.trainers.decoding.prefill import prefill, read
from espalier.trainers.inputs import InputsAndTargets
from espalier.trainers.objectives.lm import language_modelling
from tests.drawn import drawn

CONFIG = TransformerConfig(
    vocab_size=61, num_layers=2, embed_dim=16, num_heads=3, head_dim=8, mlp_dim=24
)


def make(rate=0.0, **changes):
    fields = {k: changes.pop(k) for k in list(changes) if k in EncoderDecoder.__dataclass_fields__}
    block = functools.partial(
        Block,
        attention=functools.partial(Attention, rope=None, scale=1.0, dropout=rate),
        cross_attention=functools.partial(CrossAttention, scale=1.0, dropout=rate),
        mlp=functools.partial(GatedMlp, activation="gelu", dropout=rate),
        dropout=rate,
    )
    config = dataclasses.replace(CONFIG, **changes)
    return EncoderDecoder(config=config, dropout=rate, **{"block": block, **fields})


@functools.cache
def init(model):
    return nn.meta.unbox(drawn(model, jnp.zeros((1, 4), jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, targets, inputs, **rows):
    return model.apply({"params": params}, targets, encoder_tokens_BS=inputs, **rows)


def tokens(shape, seed=1):
    return jax.random.randint(jax.random.key(seed), shape, 1, 61)


def segments_and_positions(lengths, width):
    """[1, width] of documents of these lengths, one after the other, and padding."""
    segments, positions = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
    start = 0
    for number, length in enumerate(lengths, 1):
        segments[0, start : start + length] = number
        positions[0, start : start + length] = np.arange(length)
        start += length
    return segments, positions


def test_it_is_a_language_model_of_inputs_and_targets():
    model = make(encoder_layers=3)
    assert isinstance(model, LanguageModel) and model.row is rows.INPUTS_AND_TARGETS
    assert len(model.layer_settings()) == 5 and model.cache_sizes(1)["num_heads"] == 3
    shapes = jax.tree.map(jnp.shape, init(model))
    layer = shapes["encoder"]["layers"]["block_0"]
    assert set(layer) == {"attention", "mlp", "norm", "mlp_norm"}
    assert layer["attention"]["out"]["kernel"] == (3, 24, 16)
    assert set(shapes["decoder"]["layers"]["block_0"]) == {
        *layer,
        "cross_attention",
        "cross_norm",
    }
    assert shapes["encoder"]["position_bias"]["embedding"] == (32, 3)


def test_packed_rows_equal_their_examples_alone():
    model = make()
    params = init(model)
    encoder, decoder = (4, 3, 5), (3, 4, 2)
    inputs, targets = tokens((1, 14)), tokens((1, 11), seed=2)
    encoder_segments, encoder_positions = segments_and_positions(encoder, 14)
    segments, positions = segments_and_positions(decoder, 11)
    packed = apply(
        model,
        params,
        targets,
        inputs,
        positions_BT=positions,
        segments_BT=segments,
        encoder_positions_BS=encoder_positions,
        encoder_segments_BS=encoder_segments,
    )
    for i in range(3):
        at, of = np.flatnonzero(segments[0] == i + 1), np.flatnonzero(encoder_segments[0] == i + 1)
        alone = apply(model, params, targets[:, at], inputs[:, of])
        np.testing.assert_allclose(packed[:, at], alone, rtol=0, atol=2e-6)


def test_the_decoder_is_causal_and_no_one_sees_padding():
    model = make()
    params = init(model)
    inputs, targets = tokens((1, 6)), tokens((1, 5), seed=2)
    rows = {"encoder_segments_BS": np.array([[1, 1, 1, 1, 0, 0]])}
    first = apply(model, params, targets, inputs, **rows)
    later = apply(model, params, targets.at[0, 3:].set(7), inputs, **rows)
    np.testing.assert_array_equal(first[:, :3], later[:, :3])
    assert np.abs(first[:, 3:] - later[:, 3:]).max() > 1e-3
    padded = apply(model, params, targets, inputs.at[0, 4:].set(7), **rows)
    np.testing.assert_array_equal(first, padded)
    seen = apply(model, params, targets, inputs.at[0, 3].set(7), **rows)
    assert np.abs(first[:, 0] - seen[:, 0]).max() > 1e-3


@pytest.mark.parametrize("changes", [{"scan_layers": False}, {"remat": "full"}])
def test_layouts_and_rematerialisation_compute_the_same(changes):
    plain, other = make(encoder_layers=3), make(encoder_layers=3, **changes)
    params = init(plain)
    if not changes.get("scan_layers", True):
        params_of = functools.partial(layer_stack.unroll, config=plain.config)
    else:
        params_of = lambda params: params  # noqa: E731
    inputs, targets = tokens((2, 7)), tokens((2, 5), seed=2)

    def loss(params, model, convert):
        logits = model.apply({"params": convert(params)}, targets, encoder_tokens_BS=inputs)
        return jnp.square(logits).mean()

    value = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    want = value(params, plain, lambda params: params)
    got = value(params, other, params_of)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(want[1]))


def test_dropout_acts_in_training_alone_and_on_every_place():
    length = 4
    batch = {
        **{
            name: jnp.ones((2, length), jnp.int32)
            for name in (
                "encoder_input_tokens",
                "encoder_segment_ids",
                "decoder_input_tokens",
                "decoder_target_tokens",
                "decoder_segment_ids",
            )
        },
        "decoder_loss_weights": jnp.ones((2, length)),
    }
    models = [make(0.0), make(0.5)]
    params = init(models[0])
    objectives = [jax.jit(language_modelling(model=model)) for model in models]
    losses = {
        (i, seed): objective(params, batch, None if seed is None else jax.random.key(seed)).sum
        for i, objective in enumerate(objectives)
        for seed in (None, 0, 1)
    }
    assert len({float(losses[0, seed]) for seed in (None, 0, 1)} | {float(losses[1, None])}) == 1
    assert len({float(losses[1, seed]) for seed in (None, 0, 1)}) == 3


def test_a_mesh_computes_the_same():
    model = make(num_heads=4, encoder_layers=3, vocab_size=64)
    params = init(model)
    inputs, targets = tokens((4, 8)), tokens((4, 6), seed=2)
    segments = jnp.asarray(np.repeat([[1, 1, 1, 2, 2, 0]], 4, axis=0))
    encoder_segments = jnp.asarray(np.repeat([[1, 1, 2, 2, 2, 2, 0, 0]], 4, axis=0))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits = model.apply(
            {"params": params},
            targets,
            segments_BT=segments,
            encoder_tokens_BS=inputs,
            encoder_segments_BS=encoder_segments,
        )
        return jnp.square(logits).mean()

    want = loss(params)
    mesh = partitioning.make_mesh(shape={"fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    rule_set = partitioning.rules_named("fsdp_tp")
    boxed = initialise.abstract_variables(model)["params"]
    shardings = initialise.param_shardings(boxed, mesh, rule_set)
    with partitioning.use_mesh(mesh, rule_set):
        got = loss(jax.device_put(params, shardings))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scan", [True, False])
def test_its_flops_are_what_its_trace_multiplies(scan):
    S, T, rows = 6, 4, 3
    model = make(encoder_layers=3, scan_layers=scan)
    variables = {"params": init(model)}
    inputs, targets = (jax.ShapeDtypeStruct((rows, n), jnp.int32) for n in (S, T))

    def forward(variables, targets, inputs):
        return model.apply(variables, targets, encoder_tokens_BS=inputs)

    with platform.use_reference_forms():
        traced = flops.traced_flops(forward, variables, targets, inputs)
    # The trace multiplies every query of the decoder with every key of it.
    unseen = T * 2 * 4 * (T - flops.mean_keys(T)) * 3 * 8
    row = InputsAndTargets(S, T).arrays(1)
    counted = model.forward_flops(row)
    assert rows * ((S + T) * counted + unseen) == pytest.approx(traced, rel=1e-12)
    assert model.forward_flops(row, variables) == counted


@pytest.mark.parametrize("bidirectional", [True, False])
def test_the_bias_of_positions_is_that_of_indices(bidirectional):
    module = RelativeBias(num_heads=4, bidirectional=bidirectional, num_buckets=8, max_distance=10)
    variables = nn.meta.unbox(module.init(jax.random.key(0), 3, 3))
    bias = module.apply(variables, 20, 25)
    table = variables["params"]["embedding"]
    buckets = bucket_table(bidirectional=bidirectional, num_buckets=8, max_distance=10)
    difference = np.clip(np.arange(25)[None] - np.arange(20)[:, None], -10, 10)
    want = np.asarray(table)[np.asarray(buckets)[difference + 10]]
    np.testing.assert_array_equal(bias.by_index_1NTS[0], want.transpose(2, 0, 1))
    at_q, at_k = jnp.arange(20)[None], jnp.arange(25)
    np.testing.assert_array_equal(bias.at(at_q, at_k[None]), bias.by_index_1NTS)
    # Two pairs of heads with keys in orders of their own.
    two = bias.at(at_q, jnp.stack([at_k, at_k[::-1]])[None])
    np.testing.assert_array_equal(two[:, :2], bias.by_index_1NTS[:, :2])
    np.testing.assert_array_equal(two[:, 2:], bias.by_index_1NTS[:, 2:, :, ::-1])
    # Each number is read as often as its bucket occurs.
    counts = jax.grad(lambda v: module.apply(v, 20, 25).by_index_1NTS.sum())(variables)
    occurs = np.bincount(np.asarray(buckets)[difference + 10].ravel(), minlength=8)
    np.testing.assert_array_equal(counts["params"]["embedding"], np.repeat(occurs[:, None], 4, 1))


def test_an_int8_cache_has_the_encoders_keys_and_values_too():
    """Decoding over it is decoding over the numbers that it stands for, which are within half a step of the keys."""
    model = make(scan_layers=False)
    params = init(model)
    inputs, start = tokens((2, 9)), jnp.zeros((2, 1), jnp.int32)
    given = {"encoder_tokens_BS": inputs, "encoder_segments_BS": jnp.ones_like(inputs)}
    policy, ones = FullCache(), jnp.ones(2, jnp.int32)

    @functools.partial(jax.jit, static_argnums=0)
    def caches(dtype):
        return prefill(
            model, params, policy, start, ones, room=2, cache_dtype=dtype, encoder=given
        )[1]

    @jax.jit
    def after(caches):
        return model.apply({"params": params}, read(model, params, policy, tokens((2, 1)), jnp.ones((2, 1), jnp.int32), caches).hidden_BTD, method="logits")  # fmt: skip

    def meant(cache):
        pairs = zip(cache.encoded.keys_values, cache.encoded.scales, strict=True)
        floats = tuple(x.astype(jnp.float32) * scale[..., None] for x, scale in pairs)
        return cache.replace(encoded=cache.encoded.replace(keys_values=floats, scales=None))

    whole, narrow = caches(None), caches("int8")
    for cache, exact in zip(narrow, whole, strict=True):
        assert {x.dtype for x in cache.encoded.keys_values} == {jnp.dtype(jnp.int8)}
        held, scales = meant(cache).encoded.keys_values, cache.encoded.scales
        for x, y, scale in zip(held, exact.encoded.keys_values, scales, strict=True):
            assert (jnp.abs(x - y) <= scale[..., None] / 2 + 1e-6).all()
    np.testing.assert_allclose(after(narrow), after([*map(meant, narrow)]), atol=1e-5)
    assert np.abs(after(narrow) - after(whole)).max() < 0.05 * np.abs(after(whole)).max()
    half = caches("bfloat16")[0].encoded
    assert half.keys_values[0].dtype == jnp.bfloat16 and half.scales is None


def test_settings_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="max_distance above"):
        bucket_table(bidirectional=True, num_buckets=32, max_distance=8)
    with pytest.raises(ValueError, match="reads rows with inputs"):
        model = make()
        model.apply({"params": init(model)}, tokens((1, 3)))
    with pytest.raises(ValueError, match="no cross-attention"):
        init(make(block=functools.partial(Block, layout="parallel")))
    with pytest.raises(ValueError, match="bidirectional"):
        config = dataclasses.replace(CONFIG, layer_pattern=("bidirectional",))
        Transformer(config=config).init(jax.random.key(0), tokens((1, 3)))


def test_version_1_0_has_one_relu_matrix_and_scales_its_tied_logits():
    block = functools.partial(
        Block,
        attention=functools.partial(Attention, rope=None, scale=1.0),
        cross_attention=functools.partial(CrossAttention, scale=1.0),
        mlp=functools.partial(Mlp, activation="relu"),
    )
    model = make(block=block, tie_embeddings=True, logit_scale=0.25)
    params = init(model)
    assert "lm_head" not in params
    assert set(params["encoder"]["layers"]["block_0"]["mlp"]) == {"up", "down"}
    logits = apply(model, params, tokens((1, 3)), tokens((1, 4)))
    whole = apply(make(block=block, tie_embeddings=True), params, tokens((1, 3)), tokens((1, 4)))
    np.testing.assert_allclose(logits, 0.25 * whole, rtol=1e-6)
