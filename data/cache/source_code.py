"""Reads a function's code: its normalised source, and the globals it uses."""

import ast
import inspect
import os
import sys
import sysconfig
import textwrap
import types

_CHANGES = frozenset(
    ("add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove")
    + ("setdefault", "update")
)
_INSTALLED = tuple(
    os.path.join(os.path.realpath(path), "")
    for path in sorted(
        {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    )
)


def is_installed(path: str) -> bool:
    """Returns whether a code file belongs to Python or an installed package, or is no real file."""
    return path.startswith("<") or os.path.realpath(path).startswith(_INSTALLED)


def is_of_package(cls: type) -> bool:
    """Returns whether a class belongs to Python or an installed package."""
    path = getattr(sys.modules.get(cls.__module__), "__file__", None)
    known = cls.__module__.partition(".")[0] in sys.stdlib_module_names
    return known and cls.__module__ != "__main__" if path is None else is_installed(path)


def text(function: types.FunctionType, *, follow: bool = True) -> str:
    """Returns the source without comments, docstrings and layout, or the bytecode without source.

    Args:
      function: the function.
      follow: whether to follow `__wrapped__` to the decorated function.
    """
    try:
        lines, _ = inspect.getsourcelines(function if follow else function.__code__)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):
        # A lambda inside an expression, or code typed at a prompt.
        return repr(_bytecode(function.__code__))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
    return ast.unparse(tree)


def _bytecode(code: types.CodeType) -> tuple:
    constants = [
        _bytecode(item)
        if isinstance(item, types.CodeType)
        else sorted(map(repr, item))
        if isinstance(item, frozenset)
        else repr(item)
        for item in code.co_consts
    ]
    return code.co_code.hex(), constants, code.co_names, code.co_varnames


def names(code: types.CodeType) -> set[str]:
    """Returns the global and attribute names in code, including the code of nested functions."""
    inside = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(names, inside))


def used_globals(function: types.FunctionType) -> dict:
    """Returns {name: value} of the globals that a function uses, except those it modifies."""
    space = function.__globals__
    used = {name: space[name] for name in sorted(names(function.__code__)) if name in space}
    for name in _changed(function):
        used.pop(name, None)
    return used


def _changed(function: types.FunctionType) -> set[str]:
    """Returns the globals that a function assigns or modifies in place, such as memos and counters.

    Their values depend on earlier calls, so they do not describe the function.
    """
    try:
        tree = ast.parse(text(function))
    except SyntaxError:  # bytecode
        return set()
    changed: set[str] = set()
    for node in ast.walk(tree):
        target = None
        if isinstance(node, ast.Global):
            changed.update(node.names)
        elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
            target = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            target = node.func.value if node.func.attr in _CHANGES else None
        if isinstance(target, ast.Name):
            changed.add(target.id)
    return changed
