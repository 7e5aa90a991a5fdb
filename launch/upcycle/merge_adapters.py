"""Merges the adapters of a run into its base model, which is then an ordinary model.

Examples, after a run with adapters in /tmp/lora (t5x_configs/methods/adapters/lora.gin):

  espalier upcycle merge --checkpoint=/tmp/lora --to=/tmp/merged
  espalier convert --from=/tmp/merged --to_hf=/tmp/merged_hf

LoRA, DoRA and (IA)3 are merged exactly. The weights of a mixture (MoV, MoLORA) depend on the token. With --average, a file of
rows as for espalier score, each expert gets its mean weight over these texts, and the largest error of a logit on them is
printed. The result is a run directory that every command takes as --checkpoint.
"""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from espalier.common.ranges import Size
from espalier.launch.load import load_run
from espalier.launch.load.load_run import RunConfig
from espalier.launch.upcycle import upcycle_flags
from espalier.launch.upcycle.upcycle_flags import Params
from espalier.model.transforms import base
from espalier.model.transforms.base import TransformError

_OWNERS = (
    "attention.Attention",
    "attention.CrossAttention",
    "mlp.GatedMlp",
    "mlp.Mlp",
    "moe.MoeMlp",
)
_LINES = [
    "# Of espalier upcycle merge.",
    *(f"from espalier.model import {name}" for name in ("attention", "mlp")),
    "from espalier.model.moe import moe",
    *(f"{owner}.adapters = None" for owner in _OWNERS),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeFlags:
    """Flags of `espalier upcycle merge`; None if a flag is not set.

    Attributes:
      checkpoint, params: see espalier score.
      to: new run directory.
      average: file of JSON lines {"text": "..."}; merges mixtures with their mean weights on it.
      average_length: tokens of a row (512).
    """

    checkpoint: str
    to: str
    params: Params = "auto"
    average: str | None = None
    average_length: Size | None = None

    def check(self) -> None:
        """Raises TransformError for flags that do not go together."""
        if self.average_length is not None and not self.average:
            raise TransformError("--average_length is only for --average: give both or none.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    group = parser.add_argument_group("adapters")
    upcycle_flags.add(group, MergeFlags, but=("checkpoint", "params"))


def run(config: RunConfig, flags: argparse.Namespace) -> None:
    """Writes the merged run of the flags.

    Raises:
      TransformError: adapters that cannot be merged, or too little text.
    """
    from espalier.launch.weights import transformed_run
    from espalier.launch.weights.source_models import SourceModel
    from espalier.model.adapters.adapter import adapters_of
    from espalier.model.adapters.merge import Merge

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
    recipes = transformed_run.write(
        options.to,
        merge,
        [source],
        config=_LINES,
        gin_files=flags.gin_file,
        whole_config=flags.trust_config,
        meta=source.origin_meta(),
    )
    print("\n".join([*base.table(recipes), *notes, f"written to {options.to}"]))


def _averaged(config: RunConfig, options: MergeFlags, adapters: Any) -> tuple[Any, float]:
    """Returns the transform with mean weights of the experts, and the largest error of a logit."""
    import jax
    import jax.numpy as jnp

    from espalier.launch.weights.transformed_run import token_rows
    from espalier.model.adapters.adapter import PREFIX
    from espalier.model.adapters.merge import Merge
    from espalier.trainers.checkpoints import state_tree

    with config.load(options.checkpoint, params=options.params) as loaded:
        model, length = loaded.model, options.average_length
        rows_CBT = token_rows(loaded, options.average, flag="average", length=length)

        @jax.jit
        def sown(params: Any, tokens_BT: Any) -> Any:
            variables, kept = {"params": params}, ["intermediates"]
            return model.apply(variables, tokens_BT, method="hidden", mutable=kept)[1]

        @jax.jit
        def largest_error(params: Any, merged: Any, tokens_BT: Any) -> jax.Array:
            of_both = (model.apply({"params": x}, tokens_BT) for x in (params, merged))
            logits_BTV, other_BTV = of_both
            return jnp.abs(logits_BTV - other_BTV).max()

        means: dict[str, np.ndarray] = {}
        for tokens_BT in rows_CBT:
            leaves = state_tree.flatten(sown(loaded.params, tokens_BT)["intermediates"])
            for site, weights in _mean_weights(leaves, scanned=model.config.scan_layers).items():
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
        errors = [largest_error(loaded.params, merged, tokens_BT) for tokens_BT in rows_CBT]
    return merge, max(errors)


def _mean_weights(leaves: Mapping[str, Any], *, scanned: bool) -> dict[str, np.ndarray]:
    """Returns the experts' weights by path of the projection, averaged over tokens and heads, stacked like its kernel."""
    from espalier.model.adapters.adapter import PREFIX

    means = {}
    for name, leaf in leaves.items():
        if match := re.fullmatch(rf"(.*)/{PREFIX}\w+/router_weights/0", name):
            stacked = scanned and "layers/" in name
            rows = np.asarray(leaf, np.float64)
            rows = rows.reshape(len(rows) if stacked else 1, -1, rows.shape[-1]).mean(1)
            means[match[1]] = rows if stacked else rows[0]
    return means


if __name__ == "__main__":
    raise SystemExit(
        upcycle_flags.main(
            __doc__, "upcycle merge", "espalier.launch.upcycle.merge_adapters:run", add_flags
        )
    )
