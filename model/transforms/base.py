"""The tree-transform seam: the parameters of one model as those of another, inside or outside a run."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

Power = Literal["first", "second"]


class TreeTransform(Protocol):
    """Makes a model's parameters from those of another, which a checkpoint holds.

    Trees are nested dicts; leaves of `source` and of abstract trees have shape, dtype and sharding.
    """

    def source(self, params: Any, saved: Mapping[str, tuple[int, ...]]) -> Any:
        """What is to be read of a checkpoint, as jax.ShapeDtypeStructs with shardings.

        Args:
          params: of the model to be made, abstract.
          saved: shape of each parameter that the checkpoint has, by path.

        Raises:
          ValueError: there is nothing to transform, or it has been transformed already.
        """
        ...

    def __call__(self, source: Any, fresh: Any) -> Any:
        """The parameters, like `fresh`, new ones of the model, from which it may take some.

        Raises:
          ValueError: values that cannot be transformed, by name.
        """
        ...


@runtime_checkable
class MomentTransform(TreeTransform, Protocol):
    """A transform under which an optimiser's moments have an image too."""

    def moments(self, moments: Any, params: Any, *, power: Power) -> Any:
        """Moments of the new parameters.

        Args:
          moments: those of the source's parameters, a tree like it.
          params: what the source was made into.
          power: 'first' of gradients, 'second' of their elementwise squares.
        """
        ...
