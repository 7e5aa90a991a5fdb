"""Technical prose: the docstrings of each module, in order, as one document."""

import ast
import functools
import pathlib
import warnings
from collections.abc import Iterator

from data.text.sources import code, document, environment

MIN_DOCSTRING = 40  # characters; shorter docstrings only repeat a name


def candidates(env: environment.Environment) -> Iterator[document.Candidate]:
    """Yields one document per module; its text is empty if the module has no docstrings."""
    for name, path in code.python_files(env):
        read = functools.partial(_read, name, path)
        yield document.Candidate(id=f"docstrings/{name}", read=read, split_key=name)


def _read(name: str, path: pathlib.Path) -> str:
    text = path.read_bytes().decode("utf-8")
    if '"""' not in text and "'''" not in text:  # parsing is slow
        return ""
    module = name.removeprefix("python/").removesuffix(".py").removesuffix("/__init__")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in packages
            tree = ast.parse(text)
    except SyntaxError:  # written for another version of Python
        return ""
    return "\n\n".join(_sections(tree, module.replace("/", ".")))


def _sections(node: ast.AST, name: str) -> Iterator[str]:
    """Yields the docstrings of a definition and its nested definitions, each under its full name."""
    docstring = ast.get_docstring(node)
    if docstring and len(docstring) >= MIN_DOCSTRING:
        yield f"{name}\n\n{docstring}"
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _sections(child, f"{name}.{child.name}")
