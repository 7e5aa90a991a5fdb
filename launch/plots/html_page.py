"""One HTML file of a page in Markdown, its images inside, and figures as SVG with the values of points as tooltips."""

import base64
import html
import io
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from espalier.common import tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; margin-top: 2rem; }
img, svg { max-width: 100%; height: auto; }
pre, code { font: 13px/1.45 ui-monospace, monospace; background: #f4f4f6; border-radius: 4px; }
pre { padding: 0.7rem 1rem; overflow-x: auto; }
code { padding: 0.1rem 0.25rem; }
pre code { padding: 0; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
"""
_SVG = "http://www.w3.org/2000/svg"
_REACH = 11  # diameter in points of what the pointer must touch
_TEXTS = "tooltips"  # attribute of a line with the texts of its points


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a table as lines of Markdown, and a blank line after it."""
    first, *rest = ([*map(tables.escaped, cells)] for cells in (header, *rows))
    return [*tables.markdown(first, rest), ""]


def write(markdown: str, path: pathlib.Path, pictures: Mapping[str, str] | None = None) -> None:
    """Writes the page, which begins with its title, with its images inside.

    HTML in the Markdown is shown as text.

    Args:
      markdown: the page.
      path: where it is written.
      pictures: elements `svg` by the names that the page's images have; other images are files in the page's folder.

    Raises:
      FileNotFoundError: an image is missing.
    """
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)

    def drawn(image: re.Match[str]) -> str:
        svg = (pictures or {}).get(html.unescape(image[1]))
        return image[0] if svg is None else f'<span role="img" aria-label="{image[2]}">{svg}</span>'

    def embedded(image: re.Match[str]) -> str:
        source = html.unescape(image[1])
        if ":" in source:
            return image[0]
        data = base64.b64encode((path.parent / source).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'<img src="([^"]+)" alt="([^"]*)" />', drawn, body)
    body = re.sub(r'(?<=<img )src="([^"]+)"', embedded, body)
    title = html.escape(markdown.partition("\n")[0].lstrip("# "))
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}</body></html>\n",
        encoding="utf-8",
    )


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
