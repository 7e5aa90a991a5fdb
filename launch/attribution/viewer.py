"""Writes the viewer of a report: one HTML file with its data inside, which needs no network.

Documents may be hostile. The data is JSON in an element that no browser executes, without the character that could end the
element; the script shows texts as text only; and the page's policy admits its own script and style by their digests, and
nothing else.
"""

import base64
import hashlib
import importlib.resources
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from espalier.common.storage import output_files

_POLICY = "default-src 'none'; script-src '{script}'; style-src '{style}'; base-uri 'none'; form-action 'none'"


def write(data: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes the viewer.

    Args:
      data: of `pages.shown`.
      path: file in an existing folder; it is written whole or not at all.
    """
    output_files.write(path, page(data))


def page(data: Mapping[str, Any]) -> str:
    """Returns the HTML of the viewer."""
    files = importlib.resources.files("launch.attribution") / "page"
    style, script, body = (
        (files / name).read_text(encoding="utf-8")
        for name in ("viewer.css", "viewer.js", "viewer.html")
    )
    policy = _POLICY.format(script=_digest(script), style=_digest(style))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Influence of documents</title>\n<style>{style}</style>\n</head>\n<body>\n{body}"
        f'<script type="application/json" id="data">{_embedded(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _embedded(data: Mapping[str, Any]) -> str:
    """Returns JSON in ASCII without <, > and &, so that it neither ends its element nor begins a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
