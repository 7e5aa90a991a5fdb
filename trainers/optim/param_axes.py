"""The logical axes of parameters, by which optimisers distinguish matrices, vectors and stacks of them."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from espalier.model import axes
from espalier.trainers import trainable

_STACKING = (axes.LAYERS, axes.EXPERT)


@dataclasses.dataclass(frozen=True)
class ParamAxes:
    """Logical axis names of a model's parameters, by path.

    Attributes:
      names: 'layers/block_0/mlp/up/kernel' -> ('layers', 'embed', 'mlp').
      not_decayed: path patterns of parameters that a gradient term decays instead of the optimiser.
    """

    names: Mapping[str, tuple[str | None, ...]]
    not_decayed: Sequence[str] = ()

    @classmethod
    def of(cls, boxed: Any, not_decayed: Sequence[str] = ()) -> "ParamAxes":
        """Returns the axes of parameters in flax's boxes."""
        leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=axes.is_boxed)
        return cls({trainable.path_name(path): box.names for path, box in leaves}, not_decayed)

    def stack_rank(self, path: str) -> int:
        """Returns the number of leading axes that stack parameters of several layers or experts."""
        return sum(name in _STACKING for name in self.names[path])

    def decayed(self, path: str) -> bool:
        """Returns whether weight decay applies: to matrices, not to gains, biases and other vectors.

        Shrinking a vector changes a layer's scale, not its complexity.
        """
        names = self.names[path]  # gains of a per-head norm have two dimensions but are no matrix
        is_matrix = len(names) - self.stack_rank(path) >= 2 and axes.NORM not in names
        return is_matrix and not any(re.fullmatch(p, path) for p in self.not_decayed)
