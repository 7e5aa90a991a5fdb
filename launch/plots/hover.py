"""Figures as SVG for an HTML page, with the values of points as tooltips."""

import io
import re
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

_SVG = "http://www.w3.org/2000/svg"
_REACH = 11  # diameter in points of what the pointer must touch
_TEXTS = "tooltips"  # attribute of a line with the texts of its points


def points(axes: Any, x: Sequence[float], y: Sequence[float], texts: Sequence[str]) -> None:
    """Adds invisible points, whose texts a browser shows under the pointer; x and y must be finite."""
    (line,) = axes.plot(x, y, ls="", marker="o", ms=_REACH, mew=0, alpha=0)
    setattr(line, _TEXTS, list(texts))


def svg(figure: Any) -> str:
    """Returns the figure as an element `svg`, as wide as its place at most."""
    lines = figure.findobj(lambda artist: hasattr(artist, _TEXTS))
    for number, line in enumerate(lines):
        line.set_gid(f"tooltips{number}")
    figure.draw_without_rendering()  # while text is measured in pixels, the layout of SVG cuts labels
    figure.set_layout_engine("none")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(text.getvalue())
    groups = {group.get("id"): group for group in root.iter(f"{{{_SVG}}}g")}
    for number, line in enumerate(lines):
        marks = list(groups[f"tooltips{number}"].iter(f"{{{_SVG}}}use"))
        for mark, tooltip in zip(marks, getattr(line, _TEXTS), strict=True):
            ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = tooltip
    for metadata in root.findall(f"{{{_SVG}}}metadata"):
        root.remove(metadata)
    # The numbers of a path need no more than a hundredth of a point.
    return re.sub(
        r'(?<= d=")[^"]+|(?<= transform=")[^"]+', _rounded, ElementTree.tostring(root, "unicode")
    )


def _rounded(path: re.Match[str]) -> str:
    if "scale" in path[0]:  # of glyphs, whose factors are small
        return path[0]
    return re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", path[0])
