"""Adapters in a whole model: what trains, its number and bytes, and the same logits however the model is applied.

Shapes: L layers, D width, F hidden width of the MLP, H head dim, R rank, N experts.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from espalier.model.adapters import adapter
from espalier.model.adapters.adapter import AdapterError
from espalier.model.adapters.bottleneck import Bottleneck
from espalier.model.adapters.ia3 import Ia3
from espalier.model.adapters.lora import Lora, uniform_fan_in
from espalier.model.attention import Attention
from espalier.model.config import TransformerConfig
from espalier.model.kv_cache import policies
from espalier.model.low_rank.lowrank import Factorisation, LowRankDense
from espalier.model.mlp import GatedMlp
from espalier.model.moe.moe import MoeMlp
from espalier.model.mov.molora import MoLora
from espalier.model.mov.mov import Mov
from espalier.model.transformer import Block, Transformer
from espalier.model.transforms import layer_stack
from espalier.trainers import initialise, partitioning, trainable
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.checkpoints.manifest import ArrayEntry
from espalier.trainers.checkpoints.restore_params import CheckpointMismatchError, _assign
from espalier.trainers.decoding import prefill
from espalier.trainers.optim import optimizers
from espalier.trainers.optim.gradient_terms import ParamAxes
from espalier.trainers.recipe import Recipe
from tests.drawn import drawn

L, D, F, HEADS, R, N = 2, 16, 24, 2, 3, 4
H = D // HEADS
TRAINED = (r"(.*/)?adapter_\w+/.*",)
BOTH = {
    "lora": functools.partial(Lora, layers=(".*/attention/.*",), rank=R, ranks=[(".*/key", 2)]),
    "mov": functools.partial(Mov, outputs=(), num_experts=N, top_k=2, balance_loss=0.01),
}


def model_of(*, scan=True, **slots):
    adapters = adapter.named(**slots)
    block = functools.partial(
        Block,
        attention=functools.partial(Attention, adapters=adapters),
        mlp=functools.partial(GatedMlp, adapters=adapters),
    )
    sizes = {"num_layers": L, "embed_dim": D, "num_heads": HEADS, "mlp_dim": F}
    config = TransformerConfig(vocab_size=32, scan_layers=scan, **sizes)
    return Transformer(config=config, block=block)


def recipe_of(model, **changes):
    options = {
        "model": model,
        "batch_size": 2,
        "feature_lengths": {"targets": 8},
        "optimizer": optimizers.adamw,
        "learning_rate": 1e-2,
        "trainable": TRAINED,
        "anomaly": None,
    }
    return Recipe(**{**options, **changes})


# Of a decoder with gated MLPs; an encoder-decoder has three attentions for two MLPs (arXiv 2309.05444).
IA3 = L * (2 * D + F)
LORA = L * (8 * D * R + 2 * (D + F) * R)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (Ia3, IA3),
        (functools.partial(Mov, num_experts=N), N * (IA3 + L * (2 * H + F))),
        (functools.partial(MoLora, num_experts=1, rank=R), LORA),
        (functools.partial(MoLora, num_experts=N, rank=R), N * (LORA + L * (4 * D + D + F))),
    ],
)
def test_trainable_parameters_are_the_formulas(make, count):
    program = recipe_of(model_of(one=make)).program(devices=jax.devices()[:1])
    assert program.num_params(trained_only=True) == count


def test_a_step_moves_adapters_alone_and_only_they_have_an_optimiser():
    """Invariant 7 of arXiv 2309.05444."""
    program = recipe_of(model_of(**BOTH)).program(devices=jax.devices()[:1])
    with partitioning.use_mesh(program.mesh, program.rules):
        state = program.init()
        before = jax.tree.map(np.array, state.params)
        batch = batch_of(program)
        bytes_of_moments = sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim)
        state, metrics = program.steps(0).train(
            state, jax.device_put(batch, program.batch_sharding)
        )
    count = program.num_params(trained_only=True)
    assert bytes_of_moments == 2 * 4 * count  # two float32 moments of each trained number
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.params)
    trained = trainable.match(TRAINED, before)
    for (path, one), expected in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(trained), strict=True
    ):
        name = trainable.path_name(path)
        # The gradients of LoRA's A and of the router are zero in the first step.
        assert one == expected or (expected and name.endswith(("lora_a", "router/kernel"))), name
    assert float(metrics["auxiliary_loss"][0]) > 0
    assert metrics["mlp/down/adapter_mov/router_probability"][0].shape == (N,)
    assert "mlp/down/adapter_mov/router_entropy" in metrics


@pytest.mark.parametrize("make", [Lora, functools.partial(Lora, dora=True), MoLora])
def test_with_a_at_zero_and_b_random_a_model_is_its_base_and_does_not_move_b(make):
    """Without decay, the first step moves A, and DoRA's norms, alone."""
    swapped = {"a_init": nn.initializers.zeros, "b_init": uniform_fan_in}
    adapters = adapter.named(one=functools.partial(make, rank=R, **swapped))
    block = functools.partial(
        Block,
        attention=functools.partial(Attention, adapters=adapters),
        mlp=functools.partial(MoeMlp, num_experts=2, adapters=adapters)
        if make is Lora
        else GatedMlp,
    )
    sizes = {"num_layers": L, "embed_dim": D, "num_heads": HEADS, "mlp_dim": F}
    model = Transformer(config=TransformerConfig(vocab_size=32, **sizes), block=block)
    still = functools.partial(optimizers.adamw, weight_decay=0.0)
    program = recipe_of(model, optimizer=still).program(devices=jax.devices()[:1])
    with partitioning.use_mesh(program.mesh, program.rules):
        state = program.init()
        before = state_tree.flatten(jax.tree.map(np.array, state.params))
        batch = jax.device_put(batch_of(program), program.batch_sharding)
        logits, base = (
            jax.jit(model.apply)({"params": params}, batch["decoder_input_tokens"])
            for params in (state.params, without_adapters(state.params))
        )
        np.testing.assert_allclose(logits, base, atol=1e-5)
        state, _ = program.steps(0).train(state, batch)
    after = state_tree.flatten(state.params)
    moved = {name for name in after if np.any(after[name] != before[name])}
    assert moved == {name for name in after if name.endswith(("/lora_a", "/magnitude_change"))}
    rows = [before[x].reshape(-1, before[x].shape[-1]) for x in after if x.endswith("/lora_b")]
    assert rows and all(len(np.unique(x, axis=0)) == len(x) for x in rows)  # experts' own draws


def without_adapters(tree):
    return {
        name: without_adapters(child) if isinstance(child, dict) else child
        for name, child in tree.items()
        if not name.startswith("adapter_")
    }


def test_adapters_train_on_factors_and_at_experts():
    """LoRA around factorised projections of attention, and of each expert of a mixture; their own parameters stay."""
    adapters = adapter.named(lora=functools.partial(Lora, rank=2))
    factors = functools.partial(LowRankDense, factorisation=Factorisation(rank=0.5))
    block = functools.partial(
        Block,
        attention=functools.partial(Attention, dense=factors, adapters=adapters),
        mlp=functools.partial(MoeMlp, num_experts=2, adapters=adapters),
    )
    sizes = {"num_layers": 1, "embed_dim": D, "num_heads": HEADS, "mlp_dim": F}
    model = Transformer(config=TransformerConfig(vocab_size=32, **sizes), block=block)
    program = recipe_of(model).program(devices=jax.devices()[:1])
    with partitioning.use_mesh(program.mesh, program.rules):
        state = program.init()
        before = jax.tree.map(np.array, state.params)
        batch = jax.device_put(batch_of(program), program.batch_sharding)
        state, _ = program.steps(0).train(state, batch)
    after, before = (state_tree.flatten(x) for x in (state.params, before))
    moved = {name for name in after if np.any(after[name] != before[name])}
    # The gradient of A is zero in the first step; it may decay.
    moved -= {name for name in after if name.endswith("adapter_lora/lora_a")}
    assert moved == {name for name in after if name.endswith("adapter_lora/lora_b")}
    assert sum("/attention/" in name for name in moved) == 4
    assert sum("/mlp/" in name for name in moved) == 3
    assert any(name.endswith("/attention/key/u") for name in after)


EXPERTS = functools.partial(MoeMlp, num_experts=2)


@pytest.mark.parametrize(
    ("mlp", "make", "decayed"),
    [
        (EXPERTS, Ia3, {}),
        (GatedMlp, functools.partial(Mov, num_experts=N), {"kernel"}),  # of the routers
        (EXPERTS, functools.partial(Mov, num_experts=N), {"kernel"}),
        (EXPERTS, Bottleneck, {"kernel"}),
        (GatedMlp, functools.partial(Lora, dora=True), {"lora_a", "lora_b"}),
    ],
)
def test_weight_decay_leaves_the_gains_and_biases_of_adapters_as_they_are(mlp, make, decayed):
    """Also those of which each expert, or each vector of a mixture, has one."""
    adapters = adapter.named(one=make)
    block = functools.partial(
        Block,
        attention=functools.partial(Attention, adapters=adapters),
        mlp=functools.partial(mlp, adapters=adapters),
    )
    sizes = {"num_layers": 1, "embed_dim": D, "num_heads": HEADS, "mlp_dim": F}
    model = Transformer(config=TransformerConfig(vocab_size=32, **sizes), block=block)
    param_axes = ParamAxes.of(initialise.abstract_variables(model)["params"])
    names = {path: path.rpartition("/")[2] for path in param_axes.names if "adapter_" in path}
    assert set(names.values()) > set(decayed)
    assert {x for x in names if param_axes.decayed(x)} == {x for x in names if names[x] in decayed}


def test_a_mixture_of_experts_has_mov_at_attention_and_ia3_at_its_experts():
    make = {
        "mov": functools.partial(Mov, inputs=(), num_experts=N),
        "ia3": functools.partial(Ia3, outputs=()),
    }

    def model_with(**slots):
        adapters = adapter.named(**slots)
        block = functools.partial(
            Block,
            attention=functools.partial(Attention, adapters=adapters),
            mlp=functools.partial(MoeMlp, num_experts=2, adapters=adapters),
        )
        sizes = {"num_layers": 1, "embed_dim": D, "num_heads": HEADS, "mlp_dim": F}
        return Transformer(config=TransformerConfig(vocab_size=32, **sizes), block=block)

    program = recipe_of(model_with(**make)).program(devices=jax.devices()[:1])
    with partitioning.use_mesh(program.mesh, program.rules):
        state = program.init()
        before = state_tree.flatten(jax.tree.map(np.array, state.params))
        batch = jax.device_put(batch_of(program), program.batch_sharding)
        state, _ = program.steps(0).train(state, batch)
    after = state_tree.flatten(state.params)
    moved = {name for name in after if np.any(after[name] != before[name])}
    layer = "layers/block_0"
    sites = {
        f"{layer}/attention/key/adapter_mov/output_scales",
        f"{layer}/attention/value/adapter_mov/output_scales",
        f"{layer}/mlp/down/adapter_ia3/input_scale",
    }
    # The gradient of a router is zero while its vectors are equal.
    assert {name for name in moved if "/router/" not in name} == sites
    mixed = recipe_of(model_with(mov=functools.partial(Mov, num_experts=N))).program(devices=1)
    shapes = state_tree.flatten(mixed.abstract_state.params)
    assert shapes[f"{layer}/mlp/down/adapter_mov/input_scales"].shape[-3:] == (2, N, F)


def test_a_compressed_cache_holds_the_rescaled_keys_and_values_of_a_longer_prompt():
    model = model_of(scan=False, mov=functools.partial(Mov, num_experts=N))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 1, 32)
    params = filled(nn.meta.unbox(drawn(model, tokens)))
    whole = jax.jit(model.apply)({"params": params}, tokens)
    caches = {}
    for name, settings in (("full", {}), ("snapkv", {"capacity": 4, "window": 2})):
        policy = policies.policy_named(name, **settings)
        read = (model, params, policy, tokens, jnp.full(2, 7))
        compiled = jax.jit(prefill.prefill, static_argnums=(0, 2), static_argnames="room")
        logits, caches[name] = compiled(*read, room=2)
        np.testing.assert_allclose(logits, whole[:, -1], atol=1e-4)
    for every, some in zip(caches["full"], caches["snapkv"], strict=True):
        at_BXS = some.positions_BXS
        there_BXS = at_BXS >= 0
        assert (there_BXS.sum(-1) == 4).all()
        at_BKS = jnp.broadcast_to(at_BXS, (2, HEADS, at_BXS.shape[-1]))[..., None]
        for kind in ("k_BKSH", "v_BKSH"):
            expected = jnp.take_along_axis(getattr(every, kind), jnp.maximum(at_BKS, 0), axis=2)
            found = jnp.where(at_BKS >= 0, getattr(some, kind), expected)
            np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_decoders_batches_may_have_embeddings_of_their_sentences():
    make = functools.partial(Mov, num_experts=N, router_input="sentence")
    program = recipe_of(model_of(mov=make)).program(devices=jax.devices()[:1])
    with partitioning.use_mesh(program.mesh, program.rules):
        params, batch = filled(program.init().params), batch_of(program)
        evaluate = program.steps(0).evaluate
        with pytest.raises(AdapterError, match="of an encoder-decoder's inputs"):
            evaluate(params, batch)
        embeddings = np.random.default_rng(0).normal(size=(2, 2, D)).astype(np.float32)
        one, other = (evaluate(params, {**batch, "sentence_embeddings": x}) for x in embeddings)
    assert abs(float(one["loss"][0]) - float(other["loss"][0])) > 1e-4


def test_adapters_of_a_model_without_attention_name_none_of_its_layers():
    params = {"head": {"kernel": np.zeros((2, 3))}, "conv_0": {"kernel": np.zeros((2, 3))}}
    with pytest.raises(AdapterError, match="no attention or MLP") as error:
        adapter.report(params, adapters=adapter.named(lora=Lora))
    assert "conv_0" not in str(error.value)


def batch_of(program):
    like = program.recipe.abstract_batch(program.batch_sharding)
    batch = {name: np.ones(leaf.shape, leaf.dtype) for name, leaf in like.items()}
    rng = np.random.default_rng(0)
    for name in ("decoder_input_tokens", "decoder_target_tokens"):
        batch[name] = rng.integers(0, 32, like[name].shape).astype(np.int32)
    return batch


def filled(params):
    """Other values for adapters, which begin without effect."""

    def fill(path, leaf):
        name = trainable.path_name(path)
        seed = sum(map(ord, name))
        random = np.random.default_rng(seed).normal(0.5, 0.5, leaf.shape)
        return jnp.asarray(random, leaf.dtype) if "adapter_" in name else leaf

    return jax.tree_util.tree_map_with_path(fill, params)


def test_scanned_unrolled_and_cached_layers_give_the_same_logits():
    """Unrolled layers have other paths than the patterns name; caches are invariant 10 of arXiv 2309.05444."""
    model = model_of(**BOTH)
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 1, 32)
    params = filled(nn.meta.unbox(drawn(model, tokens)))
    whole = jax.jit(model.apply)({"params": params}, tokens)
    unrolled = layer_stack.unrolled(model)
    values = layer_stack.unroll(params, model.config)
    got = jax.jit(unrolled.apply)({"params": values}, tokens)
    np.testing.assert_allclose(got, whole, atol=1e-5)
    base = {"params": nn.meta.unbox(drawn(model_of(), tokens))}
    assert np.abs(jax.jit(model.apply)(base, tokens) - whole).max() > 0.01
    policy = policies.policy_named("full")
    caches = prefill.empty_caches(unrolled, policy, batch=2, length=8)
    for t in range(7):
        at = jnp.full((2, 1), t)
        out, logits = prefill_read(unrolled, values, policy, tokens[:, t : t + 1], at, caches)
        caches = out.caches
        np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=1e-4)


@functools.partial(jax.jit, static_argnums=(0, 2))
def prefill_read(model, params, policy, tokens, positions, caches):
    out = prefill.read(model, params, policy, tokens, positions, caches)
    return out, model.apply({"params": params}, out.hidden_BTD, method="logits")


def leaves(names):
    return {name: ArrayEntry((2,), "float32", 0) for name in names}


def test_a_checkpoint_may_lack_what_is_added(tmp_path):
    """The base model's, with or without a prefix; but not one that lacks other parameters."""
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": {"w": jnp.ones(2)}}, meta={})
    step = epath.Path(tmp_path / "1")
    wanted = ["a/kernel", "a/adapter_lora/lora_a"]
    options = {"strict": True, "added": TRAINED, "root_of": lambda step: ""}

    def assigned(wanted, saved, assignment=()):
        sources = _assign(step, leaves(wanted), leaves(saved), assignment, **options)
        return {name: source and source.parts[0][0] for name, source in sources.items()}

    sources = assigned(wanted, {"a/kernel"})
    assert sources == {"a/kernel": "a/kernel", "a/adapter_lora/lora_a": None}
    assert assigned(wanted, wanted) == {name: name for name in wanted}
    moved = [f"backbone/{name}" for name in wanted]
    prefix = [("backbone/(.*)", r"\1")]
    sources = assigned(moved, {"a/kernel"}, prefix)
    assert sources == {"backbone/a/kernel": "a/kernel", "backbone/a/adapter_lora/lora_a": None}
    with pytest.raises(CheckpointMismatchError, match="lacks a/kernel"):
        assigned(wanted, ())


def test_adapters_flops_count_each_of_their_weights_once():
    model = model_of(**BOTH)
    shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), int)))
    row = {"decoder_input_tokens": jax.ShapeDtypeStruct((1, 8), jnp.int32)}
    more = model.hidden_flops(row, shapes) - model_of().hidden_flops(row)
    leaves = state_tree.flatten(shapes["params"])
    counted = sum(math.prod(leaf.shape) for name, leaf in leaves.items() if "adapter_" in name)
    assert more == 2 * counted


def test_a_frozen_weight_counts_four_flops_and_a_trained_one_six():
    """Per token: two each for the forward pass, the gradient of the input and, where trained, that of the weight."""
    lora = functools.partial(Lora, rank=R, layers=adapter.PROJECTIONS)
    attention = L * 4 * 4.5 * D  # scores and weighted sums over a mean of 4.5 of 8 keys
    kernels, head = L * (4 * D * D + 3 * D * F), 32 * D
    adapters = LORA + L * (D + F) * R  # LORA has no gate
    frozen = 4 * (kernels + head) + 3 * attention
    for patterns, expected in (
        (TRAINED, frozen + 6 * adapters),
        ((".*",), frozen + 2 * (kernels + head) + 6 * adapters),
        ((*TRAINED, "token_embed/.*"), frozen + 2 * head + 6 * adapters),
    ):
        recipe = recipe_of(model_of(lora=lora), trainable=patterns)
        program = recipe.program(devices=jax.devices()[:1])
        assert program.train_flops_per_unit == expected


def test_a_mesh_computes_the_loss_of_one_device():
    """Adapters follow the axes of their projection; ranks and experts are whole where a mesh does not divide them."""
    losses = []
    for devices, mesh in ((1, None), (4, {"fsdp": 2, "tensor": 2})):
        recipe = recipe_of(model_of(**BOTH), rules="fsdp_tp", mesh=mesh)
        program = recipe.program(devices=jax.devices()[:devices])
        with partitioning.use_mesh(program.mesh, program.rules):
            shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state.params)
            params = jax.jit(filled, out_shardings=shardings)(program.init().params)
            batch = jax.device_put(batch_of(program), program.batch_sharding)
            total, weight = program.steps(0).evaluate(params, batch)["loss"]
        losses.append(float(total / weight))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    block = params["layers"]["block_0"]
    for leaf in (block["attention"]["query"]["adapter_lora"], block["mlp"]["down"]["adapter_mov"]):
        assert not any(x.sharding.is_fully_replicated for x in jax.tree.leaves(leaf))
