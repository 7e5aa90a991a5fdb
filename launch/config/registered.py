"""The classes and functions that a recorded model may name, by names that stay valid when a file moves.

A run records its model as data (launch/config/model_file.py), and whoever reads it calls only these objects. All of
them build a part of a model or a number from their arguments; none reads or writes files, or starts anything.
In model/ they are those marked as `recordable` (model/ranges.py).
"""

import pathlib
import re

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
_MARKED = re.compile(r"^@recordable\n(?:@.*\n)*(?:class|def) (\w+)", re.MULTILINE)


def _marked() -> dict[str, tuple[str, str]]:
    """Returns the marked objects of model/, without importing their modules."""
    root = pathlib.Path(environment.ROOT)
    places: dict[str, tuple[str, str]] = {}
    for path in sorted((root / "model").rglob("*.py")):
        module = ".".join(("espalier", *path.relative_to(root).with_suffix("").parts))
        for name in _MARKED.findall(path.read_text("utf-8")):
            place = places.setdefault(f"{path.stem}.{name}", (module, name))
            assert place[0] == module, f"two files of model/ have a recordable {path.stem}.{name}"
    return places


# Name in a record, such as 'mlp.GatedMlp' -> module and attribute.
REGISTERED: dict[str, tuple[str, str]] = {
    **_marked(),
    **{f"initializers.{name}": ("jax.nn.initializers", name) for name in _INITIALIZERS},
}
