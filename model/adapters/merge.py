"""Merges adapters into the base model's kernels, as a tree transform.

The weights of a mixture of adapters depend on the token, so that it has no merged form. With one fixed weight for each
expert, such as its mean over texts, a mixture can be merged approximately.

Shapes: '...' stacked layers or experts, X in, Y out, R rank, N experts of a mixture.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.model.adapters.adapter import PREFIX, Adapter, Adapters, is_adapter
from espalier.model.adapters.bottleneck import Bottleneck
from espalier.model.adapters.ia3 import Rescaling
from espalier.model.adapters.lora import Lora
from espalier.model.adapters.prompt import Prompt
from espalier.model.transforms import base
from espalier.model.transforms.base import Recipe, Shapes, Source, TransformError

Leaves = Mapping[str, Any]  # arrays of one projection or adapter by name


@dataclasses.dataclass(frozen=True, eq=False)
class Merge:
    """Transforms a model with adapters (the only source) to the base model with merged kernels.

    Attributes:
      adapters: the adapters of the source.
      weights: fixed weights [..., N] of the experts by path of the projection, for mixtures.
    """

    adapters: Adapters
    weights: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def plan(self, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
        """See TreeTransform."""
        (source,) = sources
        slots = adapted_sites(source.shapes)
        if not slots:
            raise TransformError(f"{source.name} has no adapters: there is nothing to merge.")
        recipes = []
        for path, shape in target.items():
            site, _, leaf = path.rpartition("/")
            if site in slots:
                recipes.append(self._recipe(source, site, slots[site], leaf, shape))
            else:
                recipes.append(base.copied(path, shape, source))
        return recipes

    def _recipe(
        self, source: Source, site: str, slot: str, leaf: str, shape: tuple[int, ...]
    ) -> Recipe:
        adapter = self.adapters.adapter(slot)
        prefix = f"{site}/{PREFIX}{slot}/"
        own = [name for name in source.shapes if name.startswith(prefix)]
        weights = self.weights.get(site)
        merged = merger(adapter, site, {name.removeprefix(prefix) for name in own}, leaf, weights)

        def compute(parts: Sequence[Any], _: int) -> Sequence[np.ndarray]:
            value, *leaves = (np.asarray(part, np.float32) for part in parts)
            names = (name.removeprefix(prefix) for name in own)
            return [merged(value, dict(zip(names, leaves, strict=True)))]

        return Recipe(
            outputs={f"{site}/{leaf}": tuple(shape)},
            inputs=tuple((source.name, name) for name in (f"{site}/{leaf}", *own)),
            origin=f"merged with {type(adapter).__name__}",
            compute=compute,
        )


def adapted_sites(shapes: Shapes) -> dict[str, str]:
    """Returns the slot of the adapter of each adapted projection, by path."""
    slots = {}
    for path in filter(is_adapter, shapes):
        site, _, rest = path.partition(f"/{PREFIX}")
        slots[site] = rest.partition("/")[0]
    return slots


def merger(
    adapter: Adapter, site: str, own: set[str], leaf: str, weights: Any
) -> Callable[[np.ndarray, Leaves], np.ndarray]:
    """Returns a function of a projection's array and its adapter's arrays that returns the merged array.

    Args:
      adapter: the adapter with its settings.
      site: path of the projection.
      own: names of the adapter's arrays.
      leaf: name of the projection's array: 'kernel', 'bias', 'u' or 'v'.
      weights: fixed weights [..., N] of a mixture's experts; None without.

    Raises:
      TransformError: this adapter cannot be merged here.
    """
    if any(name.startswith("router/") for name in own) and weights is None:
        raise TransformError(
            f"{site}: the weights of its {adapter.num_experts} experts depend on the token, so that no one matrix does what "
            "they do. Use the adapters as they are, or merge their average over texts: --average=FILE, which stacked experts have not."
        )
    if isinstance(adapter, Prompt):
        raise TransformError(
            f"{site}: a trained prompt is not merged, because a tied head would change with the table: use the adapters as they are."
        )
    if isinstance(adapter, Bottleneck):
        raise TransformError(
            f"{site}: a bottleneck adapter is not linear, so it cannot be merged: use the adapters as they are."
        )
    if isinstance(adapter, Rescaling):
        return _rescaled(leaf, weights)
    assert isinstance(adapter, Lora)
    if leaf in ("u", "v"):
        raise TransformError(
            f"{site}: its kernel is factorised, and LoRA would change the rank of the factors: use the adapters as they are."
        )
    return _added(adapter, leaf, weights)


def _rescaled(leaf: str, weights: Any) -> Callable[[np.ndarray, Leaves], np.ndarray]:
    def merged(value: np.ndarray, own: Leaves) -> np.ndarray:
        of_input = any(name.startswith("input_") for name in own)
        (scale,) = (array for name, array in own.items() if name.endswith(("_scale", "_scales")))
        if weights is not None:
            scale = np.einsum("...n,...nx->...x", weights, scale)
        if of_input:
            return value * _column(scale, value) if leaf in ("kernel", "u") else value
        if leaf == "bias":
            return value * scale
        return value if leaf == "u" else value * _row(scale, value)

    return merged


def _row(scale: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Returns the scale of columns [..., 1, Y]; experts store it in this form."""
    return scale if scale.ndim == kernel.ndim else scale[..., None, :]


def _column(scale: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    return np.swapaxes(_row(scale, kernel), -1, -2)


def _added(adapter: Lora, leaf: str, weights: Any) -> Callable[[np.ndarray, Leaves], np.ndarray]:
    def merged(value: np.ndarray, own: Leaves) -> np.ndarray:
        if leaf == "bias":
            return value
        a, b = own["lora_a"], own["lora_b"]
        change = adapter.scale(a.shape[-1]) * np.matmul(a, b)
        if weights is not None:
            change = np.einsum("...n,...nxy->...xy", weights, change)
        total = value + change
        if "magnitude_change" not in own:
            return total
        norms = np.linalg.norm(value, axis=-2, keepdims=True)
        magnitude = norms + own["magnitude_change"][..., None, :]
        return magnitude / np.linalg.norm(total, axis=-2, keepdims=True) * total

    return merged
