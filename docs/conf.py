"""Settings of Sphinx for the documentation site; `docs/build.py` prepares the pages that it reads."""

import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "Espalier"
author = "Espalier developers"
copyright = author
root_doc = "index"
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["jupyter_execute"]
nb_execution_mode = "off"  # tests/python_docs_test.py runs the notebooks
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]
suppress_warnings = ["myst.header"]  # reproductions begin sections below an image

smartquotes = False  # '--' begins a flag
toc_object_entries = False  # each name has a heading
default_role = "code"  # docstrings quote names by single backticks
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

highlight_language = "none"  # most blocks are commands with their output
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = "Espalier"
html_static_path = [str(ROOT / "docs" / "static")]
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


def _plain_docstring(
    app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]
) -> None:
    """Docstrings are plain text with names in backticks: nothing else in them is markup."""
    for number, line in enumerate(lines):
        parts = re.split("(`[^`]*`)", line)
        parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
        # 'L.' alone would begin a list.
        lines[number] = re.sub(r"(: )([A-Z])\.$", r"\1\2\\.", "".join(parts))


def _short(signature: str) -> str:
    """Returns a signature whose types have no ranges of numbers, and whose defaults are names."""
    while match := re.search(r"[~\w.]*\bAnnotated\[", signature):
        depth, comma, at = 1, None, match.end()
        while depth:
            depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(signature[at], 0)
            if depth == 1 and signature[at] == "," and comma is None:
                comma = at
            at += 1
        bare = signature[match.end() : comma or at - 1]
        signature = signature[: match.start()] + bare + signature[at:]
    return re.sub(r"<(?:class|function) '?(?:[\w.<>]*\.)?(\w+)'?(?: at 0x\w+)?>", r"\1", signature)


def _short_signature(
    app: Any,
    what: str,
    name: str,
    value: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    return signature and _short(signature), returns and _short(returns)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _plain_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", _short_signature)
