"""Describes values and functions as JSON, so that a change of either changes a cache's fingerprint.

A function's description holds its source without comments and docstrings, its defaults, closures
and partial arguments, and the functions and constants that it uses. Functions of other modules are
included unless these modules are installed; names and versions suffice for the standard library and
packages. Constants are numbers, strings, patterns and arrays, and lists, tuples, sets and dicts of
any values. Globals that the function itself modifies are excluded. An object's description holds
its attributes and the methods of its class. Descriptions do not depend on addresses, hash seeds or
the working directory.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import os
import pathlib
import re
import sys
import types
from collections.abc import Iterable, Mapping, Set

import numpy as np

from espalier.data.cache import source_code
from espalier.data.cache.file_digests import FileDigests as FileDigests

_PLAIN = (bool, int, float, str, type(None))
_FIXED = (*_PLAIN, bytes, tuple, frozenset, re.Pattern, enum.Enum, np.generic, np.ndarray)
_MUTABLE = (list, dict, set)
_PACKAGE = "espalier."
_DATA = f"{_PACKAGE}data."  # modules of this package
_LONGEST = 256  # items; longer lists, sets and dicts are described by a hash
# Described by name only: their versions belong to the environment, and their code has no end.
_LIBRARIES = ("tensorflow", "tensorflow_text", "tensorflow_datasets", "numpy", "jax", "threading")


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The values that `describe` has already visited."""

    path: frozenset[int] = frozenset()  # ids of the values that enclose the current one
    # id of a function or class -> its number; each is described once.
    code: dict[int, int] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # beginnings of modules whose code is described by name only

    def enter(self, value) -> "_Seen":
        return dataclasses.replace(self, path=self.path | {id(value)})

    def apart(self) -> "_Seen":
        """Returns an independent copy, for items without order: no item affects the others."""
        return dataclasses.replace(self, code=dict(self.code))

    def again(self, code: types.FunctionType | type) -> dict | None:
        """Returns {"again": number} for code described before; numbers new code, returns None."""
        if id(code) in self.code:
            return {"again": self.code[id(code)]}
        self.code[id(code)] = len(self.code)
        return None


def describe(value, seen: _Seen | None = None):
    """Returns JSON that is equal for two values exactly if they produce the same records."""
    if isinstance(value, enum.Enum):
        return {
            "enum": f"{name_of(type(value))}.{value.name}",
            "value": describe(value.value, seen),
        }
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, _PLAIN):
        return value if value == value else "nan"
    if isinstance(value, bytes):
        return {"bytes": _sha(value)}
    if isinstance(value, os.PathLike):
        return {"path": os.fspath(value)}
    if isinstance(value, types.ModuleType):
        return {"module": _home(value.__name__)}
    seen = seen or _Seen()
    if isinstance(value, types.FunctionType):
        if _is_library(value.__module__) or (value.__module__ or "").startswith(seen.left_out):
            return {"function": f"{value.__module__}.{value.__qualname__}"}
        return seen.again(value) or _function(value, seen)
    if id(value) in seen.path:
        return "cycle"
    seen = seen.enter(value)
    if isinstance(value, re.Pattern):
        return {"pattern": describe(value.pattern, seen), "flags": value.flags}
    if isinstance(value, list | tuple):
        return _short([describe(item, seen) for item in value])
    if isinstance(value, Set):
        return {"set": _short(sorted((describe(item, seen.apart()) for item in value), key=repr))}
    if isinstance(value, Mapping):
        items = [(describe(key, seen.apart()), item) for key, item in value.items()]
        items.sort(key=lambda pair: repr(pair[0]))
        return {"map": _short([[key, describe(item, seen)] for key, item in items])}
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:  # the bytes of object arrays are addresses
            return {"array": describe(value.tolist(), seen)}
        return {"array": [str(value.dtype), list(value.shape), _sha(value.tobytes())]}
    if isinstance(value, functools.partial):
        return {
            "partial": describe(value.func, seen),
            "args": describe(value.args, seen),
            "keywords": describe(value.keywords, seen),
        }
    if isinstance(value, types.MethodType):
        return {"method": describe(value.__func__, seen), "of": describe(value.__self__, seen)}
    if isinstance(inner := getattr(value, "__wrapped__", None), types.FunctionType):
        return {
            "wrapper": name_of(type(value)),
            "of": describe(inner, seen),
        }  # functools.cache, say
    if isinstance(value, type):
        return _class(value, seen)
    if hasattr(value, "vocab_size") and hasattr(value, "encode"):
        return vocabulary(value)
    return _object(value, seen)


def vocabulary(vocab) -> dict:
    """Describes a SeqIO vocabulary: class, size, special ids, and its state or the hash of its model."""
    out = {"class": name_of(type(vocab)), "size": int(vocab.vocab_size)}
    for key in ("bos_id", "eos_id", "pad_id", "unk_id", "extra_ids"):
        try:
            out[key] = describe(getattr(vocab, key, None))
        except NotImplementedError:  # a PassThroughVocabulary has no special ids
            out[key] = None
    model = getattr(vocab, "sp_model", None) or getattr(vocab, "model_bytes", None)
    if model is not None:
        out["model"] = _sha(model)
    else:
        state = {k: v for k, v in vars(vocab).items() if "lock" not in k}
        out["state"] = describe(state)
    return out


def _function(function: types.FunctionType, seen: _Seen) -> dict:
    inner = inspect.unwrap(function)
    variables = inspect.getclosurevars(inner)
    used = dict(source_code.used_globals(inner))
    if "__name__" in used:
        used["__name__"] = _home(inner.__module__)
    own = {
        name: describe(value, seen)
        for name, value in used.items()
        if _is_followed(value, inner.__module__, installed=_has_installed_code(inner))
    }
    own.update(_reached_through_modules(inner, used, seen))
    out = {
        "function": name_of(inner),
        "source": source_code.text(inner),
        "defaults": describe(inner.__defaults__, seen),
        "keyword_defaults": describe(inner.__kwdefaults__, seen),
        "closure": describe(variables.nonlocals, seen),
        "globals": sorted(([name, what] for name, what in own.items()), key=repr),
    }
    if inner is not function:  # the arguments of a decorator are in the wrapper's closure
        cells = inspect.getclosurevars(function).nonlocals
        text = source_code.text(function, follow=False)
        out["wrapper"] = [text, describe(cells, seen)]
    return out


def _is_followed(value, module: str, *, installed: bool) -> bool:
    """Returns whether the description of code in `module` includes a global that the code uses.

    It includes constants; functions and methods of the same module or of modules that are not
    installed; and classes and callable objects of modules that are not installed. It excludes
    lists, dicts and sets used by installed code, which may be registries.
    """
    if isinstance(value, _FIXED):
        return True
    if isinstance(value, _MUTABLE):
        return not installed
    while isinstance(value, functools.partial):
        value = value.func
    value = getattr(value, "__func__", value)
    if isinstance(value, type):
        return not source_code.is_of_package(value)
    if not callable(value):
        return False
    inner = inspect.unwrap(value)
    if isinstance(inner, types.FunctionType):
        return inner.__module__ == module or not _has_installed_code(inner)
    return not source_code.is_of_package(type(inner))


def _has_installed_code(function: types.FunctionType) -> bool:
    typed = function.__module__ == "__main__"  # for example at a prompt, without a file
    return not typed and source_code.is_installed(function.__code__.co_filename)


def _reached_through_modules(function: types.FunctionType, used: Mapping, seen: _Seen) -> dict:
    """Describes the globals used as `module.name`, of modules that are not installed."""
    described = {}
    for alias, module in used.items():
        path = getattr(module, "__file__", None)
        if not isinstance(module, types.ModuleType) or path is None:
            continue
        if source_code.is_installed(path):
            continue
        for name in sorted(source_code.names(function.__code__) & set(vars(module))):
            value = vars(module)[name]
            if _is_followed(value, module.__name__, installed=False):
                described[f"{alias}.{name}"] = describe(value, seen)
    return described


def _object(value, seen: _Seen) -> dict:
    cls = type(value)
    if _is_library(cls.__module__):
        state = None
    elif dataclasses.is_dataclass(value):
        state = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    else:
        state = getattr(value, "__dict__", None)
    out = _class(cls, seen)
    if "members" not in out and callable(value) and isinstance(cls.__call__, types.FunctionType):
        out["call"] = source_code.text(cls.__call__)
    if state is not None:
        out["state"] = describe(dict(state), seen)
    elif " at 0x" not in (text := repr(value)):
        out["repr"] = text
    return out


def _class(cls: type, seen: _Seen) -> dict:
    """Describes a class by its methods and constants, and those of bases that are not installed."""
    if again := seen.again(cls):
        return {"class": name_of(cls), "members": again}
    members = []
    for owner in cls.__mro__:
        if source_code.is_of_package(owner) or owner.__module__.startswith(seen.left_out):
            continue
        for name, member in sorted(vars(owner).items()):
            # static and class methods, properties, cached properties
            for attribute in ("__func__", "fget", "func"):
                member = getattr(member, attribute, member)
            if isinstance(inner := inspect.unwrap(member), types.FunctionType):
                # Generated methods of a dataclass follow from its fields.
                included = (
                    not dataclasses.is_dataclass(owner) or inner.__code__.co_filename[0] != "<"
                )
            else:
                included = isinstance(member, _FIXED + _MUTABLE) and not name.startswith("__")
            if included:
                members.append([f"{name_of(owner)}.{name}", describe(member, seen)])
    return {"class": name_of(cls), "members": members} if members else {"class": name_of(cls)}


def _short(items: list):
    """Returns the list; if it is long, its length and hash."""
    if len(items) <= _LONGEST:
        return items
    return {"items": len(items), "sha256": of_json(items)}


def _is_library(module: str | None) -> bool:
    return (module or "").split(".")[0] in _LIBRARIES


def name_of(item: types.FunctionType | type) -> str:
    """Returns the full name of a function or class, as caches and checkpoints know it."""
    return f"{_home(item.__module__ or '')}.{item.__qualname__}"


def _home(module: str) -> str:
    """Returns the name of a module, without the package's: of one that has moved its CACHED_AS, the name from before."""
    return getattr(sys.modules.get(module), "CACHED_AS", module).removeprefix(_PACKAGE)


def of_json(value) -> str:
    """Returns the SHA-256 of a value's JSON."""
    return _sha(json.dumps(value, sort_keys=True).encode())


def of_code(files: Iterable[pathlib.Path]) -> str:
    """Returns the SHA-256 of code files: a changed rule changes the key of what the rules made."""
    return _sha(b"\0".join(file.read_bytes() for file in files))


def code(value) -> dict[str, str]:
    """Returns digests of the code that a value runs by: of this package, and of each other class and function that it holds.

    Args:
      value: walked through containers, dataclasses, and objects of modules that are not installed. Names and versions stand for
        the standard library and for libraries.
    """
    found = {"espalier.data": _own_code()}
    held, seen = [value], set[int]()
    while held:
        each = held.pop()
        if isinstance(each, _PLAIN) or id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, list | tuple):
            held += each
        elif isinstance(each, Mapping):
            held += each.values()
        elif isinstance(each, functools.partial):
            held += [each.func, each.args, each.keywords]
        elif isinstance(each, types.MethodType):
            held += [each.__func__, each.__self__]
        else:
            item = each if isinstance(each, type | types.FunctionType) else type(each)
            if (digest := _foreign_code(item)) is not None:
                found[name_of(item)] = digest
            if item is each:
                continue
            if dataclasses.is_dataclass(each):
                held += [getattr(each, field.name) for field in dataclasses.fields(each)]
            elif not source_code.is_of_package(type(each)):
                held += getattr(each, "__dict__", {}).values()
    return dict(sorted(found.items()))


def _foreign_code(item: types.FunctionType | type) -> str | None:
    """Returns the digest of code outside of this package and of libraries: of an installed module, that of its file."""
    module = item.__module__ or ""
    if module.startswith(_DATA) or _is_library(module):
        return None
    if module.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return None
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None or not source_code.is_installed(file):
        return of_json(describe(item, _Seen(left_out=(_DATA,))))
    return of_code([pathlib.Path(file)])


@functools.cache
def _own_code() -> str:
    return of_code(sorted(pathlib.Path(__file__).parent.parent.rglob("*.py")))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
