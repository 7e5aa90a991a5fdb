"""Makes sure that `model` and `data` are this project's packages and not a folder of that name.

A plain `data/` folder in the working directory can hide an installed package `data` as an empty
namespace package; the error would otherwise be a puzzling one, much later.
"""

import importlib
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = ("model", "trainers", "data")


class RootError(ImportError):
    """A package of this project is hidden by something else of the same name."""


def check(packages: tuple[str, ...] = PACKAGES, root: str = ROOT) -> None:
    """Raises RootError unless every package is loaded from the folder that holds `launch`."""
    for name in packages:
        package = importlib.import_module(name)
        found = package.__file__
        if found is None or os.path.dirname(os.path.dirname(os.path.abspath(found))) != root:
            where = found or ", ".join(getattr(package, "__path__", []))
            raise RootError(
                f"Package '{name}' comes from {where}, not from {os.path.join(root, name)}: a file "
                f"or folder named '{name}' hides it. Start from another directory (or from {root}), "
                f"rename what hides it, or take its folder out of PYTHONPATH."
            )
