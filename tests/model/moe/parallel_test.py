"""Experts on meshes of simulated devices: the numbers of one device, and what the programs exchange."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.precompile.hlo import text
from espalier.model.adapters import adapter
from espalier.model.adapters.bottleneck import Bottleneck
from espalier.model.adapters.lora import Lora
from espalier.model.config import TransformerConfig
from espalier.model.low_rank.lowrank import Factorisation, LowRankExpertDense
from espalier.model.moe import moe, parallel
from espalier.trainers import initialise, partitioning
from tests.drawn import drawn

CONFIG = TransformerConfig(vocab_size=8, num_layers=1, embed_dim=16, num_heads=1, mlp_dim=12)
EXPERTS, ROWS, LENGTH = 8, 8, 6
SEGMENTS_BT = jnp.asarray(np.arange(LENGTH) < np.arange(1, 9)[:, None], jnp.int32)

FACTORISED = functools.partial(
    LowRankExpertDense, factorisation=Factorisation(rank=0.25, layers=(".*",))
)
ADAPTED = adapter.named(
    lora=functools.partial(Lora, layers=("gate|up",), rank=2, b_init=nn.initializers.normal()),
    bottleneck=functools.partial(Bottleneck, layers=("down",), width=3),
)


def made(**settings):
    settings = {"balance_loss": 0.1, "router_z_loss": 0.01, **settings}
    mlp = moe.MoeMlp(config=CONFIG, num_experts=EXPERTS, **settings)
    x_BTD = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, 16))
    boxed = drawn(mlp, x_BTD)
    if "adapters" in settings:  # small ones, as they begin
        boxed = jax.jit(mlp.init)(jax.random.key(1), x_BTD)["params"]
    return mlp, boxed, x_BTD


def value(mlp, params, x_BTD):
    """A loss of everything the layer returns and sows in training, and what it sows as metrics."""
    out, sown = mlp.apply(
        {"params": params},
        x_BTD,
        segments_BT=SEGMENTS_BT,
        mutable=["losses", "metrics"],
        rngs={"dropout": jax.random.key(0)},
    )
    losses = sum(jax.tree.leaves(sown["losses"]))
    return jnp.sum(jnp.sin(out)) + losses, (out, sown["metrics"])


@functools.cache
def gradients(mlp):
    return jax.jit(jax.grad(functools.partial(value, mlp), argnums=(0, 1), has_aux=True))


def on_mesh(rules, shape, boxed, x_BTD):
    """A mesh with its rules, and parameters and tokens on it as a train step has them."""
    count = int(np.prod(list(shape.values())))
    mesh = partitioning.make_mesh(shape=shape, devices=jax.devices()[:count])
    rules = partitioning.rules_named(rules)
    shardings = initialise.param_shardings(boxed, mesh, rules)
    params = jax.device_put(nn.unbox(boxed), shardings)
    return mesh, rules, params, jax.device_put(x_BTD, partitioning.batch_sharding(mesh, rules))


def same(found, want):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())

    jax.tree.map(close, found, want)


@pytest.mark.parametrize(
    ("rules", "shape", "settings"),
    [
        ("ep", {"data": 2, "expert": 4}, {}),
        ("ep", {"expert": 4}, {"score": "sigmoid", "router_z_loss": 0.0}),
        ("fsdp_ep", {"fsdp": 2, "expert": 4}, {"capacity_factor": 0.8}),
        ("fsdp_tp", {"fsdp": 2, "tensor": 4}, {"capacity_factor": 0.8}),
        ("tp", {"tensor": 4}, {}),
        ("tp_whole_kv", {"tensor": 2}, {"expert_dim": 10}),
        ("fsdp_tp_whole_kv", {"fsdp": 4, "tensor": 2}, {}),
        ("fsdp_tp_sp", {"fsdp": 4, "tensor": 2}, {}),
        ("fsdp_tp_sp_whole_kv", {"fsdp": 2, "tensor": 3}, {}),
        ("fsdp_tp", {"fsdp": 4, "tensor": 2}, {"expert_dense": FACTORISED}),
        ("tp", {"tensor": 4}, {"adapters": ADAPTED}),
    ],
)
def test_no_mesh_changes_values_gradients_or_statistics(rules, shape, settings):
    mlp, boxed, x_BTD = made(**settings)
    want = gradients(mlp)(nn.unbox(boxed), x_BTD)
    mesh, rules, params, x_BTD = on_mesh(rules, shape, boxed, x_BTD)
    with partitioning.use_mesh(mesh, rules):
        assert parallel.placement(ROWS, EXPERTS, mlp.width) is not None
        same(gradients(mlp)(params, x_BTD), want)


def test_all_tokens_to_the_experts_of_one_device_are_not_dropped():
    """The worst case of an exchange."""
    mlp, boxed, x_BTD = made()
    x_BTD = x_BTD.at[..., 0].set(1.0)
    kernel = jnp.zeros((16, EXPERTS)).at[0].set(-(jnp.arange(EXPERTS) ** 2.0))
    router = boxed["router"]["kernel"]
    boxed = {**boxed, "router": {"kernel": router.replace_boxed(kernel)}}
    run = jax.jit(functools.partial(value, mlp))
    _, (want, metrics) = run(nn.unbox(boxed), x_BTD)
    assert float(metrics["router_load"][0][:2].sum()) == 1.0
    mesh, rules, params, x_BTD = on_mesh("ep", {"expert": 4}, boxed, x_BTD)
    with partitioning.use_mesh(mesh, rules):
        _, (out, metrics) = jax.jit(functools.partial(value, mlp))(params, x_BTD)
    same(out, want)
    assert float(metrics["router_dropped"][0]) == 0.0


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_a_bounded_exchange_drops_what_comes_last(factor):
    mlp, boxed, x_BTD = made()
    mesh, rules, params, tokens = on_mesh("ep", {"expert": 4}, boxed, x_BTD)
    with partitioning.use_mesh(mesh, rules):
        bounded = mlp.clone(exchange_factor=factor)
        _, (out, metrics) = jax.jit(functools.partial(value, bounded))(params, tokens)
    # A device has 12 tokens, 24 choices and 6 for each of 4 devices; padding sends nothing.
    plain = nn.unbox(boxed)
    routes = moe.route(jax.nn.softmax(x_BTD @ plain["router"]["kernel"]), top_k=2)
    left = np.full((4, 4), int(6 * factor))
    weights, dropped = np.zeros((ROWS, LENGTH, EXPERTS)), 0
    for b, t, k in np.ndindex(ROWS, LENGTH, 2):
        if SEGMENTS_BT[b, t]:
            expert = int(routes.experts_MK[b, t, k])
            left[b // 2, expert // 2] -= 1
            kept = left[b // 2, expert // 2] >= 0
            weights[b, t, expert] = routes.weights_MK[b, t, k] * kept
            dropped += not kept
    gate = np.einsum("btd,edf->btef", x_BTD, plain["gate"]["kernel"])
    hidden = np.asarray(jax.nn.silu(gate)) * np.einsum(
        "btd,edf->btef", x_BTD, plain["up"]["kernel"]
    )
    want = np.einsum("btef,efd,bte->btd", hidden, plain["down"]["kernel"], weights)
    np.testing.assert_allclose(out, want, atol=1e-5)
    share = dropped / (2 * int((SEGMENTS_BT > 0).sum()))
    assert float(metrics["router_dropped"][0]) == pytest.approx(share, abs=1e-6)
    assert (dropped == 0) == (factor == 4.0)


def exchanged(rules, shape):
    """Operands of the all-to-alls and of the all-gathers of a forward and backward pass, as shapes."""
    mlp, boxed, x_BTD = made()
    mesh, rules, params, x_BTD = on_mesh(rules, shape, boxed, x_BTD)
    with partitioning.use_mesh(mesh, rules):
        program = gradients(mlp).lower(params, x_BTD).compile()
    module = text.parse(program.as_text())
    found = {"all-to-all": [], "all-gather": []}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode in found:
                operand = next(iter(text.leaves(module.operand(instruction, 0).shape)))
                found[instruction.opcode].append(tuple(operand.dims))
    return found["all-to-all"], sorted(found["all-gather"])


def test_rows_are_exchanged_and_kernels_stay():
    to_all, gathered = exchanged("ep", {"data": 2, "expert": 4})
    # A device has one row of 6 tokens, each with at most 2 choices of the 2 experts of one device. Rows
    # and sizes go, results come back, and the gradients of both go the other way.
    assert sorted(math.prod(dims) for dims in to_all) == [2] + [LENGTH * 2 * 16] * 4
    assert gathered == []


def test_sharded_kernels_are_gathered_of_a_devices_own_experts_alone():
    to_all, gathered = exchanged("fsdp_ep", {"fsdp": 2, "expert": 4})
    assert len(to_all) == 5
    # Of 2 of the 8 experts; and the router's kernel.
    assert gathered == [(2, 8, 12), (2, 8, 12), (2, 12, 8), (8, 8)]


def test_without_expert_parallelism_nothing_but_kernels_is_gathered():
    to_all, gathered = exchanged("fsdp", {"fsdp": 8})
    assert to_all == []
    assert gathered == [(2, 8), (8, 2, 12), (8, 2, 12), (8, 12, 2)]


def test_what_does_not_divide_takes_the_plain_form():
    mesh = partitioning.make_mesh(shape={"expert": 8})
    with partitioning.use_mesh(mesh, partitioning.rules_named("ep")):
        assert parallel.placement(7, EXPERTS, 12) is None
        assert parallel.placement(8, 6, 12) is None
    mesh = partitioning.make_mesh(shape={"tensor": 8})
    with partitioning.use_mesh(mesh, partitioning.rules_named("tp")):
        assert parallel.placement(8, EXPERTS, 12) is None  # a recipe refuses this mesh
    assert parallel.placement(8, EXPERTS, 12) is None
