"""Model FLOPs of a token, counted from a model itself: dense, in factors, mixtures of MLPs, of attentions, or of both.

  train_flops_per_token(model, 2048)

Every weight of a matrix is one multiply-add for each token that meets it. A token meets the kernels of the experts that its
router chooses, of the shared expert and of the routers; of attention experts it meets all, for keys and values are
computed whatever is mixed later, and model/bam/moa.py computes all queries as well. As in trainers/telemetry/flops.py attention counts
the keys that a token sees. A router that projects embeddings of domains (model/nexus/domain_router.py) does so once a step for all
tokens together, which is left out: its share falls with the batch, and inference has none of it.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from model.transformer import Transformer, attention_of, block_of
from trainers import initialise
from trainers.recipe import Program
from trainers.telemetry.flops import mean_keys, traced_flops

_MATRICES = ("kernel", "u", "v")  # u and v are factors of one


def forward_flops_per_token(model: Transformer, length: int, params: Any = None) -> float:
    """FLOPs of a forward pass for one token of a row of `length`, logits included.

    Choices that experts without capacity refuse (moe.MoeMlp.capacity_factor) count like others.

    Args:
      model: of any size; nothing is allocated.
      length: tokens per row; packed documents shorter than that see fewer keys and do less.
      params: its parameters or their shapes, boxed or not; traced if None.
    """
    params = initialise.abstract_variables(model)["params"] if params is None else params
    config = model.config
    total = 2.0 * config.vocab_size * config.embed_dim
    for name, block in _shapes(params)["layers"].items():
        layer = int(name.removeprefix("block_"))
        total += 2.0 * (_weights(block["attention"]) + _met_of_mlp(model, layer, block["mlp"]))
    for layer in range(config.num_layers):
        keys = mean_keys(length, config.layer_kind(layer).window)
        total += 4.0 * keys * attention_of(model, layer).query_heads * config.per_head_dim
    return total


def train_flops_per_token(model: Transformer, length: int, params: Any = None) -> float:
    """Forward and backward: three times `forward_flops_per_token`."""
    return 3.0 * forward_flops_per_token(model, length, params)


def train_flops_per_unit(program: Program) -> float:
    """Model FLOPs of training on one token, or on one image.

    Six for each parameter of a language model of another architecture, whose products are unknown.
    """
    recipe = program.recipe
    if recipe.inputs_spec.unit == "tokens":
        if "mlp" not in program.boxed_params.get("layers", {}).get("block_0", {}):
            return 6.0 * program.num_params()
        return train_flops_per_token(recipe.model, recipe.length, program.boxed_params)
    state = program.abstract_state
    variables = {"params": state.params, **state.variables}
    arguments = recipe.inputs_spec.init_arguments()
    return 3.0 * traced_flops(recipe.model.apply, variables, *arguments)


def _met_of_mlp(model: Transformer, layer: int, mlp: Mapping[str, Any]) -> float:
    """Weights of a layer's MLP, or of layers stacked into it, that a token meets."""
    if "router" not in mlp:
        return _weights(mlp)
    mixture = block_of(model, layer).mlp(config=model.config, name="mlp")
    always = {name: mlp[name] for name in ("router", "shared") if name in mlp}
    experts = {name: node for name, node in mlp.items() if name not in always}
    return _weights(always) + _weights(experts) * mixture.top_k / mixture.num_experts


def _weights(node: Mapping[str, Any]) -> float:
    """Weights of all matrices of a tree of shapes."""
    if "domains" in node:  # A vector for each expert stands for the projection of its domain.
        width = node["down"]["kernel"].shape[-1]
        return math.prod(node["domains"].shape[:-1]) * width
    total = 0.0
    for name, child in node.items():
        if isinstance(child, Mapping):
            total += _weights(child)
        elif name in _MATRICES:
            total += child.size
    return total


def _shapes(params: Any) -> Any:
    # Not meta.unbox, which would constrain shardings under a mesh.
    return jax.tree.map(
        lambda leaf: getattr(leaf, "value", leaf),
        params,
        is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata),
    )
