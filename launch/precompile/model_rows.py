"""Programs of `precompile tables` of models that are of no one paper: Llama 2 7B, which several use, Cohere's mixtures, and long rows."""

from typing import Any

from espalier.launch.precompile.table_rows import Row, mesh, tokens

_PRETRAINING = "t5x_configs/runs/pretrain.gin"
# 6.74e9 parameters: weights are gathered twice in bfloat16, and gradients reduced once in float32.
_LLAMA_SENT_GB = 6.74 * (2 + 2 + 4)
_LLAMA_BOUNDS = "sent: 8 bytes for each of 6.74e9 parameters"


def _llama(topology: str, chips: int, *bindings: str, **stated: Any) -> Row:
    return Row(
        name=f"llama2_7b_{topology.replace(':', '_')}",
        title=f"Llama 2 7B, pre-training on {topology}",
        files=("t5x_configs/models/llama2_7b.gin", _PRETRAINING),
        topology=topology,
        bindings=(*tokens(chips, 2048), *bindings),
        sent_gb=_LLAMA_SENT_GB,
        **{"bounds_from": _LLAMA_BOUNDS, **stated},
    )


def _mixture(
    name: str, title: str, topology: str, *, length: int = 4096, note: str = "", **sizes: int
) -> Row:
    """Returns the row of a mixture whose experts are divided over chips; each chip has a row of `length` tokens."""
    return Row(
        name=f"{name}_{topology.partition(':')[0]}",
        title=f"{title} on {topology}",
        files=(f"t5x_configs/models/{name}.gin", _PRETRAINING),
        topology=topology,
        bindings=(*tokens(sizes["fsdp"] * sizes["expert"], length), *mesh("fsdp_ep", **sizes)),
        note=note,
    )


def _long(name: str, title: str, topology: str, **sizes: int) -> Row:
    """Returns the row of a model that is trained on rows of 131,072 tokens, each on `context` chips."""
    return Row(
        name=f"{name}_128k_context{sizes['context']}",
        title=f"{title}, context {sizes['context']} on {topology}",
        files=(f"t5x_configs/models/{name}.gin", _PRETRAINING),
        topology=topology,
        bindings=(*tokens(sizes.get("fsdp", 1), 131_072), *mesh("fsdp_cp", **sizes)),
        note="A ring: there are fewer key/value heads than chips of a row."
        if sizes["context"] > 8
        else "Heads are split during attention (all_to_all).",
    )


_NORTH = ("north_mini_30b_a3b", "North Mini Code 30B-A3B, pre-training")
_LIMITS = "With half as many chips a step needs {} GB of each; rows of {} tokens need {} GB here. A chip has less."
_COMMAND = ("command_a_plus_218b", "Command A+ 218B-A25B, pre-training")
# By the key of their title in table_rows.py.
ROWS: dict[str, tuple[Row, ...]] = {
    "llama": (
        _llama(
            "v5e:4x4",
            16,
            hbm_gb=9.2,
            bounds_from=f"HBM: the goal of docs/evidence/benchmarks.md with jax 0.10.2; {_LLAMA_BOUNDS}",
        ),
        _llama("v4:2x2x4", 16),
        _llama("v5p:2x2x4", 16),
        _llama("v6e:4x4", 16),
        _llama("2xv5e:4x4", 32, *mesh("fsdp", data=2, fsdp=16), note="Slices are copies (`data`)."),
    ),
    "cohere2_moe": (
        _mixture(
            *_NORTH, "v5p:2x2x2", note=_LIMITS.format(148.1, "32,768", 136.2), fsdp=2, expert=4
        ),
        _mixture(*_NORTH, "v6e:4x8", note=_LIMITS.format(46.2, "16,384", 41.8), fsdp=8, expert=4),
        _mixture(
            *_COMMAND, "v5p:4x4x4", note=_LIMITS.format(158.5, "16,384", 176.5), fsdp=16, expert=4
        ),
        _mixture(
            *_COMMAND,
            "v6e:16x16",
            length=2048,
            note=_LIMITS.format(47.9, "4,096", 34.6),
            fsdp=64,
            expert=4,
        ),
    ),
    "long_rows": (
        _long("aya_expanse_8b", "Aya Expanse 8B", "v5p:2x2x4", fsdp=2, context=8),
        _long("aya_expanse_8b", "Aya Expanse 8B", "v5p:2x2x4", context=16),
        _long("command_r_35b", "Command R 35B", "v5p:2x4x4", fsdp=4, context=8),
    ),
}
