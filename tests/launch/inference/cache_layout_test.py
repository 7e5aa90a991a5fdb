"""What the compilers make of the token loop: no cache is copied in it, whatever the policy.

Programs for TPUs need libtpu (the extra `tpu`) and are skipped without it.

Shapes: B batch, S slots, M new tokens, V vocabulary, D width, K key/value heads, H head dim.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from espalier.launch.precompile import tpu_topology
from espalier.launch.precompile.hlo import text
from espalier.model.config import TransformerConfig
from espalier.model.kernels.platform import use_platform
from espalier.model.kv_cache.policies import policy_named
from espalier.model.transformer import Transformer
from espalier.trainers.decoding.decode import decode
from espalier.trainers.decoding.prefill import prefill
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.partitioning import RULE_SETS, make_mesh

needs_libtpu = pytest.mark.skipif(
    bool(tpu_topology.missing()), reason=tpu_topology.missing() or "libtpu is here"
)
M = 16
IN_PLACE = ("dynamic-update-slice", "parameter", "get-tuple-element", "tuple")


def loop_program(model, policy, *, batch, length, dtype, mesh, rules):
    """(compiled token loop after prompts of `length`, cache bytes of a device, cache arrays)."""
    config = model.config

    def placed(tree, spec):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec(x))),
            tree,
        )

    ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    specs = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
    params = jax.tree.map(
        lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
        nn.meta.unbox(boxed),
        specs,
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        _, caches = jax.eval_shape(
            lambda *arrays: prefill(
                model, arrays[0], policy, *arrays[1:], room=M, cache_dtype=dtype
            ),
            params,
            ids,
            lengths,
        )
        heads = lambda x: x.ndim > 2 and x.shape[1] == config.kv_heads  # noqa: E731
        caches = placed(
            caches, lambda x: PartitionSpec(None, "tensor") if heads(x) else PartitionSpec()
        )
        rows = placed(
            {
                "logits_BV": jax.ShapeDtypeStruct((batch, config.vocab_size), jnp.float32),
                "lengths_B": lengths,
                "active_B": jax.ShapeDtypeStruct((batch,), bool),
                "keys_B": jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch)),
            },
            lambda x: PartitionSpec(),
        )

        def run(params, caches, rows):
            settings = Settings(max_new_tokens=M)
            return decode(model, params, policy, caches=caches, settings=settings, **rows)

        compiled = jax.jit(run, donate_argnums=1).lower(params, caches, rows).compile()
    shards = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(caches)]
    return compiled, shards


def remade(compiled, shards):
    """Operations of the token loop that make an array as large as a layer's keys anew.

    An update of a slot is none: it happens in place.
    """
    module = text.parse(compiled.as_text())
    whole = max(math.prod(shape) for shape, _ in shards)
    (loop,) = [i for i in module.entry.instructions.values() if i.opcode == "while"]
    (body,) = loop.callees("body")
    found = []
    for instruction in module.computations[body].instructions.values():
        sizes = [math.prod(leaf.dims) for leaf in text.leaves(instruction.shape)]
        root = instruction
        while root.opcode in ("fusion", "call", "bitcast"):
            if root.opcode == "bitcast":
                root = module.operand(root, 0)
            else:
                (name,) = root.callees("calls", "to_apply")
                root = module.computations[name].result
        if max(sizes, default=0) >= whole and root.opcode not in IN_PLACE:
            found.append(f"{instruction.name} = {root.opcode} {instruction.shape}")
    return found


CASES = [
    ("full", {}, None),
    ("snapkv", {"capacity": 4096}, "int8"),
    ("adakv", {"capacity": 4096}, None),
    ("streaming_llm", {"capacity": 4096}, None),
]
IDS = [f"{name}-{dtype}" for name, _, dtype in CASES]


@pytest.mark.tpu
@needs_libtpu
@pytest.mark.parametrize(("name", "settings", "dtype"), CASES, ids=IDS)
def test_on_tpus_no_cache_is_copied_for_a_token(name, settings, dtype, tpu_environment):
    """Attention of an 8B model on 8 chips; caches are too large for the chips' fast memory."""
    devices = tpu_topology.devices(tpu_topology.parse("v5e:2x4"))
    config = TransformerConfig(
        vocab_size=1024,
        num_layers=1,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=4096,
        dtype="bfloat16",
        param_dtype="bfloat16",
        scan_layers=False,
    )
    with use_platform("tpu"):
        compiled, shards = loop_program(
            Transformer(config=config),
            policy_named(name, **settings),
            batch=256 if settings else 64,
            length=32768 - M,
            dtype=dtype,
            mesh=make_mesh(shape={"tensor": 8}, devices=devices),
            rules=RULE_SETS["tp"],
        )
    assert remade(compiled, shards) == []
    cache_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards if shape)
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * cache_bytes


@pytest.mark.parametrize(
    ("name", "batch", "kv_heads"),
    [
        *(("full", batch, heads) for batch in (1, 4) for heads in (1, 2)),
        *((name, batch, 2) for name in ("snapkv", "adakv", "streaming_llm") for batch in (1, 4)),
    ],
)
def test_on_cpus_no_cache_is_copied_for_a_token(name, batch, kv_heads):
    """Of floats: XLA's CPU backend has no product of int8 and converts a layer's cache first."""
    config = TransformerConfig(
        vocab_size=64,
        num_layers=1,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=kv_heads,
        mlp_dim=32,
        scan_layers=False,
    )
    compiled, shards = loop_program(
        Transformer(config=config),
        policy_named(name, **({} if name == "full" else {"capacity": 256})),
        batch=batch,
        length=1024 - M,
        dtype=None,
        mesh=make_mesh(devices=jax.devices()[:1]),
        rules=RULE_SETS["tp"],
    )
    assert remade(compiled, shards) == []
    if name != "full":  # nothing is as long as the prompt was
        assert "1008" not in compiled.as_text() and "1024" not in compiled.as_text()
