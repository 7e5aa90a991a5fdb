"""The classes and functions that a recorded model may name, by names that stay valid when a file moves.

A run records its model as data (launch/config/model_file.py), and whoever reads it calls only these objects. All of
them build a part of a model or a number from their arguments; none reads or writes files, or starts anything.
In model/ they are those marked as `recordable` (espalier/common/ranges.py).
"""

import pathlib
import re
from collections.abc import Iterator

from espalier.launch import environment

_INITIALIZERS = (
    "constant",
    "glorot_normal",
    "glorot_uniform",
    "he_normal",
    "he_uniform",
    "lecun_normal",
    "lecun_uniform",
    "normal",
    "ones",
    "orthogonal",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "zeros",
)


def marked(package: str, mark: str) -> Iterator[tuple[str, str, str]]:
    """Yields (module, name, argument) of the classes and functions of a package that a decorator marks.

    The source is read, and nothing is imported. The mark is the first decorator, `@mark` or `@mark("argument")`.
    """
    pattern = re.compile(rf'^@{mark}(?:\("(.*)"\))?\n(?:@.*\n)*(?:class|def) (\w+)', re.MULTILINE)
    root = pathlib.Path(environment.ROOT)
    for path in sorted((root / package).rglob("*.py")):
        for argument, name in pattern.findall(path.read_text("utf-8")):
            module = path.relative_to(root).with_suffix("").parts
            yield ".".join(("espalier", *module)), name, argument


def _parts() -> dict[str, tuple[str, str]]:
    """Returns the parts of models by name."""
    places: dict[str, tuple[str, str]] = {}
    for module, name, _ in marked("model", "recordable"):
        key = f"{module.rpartition('.')[2]}.{name}"
        assert key not in places, f"two files of model/ have a recordable {key}"
        places[key] = (module, name)
    return places


# Name in a record, such as 'mlp.GatedMlp' -> module and attribute.
REGISTERED: dict[str, tuple[str, str]] = {
    **_parts(),
    **{f"initializers.{name}": ("jax.nn.initializers", name) for name in _INITIALIZERS},
}
