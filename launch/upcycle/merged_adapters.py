"""Merges adapters into their base model, for `launch.upcycle merge`.

Shapes: B rows, T tokens, N experts of a mixture, V vocabulary.
"""

import argparse
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from espalier.launch.run.load_run import RunConfig
from espalier.launch.upcycle import upcycle_flags
from espalier.launch.upcycle.merge_adapters import MergeFlags
from espalier.launch.weights import transformed_run
from espalier.launch.weights.source_models import SourceModel
from espalier.launch.weights.transformed_run import token_rows
from espalier.model.adapters.adapter import PREFIX, adapters_of
from espalier.model.adapters.merge import Merge
from espalier.model.transforms import base
from espalier.model.transforms.base import TransformError
from espalier.trainers.checkpoints import state_tree

_OWNERS = (
    "attention.Attention",
    "attention.CrossAttention",
    "mlp.GatedMlp",
    "mlp.Mlp",
    "moe.MoeMlp",
)
_LINES = [
    "# Of launch.upcycle merge.",
    *(f"from espalier.model import {name}" for name in ("attention", "mlp")),
    "from espalier.model.moe import moe",
    *(f"{owner}.adapters = None" for owner in _OWNERS),
]


def run(config: RunConfig, flags: argparse.Namespace) -> None:
    """Writes the merged run of the flags.

    Raises:
      TransformError: adapters that cannot be merged, or too little text.
    """
    options = upcycle_flags.parsed(flags, MergeFlags)
    source = SourceModel(options.checkpoint, options.params)
    adapters = adapters_of(config.model)
    if adapters is None:
        raise TransformError(f"{options.checkpoint} has no adapters: there is nothing to merge.")
    merge, notes = Merge(adapters), []
    if options.average is not None:
        merge, error = _averaged(config, options, adapters)
        notes = [
            f"mixtures are merged with their mean weights on {options.average}: the largest error of a logit there is {error:.3g}"
        ]
    meta = {"hf": source.meta["hf"]} if "hf" in source.meta else {}
    recipes = transformed_run.write(
        options.to,
        merge,
        [source],
        config=_LINES,
        gin_files=flags.gin_file,
        whole_config=flags.trust_config,
        meta=meta,
    )
    print("\n".join([*base.table(recipes), *notes, f"written to {options.to}"]))


def _averaged(config: RunConfig, options: MergeFlags, adapters: Any) -> tuple[Merge, float]:
    """Returns the transform with mean weights of the experts, and the largest error of a logit."""
    with config.load(options.checkpoint, params=options.params) as loaded:
        rows_CBT = token_rows(
            loaded, options.average, flag="average", length=options.average_length
        )
        means: dict[str, np.ndarray] = {}
        for tokens_BT in rows_CBT:
            for site, weights in _mean_weights(loaded.model, loaded.params, tokens_BT).items():
                means[site] = means.get(site, 0.0) + weights / len(rows_CBT)
        if not means:
            raise TransformError(
                f"{options.checkpoint} has no mixtures of adapters, so it is merged exactly: remove --average."
            )
        merge = Merge(adapters, means)
        flat = state_tree.flatten(loaded.params)
        shapes = {name: tuple(leaf.shape) for name, leaf in flat.items()}
        target = {name: shape for name, shape in shapes.items() if f"/{PREFIX}" not in name}
        recipes = merge.plan([base.Source("run", shapes)], target)
        merged = state_tree.nest(base.apply(recipes, lambda _, name: flat[name]))
        # Without parameters of adapters, the same module is the base model.
        errors = [
            _largest_error(loaded.model, loaded.params, merged, tokens_BT) for tokens_BT in rows_CBT
        ]
    return merge, max(errors)


def _mean_weights(model: Any, params: Any, tokens_BT: Any) -> dict[str, np.ndarray]:
    """Returns the experts' weights by path of the projection, averaged over tokens and heads, stacked like its kernel."""
    _, written = _intermediates(model, params, tokens_BT)
    means = {}
    for name, leaf in state_tree.flatten(written["intermediates"]).items():
        if match := re.fullmatch(rf"(.*)/{PREFIX}\w+/router_weights/0", name):
            stacked = model.config.scan_layers and "layers/" in name
            rows = np.asarray(leaf, np.float64)
            rows = rows.reshape(len(rows) if stacked else 1, -1, rows.shape[-1]).mean(1)
            means[match[1]] = rows if stacked else rows[0]
    return means


@functools.partial(jax.jit, static_argnums=0)
def _intermediates(model: Any, params: Any, tokens_BT: Any) -> Any:
    return model.apply({"params": params}, tokens_BT, method="hidden", mutable=["intermediates"])


@functools.partial(jax.jit, static_argnums=0)
def _largest_error(model: Any, params: Any, merged: Any, tokens_BT: Any) -> jax.Array:
    logits_BTV, other_BTV = (model.apply({"params": x}, tokens_BT) for x in (params, merged))
    return jnp.abs(logits_BTV - other_BTV).max()
