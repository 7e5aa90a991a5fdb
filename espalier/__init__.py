"""Espalier: run, combine and check recent methods for making language models, in JAX.

`espalier.load` reads a trained model, `espalier.Run` is one, and `espalier.train` trains what a recipe says. The packages are
espalier.model, espalier.trainers, espalier.data and espalier.launch, and espalier.common, which all of them use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.launch.load.load import Run, load
    from espalier.launch.train import train
    from espalier.trainers.recipe import Recipe

__version__ = "0.2.0"
__all__ = ["Recipe", "Run", "load", "train"]
# Imported when they are first used: `import espalier` is quick and starts no JAX.
_PLACES = {
    "Recipe": "espalier.trainers.recipe",
    "Run": "espalier.launch.load.load",
    "load": "espalier.launch.load.load",
    "train": "espalier.launch.train",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'espalier' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
