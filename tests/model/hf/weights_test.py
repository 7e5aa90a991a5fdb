"""Weights of Hugging Face models there and back, bit for bit, and tensors that do not fit."""

import time

import jax
import ml_dtypes
import numpy as np
import pytest

from espalier.model.hf import load as loading
from espalier.model.hf import registry
from espalier.model.hf.description import native_shapes
from espalier.model.hf.family import MismatchedTensors
from espalier.model.hf.plan import plan
from espalier.model.transforms import layer_stack
from espalier.trainers import initialise, partitioning
from tests.model.hf import arrays
from tests.model.hf.cases import CASES, SMALL, load


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_every_rule_set_shards_every_array(path):
    model = load(path)[2]
    boxed = initialise.abstract_variables(model)["params"]
    mesh = partitioning.make_mesh(shape=None)
    for name in partitioning.RULE_SETS:
        shardings = initialise.param_shardings(boxed, mesh, partitioning.rules_named(name))
        assert len(jax.tree.leaves(shardings)) == len(native_shapes(model))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_shapes_of_unrolled_layers_are_those_of_their_initialisation(path):
    """They are found from one period of layers, scanned."""
    model = layer_stack.unrolled(load(path)[2])
    params = initialise.shapes_of(initialise.abstract_variables(model)["params"])
    leaves = jax.tree_util.tree_leaves_with_path(params)
    expected = {"/".join(key.key for key in path): leaf.shape for path, leaf in leaves}
    assert native_shapes(model) == expected


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("dtype", "scanned"), [(np.float32, True), (ml_dtypes.bfloat16, False)])
def test_weights_come_back_bit_for_bit(path, dtype, scanned):
    _, family, model, tensors = load(path)
    model = model if scanned else layer_stack.unrolled(model)
    # Bit patterns that arithmetic would not keep: negative zero, a NaN with a payload.
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    for tensor in tensors.values():
        bits = tensor.reshape(-1).view(f"u{tensor.itemsize}")
        bits[0] = 1 << (8 * tensor.itemsize - 1)
        bits[-1] = np.iinfo(bits.dtype).max - 1
    params = arrays.to_native(family, model, tensors)
    paths = jax.tree_util.tree_leaves_with_path(params)
    found = {"/".join(key.key for key in path): leaf.shape for path, leaf in paths}
    assert found == native_shapes(model)
    back = arrays.to_hf(family, model, params)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        same(back[name], tensor)
    again = arrays.to_native(family, model, back)
    jax.tree.map(same, params, again)


class Counted(arrays.Memory):
    """Tensors of which `reads` have been read; each takes a moment."""

    reads = 0

    def read_into(self, name, start, into):
        self.reads += 1
        time.sleep(0.02)
        super().read_into(name, start, into)


def test_what_is_not_needed_is_not_read(llama):
    family, model, tensors = llama
    source = Counted(tensors)
    checked = plan(family, model, source)
    pieces = sum(len(target.pieces) for target in checked.arrays.values())
    with pytest.raises(KeyError, match="stop"), loading.filling(checked):
        raise KeyError("stop")
    assert source.reads < pieces
    with loading.filling(checked) as filled:
        assert filled().keys() == checked.arrays.keys()


@pytest.fixture
def llama():
    family, config = registry.family_named("llama"), SMALL["llama2_7b"]
    model = family.model(config)
    return family, model, {k: np.ones(v, np.float32) for k, v in family.shapes(model).items()}


def test_all_that_is_wrong_with_tensors_is_said_at_once(llama):
    family, model, tensors = llama
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.extra"] = np.zeros(1, np.float32)
    tensors["model.norm.weight"] = np.zeros(9, np.float32)
    with pytest.raises(MismatchedTensors) as raised:
        arrays.to_native(family, model, tensors)
    message = str(raised.value)
    assert "1 missing (model.layers.1.mlp.up_proj.weight)" in message
    assert "1 without a counterpart (model.layers.0.extra)" in message
    assert "1 of another shape (model.norm.weight (9,) instead of (8,))" in message


def test_long_lists_are_cut(llama):
    family, model, _ = llama
    with pytest.raises(MismatchedTensors, match=r"21 missing \(.*, and 11 more\)"):
        arrays.to_native(family, model, {})


def test_a_transposed_tensor_is_of_another_shape(llama):
    family, model, tensors = llama
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T
    with pytest.raises(MismatchedTensors, match=r"up_proj.weight \(8, 5\) instead of \(5, 8\)"):
        arrays.to_native(family, model, tensors)


def test_a_head_beside_the_embedding_it_is_tied_to_must_be_equal():
    family, config = registry.family_named("cohere"), SMALL["aya23_8b"]
    model = family.model(config)
    tensors = {k: np.ones(v, np.float32) for k, v in family.shapes(model).items()}
    plain = arrays.to_native(family, model, tensors)
    head = tensors["model.embed_tokens.weight"].copy()
    with_head = arrays.to_native(family, model, {**tensors, "lm_head.weight": head})
    jax.tree.map(same, plain, with_head)
    head[3, 2] = 2.0
    with pytest.raises(
        MismatchedTensors, match='lm_head.weight differs .*"tie_word_embeddings": false'
    ):
        arrays.to_native(family, model, {**tensors, "lm_head.weight": head})
    with pytest.raises(MismatchedTensors, match="of another shape .lm_head.weight"):
        arrays.to_native(family, model, {**tensors, "lm_head.weight": head[1:]})


def test_tensors_that_carry_nothing_are_passed_over(llama):
    family, model, tensors = llama
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)
    arrays.to_native(family, model, tensors)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_is_read_with_and_without_the_prefix_and_its_masks(prefix):
    family, config = registry.family_named("gpt2"), SMALL["gpt2"]
    model = family.model(config)
    rng = np.random.default_rng(0)
    tensors = {k: rng.normal(size=v).astype("f4") for k, v in family.shapes(model).items()}
    found = {k.replace("transformer.", prefix): v for k, v in tensors.items()}
    found |= {
        f"{prefix}h.{i}.attn.{name}": np.zeros((1, 1), np.float32)
        for i in range(2)
        for name in ("bias", "masked_bias")
    }
    params = arrays.to_native(family, model, found)
    back = arrays.to_hf(family, model, params)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        same(back[name], tensor)
    # Query, key and value lie side by side.
    whole = tensors["transformer.h.1.attn.c_attn.weight"]
    for i, name in enumerate(("query", "key", "value")):
        kernel = params["layers"]["block_0"]["attention"][name]["kernel"][1]
        np.testing.assert_array_equal(kernel, whole[:, 8 * i : 8 * (i + 1)])
