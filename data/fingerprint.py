"""What a value or a function is, as JSON, so that a change of either changes a cache's fingerprint.

Functions are described by their source without comments and docstrings, their defaults, closures
and partial arguments, and the functions and constants they use, those of other modules too unless
these are installed: of the standard library and of packages, names and versions say enough. The
description does not depend on addresses, hash seeds or the working directory.
"""

import ast
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import os
import pathlib
import sysconfig
import textwrap
import types
from collections.abc import Mapping, Set

import numpy as np

_PLAIN = (bool, int, float, str, type(None))
# Known by name only: their version is part of the environment, and following them has no end.
_LIBRARIES = ("tensorflow", "tensorflow_text", "tensorflow_datasets", "numpy", "jax", "threading")


def describe(value, seen: frozenset[int] = frozenset()):
    """JSON that two values share exactly if they would make the same records."""
    if isinstance(value, enum.Enum):
        return {"enum": f"{_name(type(value))}.{value.name}"}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value if value == value else "nan"
    if isinstance(value, bytes):
        return {"bytes": _sha(value)}
    if isinstance(value, os.PathLike):
        return {"path": os.fspath(value)}
    if isinstance(value, types.ModuleType):
        return {"module": value.__name__}
    if id(value) in seen:
        return "cycle"
    seen = seen | {id(value)}
    if isinstance(value, list | tuple):
        return [describe(item, seen) for item in value]
    if isinstance(value, Set):
        return {"set": sorted((describe(item, seen) for item in value), key=repr)}
    if isinstance(value, Mapping):
        return {"map": sorted(([str(k), describe(v, seen)] for k, v in value.items()), key=repr)}
    if isinstance(value, np.ndarray):
        return {"array": [str(value.dtype), list(value.shape), _sha(value.tobytes())]}
    if isinstance(value, functools.partial):
        return {
            "partial": describe(value.func, seen),
            "args": describe(value.args, seen),
            "keywords": describe(value.keywords, seen),
        }
    if isinstance(value, types.MethodType):
        return {"method": value.__name__, "of": describe(value.__self__, seen)}
    if isinstance(value, types.FunctionType):
        if _is_library(value.__module__):
            return {"function": f"{value.__module__}.{value.__qualname__}"}
        return _function(value, seen)
    if isinstance(value, type):
        return {"class": _name(value)}
    if hasattr(value, "vocab_size") and hasattr(value, "encode"):
        return vocabulary(value)
    return _object(value, seen)


def vocabulary(vocab) -> dict:
    """A SeqIO vocabulary: class, size, special ids, and the bytes of its model where it has one."""
    out = {"class": _name(type(vocab)), "size": int(vocab.vocab_size)}
    for key in ("bos_id", "eos_id", "pad_id", "unk_id", "extra_ids"):
        try:
            out[key] = describe(getattr(vocab, key, None))
        except NotImplementedError:  # a PassThroughVocabulary has no special ids
            out[key] = None
    model = getattr(vocab, "sp_model", None)
    if model is not None:
        out["model"] = _sha(model)
    else:
        state = {k: v for k, v in vars(vocab).items() if "lock" not in k}
        out["state"] = describe(state)
    return out


class FileDigests:
    """SHA-256 of source files, remembered by size and modification time between runs."""

    def __init__(self, memory: pathlib.Path):
        self._memory = memory
        self._known: dict[str, list] = {}
        self._changed = False
        try:
            known = json.loads(memory.read_bytes())
            self._known = known if isinstance(known, dict) else {}
        except (OSError, ValueError):
            pass  # A lost memory costs only the time to hash again.

    def digest(self, path: str) -> str:
        """The checksum of one file."""
        stat = os.stat(path)
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = self._known.get(os.path.abspath(path))
        if isinstance(entry, list) and len(entry) == 3 and entry[:2] == stamp:
            return entry[2]
        with open(path, "rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
        self._known[os.path.abspath(path)] = [*stamp, checksum]
        self._changed = True
        return checksum

    def save(self) -> None:
        """Writes what was learned."""
        if self._changed:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._memory.with_name(f"{self._memory.name}.{os.getpid()}")
            temporary.write_text(json.dumps(self._known))
            os.replace(temporary, self._memory)


def _function(function: types.FunctionType, seen: frozenset[int]) -> dict:
    inner = inspect.unwrap(function)
    variables = inspect.getclosurevars(inner)
    own = {
        name: describe(value, seen)
        for name, value in _globals(inner).items()
        if isinstance(value, _PLAIN + (tuple, frozenset, bytes))
        or (
            isinstance(value, types.FunctionType | functools.partial)
            and _is_followed(value, inner.__module__)
        )
    }
    own.update(_reached_through_modules(inner, seen))
    out = {
        "function": f"{inner.__module__}.{inner.__qualname__}",
        "source": source(inner),
        "defaults": describe(inner.__defaults__, seen),
        "keyword_defaults": describe(inner.__kwdefaults__, seen),
        "closure": describe(variables.nonlocals, seen),
        "globals": sorted(([name, what] for name, what in own.items()), key=repr),
    }
    if inner is not function:  # a decorator's own arguments live in the wrapper
        cells = inspect.getclosurevars(function).nonlocals
        out["wrapper"] = [source(function, follow=False), describe(cells, seen | {id(inner)})]
    return out


def _is_followed(value, module: str) -> bool:
    """Whether a function that one of `module` calls is described: its own, or no installed one."""
    while isinstance(value, functools.partial):
        value = value.func
    if not isinstance(value, types.FunctionType):
        return False
    inner = inspect.unwrap(value)
    return inner.__module__ == module or not _is_installed(inner.__code__.co_filename)


def _names(code: types.CodeType) -> set[str]:
    """What code names, that of functions inside of it too."""
    inside = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inside))


def _globals(function: types.FunctionType) -> dict:
    space = function.__globals__
    return {name: space[name] for name in sorted(_names(function.__code__)) if name in space}


def _reached_through_modules(function: types.FunctionType, seen: frozenset[int]) -> dict:
    """What a function uses as `module.name`, of modules that are not installed."""
    found = {}
    for alias, module in _globals(function).items():
        path = getattr(module, "__file__", None)
        if not isinstance(module, types.ModuleType) or path is None or _is_installed(path):
            continue
        for name in sorted(_names(function.__code__) & set(vars(module))):
            value = vars(module)[name]
            if isinstance(value, _PLAIN) or _is_followed(value, module.__name__):
                found[f"{alias}.{name}"] = describe(value, seen)
    return found


_INSTALLED = tuple(
    os.path.join(os.path.realpath(path), "")
    for path in {sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib")}
)


def _is_installed(path: str) -> bool:
    return path.startswith("<") or os.path.realpath(path).startswith(_INSTALLED)


def source(function: types.FunctionType, *, follow: bool = True) -> str:
    """Normalised source: no comments, docstrings or layout. Bytecode where there is no source."""
    code = function.__code__
    try:
        lines, _ = inspect.getsourcelines(function if follow else code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError, TypeError):
        # A lambda inside an expression, or code typed at a prompt.
        consts = [
            c.co_code.hex() if isinstance(c, types.CodeType) else describe(c)
            for c in code.co_consts
        ]
        return repr((code.co_code.hex(), consts, code.co_names, code.co_varnames))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body[0] = ast.Pass()
    return ast.unparse(tree)


def _object(value, seen: frozenset[int]) -> dict:
    if _is_library(type(value).__module__):
        state = None
    elif dataclasses.is_dataclass(value):
        state = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    else:
        state = getattr(value, "__dict__", None)
    out = {"class": _name(type(value))}
    if callable(value) and isinstance(type(value).__call__, types.FunctionType):
        out["call"] = source(type(value).__call__)
    if state is not None:
        out["state"] = describe(dict(state), seen)
    elif " at 0x" not in (text := repr(value)):
        out["repr"] = text
    return out


def _is_library(module: str | None) -> bool:
    return (module or "").split(".")[0] in _LIBRARIES


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
