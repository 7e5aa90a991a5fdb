"""A digest of everything that a traced function reads besides its arguments and its source.

A function of a training step closes over a model, an optimiser and settings. Their values are visited through closures, default
values, partial arguments, bound objects and fields. A value whose content cannot be known, such as an open file, raises
`Undescribable`: no digest is better than a wrong one.

Source is not visited: see trainers/programs/surroundings.py, whose digest of files and versions covers it. The code of a
function that belongs to no file, as in a notebook, is.
"""

import dataclasses
import enum
import functools
import hashlib
import os
import re
import types
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from espalier.trainers.programs import replacements, sources

_MOST_VALUES = 200_000  # visited values of a program; a step of a large configuration has thousands
_MOST_BYTES = 2**20  # of a constant array
_ATOMS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), type(NotImplemented))
_BUILT_IN = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)
_HEAP_TYPE = 1 << 9  # the flag of classes that are made while a process runs
_METACLASSES = ("builtins", "abc", "enum", "typing", "flax.", "jax", "numpy")


class Undescribable(Exception):  # noqa: N818  not an error: the program goes the ordinary way
    """A value whose content cannot be known."""


def digest(value: Any) -> str:
    """Returns a hexadecimal digest of a value and all values that it refers to, the same in every process.

    Raises:
      Undescribable: a value of unknown content, or too many values.
    """
    visitor = _Visitor()
    try:
        visitor.visit(value)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise Undescribable(f"it depends on a value that cannot be visited ({error!r})") from error
    return visitor.hash.hexdigest()


class _Visitor:
    """Hashes values in the order in which it meets them."""

    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        self._numbers: dict[int, int] = {}  # by identity, of the values met so far
        self._alive: list[Any] = []  # an identity belongs to one value only while that value lives

    def _write(self, *words: Any) -> None:
        for word in words:
            data = word if isinstance(word, bytes) else str(word).encode("utf-8", "surrogatepass")
            self.hash.update(len(data).to_bytes(8, "little") + data)

    def visit(self, value: Any) -> None:
        if isinstance(value, _ATOMS) and not isinstance(value, enum.Enum):
            self._write(type(value).__qualname__, repr(value))
            return
        if id(value) in self._numbers:
            self._write("again", self._numbers[id(value)])
            return
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        if len(self._alive) > _MOST_VALUES:
            raise Undescribable(f"it depends on more than {_MOST_VALUES} values")
        for replacement in replacements.REPLACEMENTS:
            if (instead := replacement(value)) is not NotImplemented:
                self._write("replaced")
                self.visit(instead)
                return
        self._visit_new(value)

    def _all(self, kind: str, values: Any) -> None:
        values = list(values)
        self._write(kind, len(values))
        for value in values:
            self.visit(value)

    def _visit_new(self, value: Any) -> None:
        if isinstance(value, type):
            self._class(value)
        elif isinstance(value, enum.Enum):
            self._write("enum", _name(type(value)), value.name)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._all("method", (value.__func__, value.__self__))
        elif isinstance(value, functools.partial):
            self._all("partial", (value.func, value.args, value.keywords))
        elif isinstance(value, _BUILT_IN):
            owner = getattr(value, "__self__", None)
            self._write("built-in", value.__qualname__, getattr(value, "__module__", None))
            self.visit(None if isinstance(owner, types.ModuleType) else owner)
        elif isinstance(value, types.ModuleType):
            self._write("module", value.__name__)
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif isinstance(value, Mapping):
            self._write(_name(type(value)))
            self._all("mapping", (x for item in value.items() for x in item))
        elif isinstance(value, tuple | list):
            self._write(_name(type(value)))
            self._all("sequence", value)
        elif isinstance(value, set | frozenset):
            self._write("set", *sorted(map(digest, value)))
        else:
            self._object(value)

    def _object(self, value: Any) -> None:
        if isinstance(value, np.ndarray | np.generic | jax.Array):
            self._array(value)
        elif isinstance(value, np.dtype):
            self._write("dtype", value.str, value.name)
        elif isinstance(value, Mesh):
            ids = [] if value.empty else [device.id for device in value.devices.flat]
            self._write("mesh", value.axis_names, value.devices.shape, ids, value.axis_types)
        elif isinstance(value, NamedSharding):
            self._write("sharding", value.spec, value.memory_kind)
            self.visit(value.mesh)
        elif isinstance(value, jax.ShapeDtypeStruct):
            self._write("shape", value.shape, value.dtype, value.weak_type)
            self.visit(value.sharding)
        elif isinstance(value, re.Pattern):
            self._write("pattern", value.pattern, value.flags)
        elif isinstance(value, os.PathLike):
            self._write("path", os.fspath(value))
        elif isinstance(value, range | slice):
            self._write(repr(value))
        elif dataclasses.is_dataclass(value):
            self._dataclass(value)
        elif hasattr(value, "__wrapped__") and not _is_of_python(
            type(value)
        ):  # functools.cache, jax.jit
            self._all(_name(type(value)), (value.__wrapped__,))
        else:
            self._fields(value)

    def _dataclass(self, value: Any) -> None:
        names = [field.name for field in dataclasses.fields(value)]
        if isinstance(value, nn.Module):
            if value.scope is not None:
                raise Undescribable(f"it closes over a bound module, {type(value).__name__}")
            names.remove("parent")  # the place of a module that is not bound says nothing
        self.visit(type(value))
        self._write(*names)
        for name in names:
            self.visit(getattr(value, name, None))

    def _fields(self, value: Any) -> None:
        """Visits an object of no known kind: what it holds in its dictionary and slots."""
        kind = type(value)
        slots = [s for k in kind.__mro__ for s in _slots(k) if s not in ("__dict__", "__weakref__")]
        fields = {**getattr(value, "__dict__", {})}
        fields |= {name: getattr(value, name) for name in slots if hasattr(value, name)}
        # An object of C code may hold more than can be seen here.
        if kind is not object and not (
            _is_of_python(kind) and (fields or hasattr(value, "__dict__"))
        ):
            raise Undescribable(f"it depends on an object of type {_name(kind)}")
        self.visit(kind)
        self.visit(fields)

    def _array(self, value: Any) -> None:
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended) or value.dtype == object:
            raise Undescribable(f"it closes over an array of {value.dtype}")
        if value.nbytes > _MOST_BYTES or not getattr(value, "is_fully_addressable", True):
            raise Undescribable(f"it closes over an array of {value.nbytes} bytes")
        array = np.asarray(value)
        self._write(type(value).__name__, array.dtype.name, array.shape, array.tobytes())

    def _class(self, value: type) -> None:
        meta = type(value)
        if not meta.__module__.startswith(_METACLASSES) and not sources.is_own(meta.__module__):
            raise Undescribable(f"it depends on the class {_name(value)}, made by {_name(meta)}")
        if not sources.is_installed(value.__module__) and not sources.has_file(value.__module__):
            raise Undescribable(f"it depends on the class {_name(value)}, which is in no file")
        self._write("class", _name(value))

    def _function(self, value: types.FunctionType) -> None:
        defined_in = value.__globals__.get("__name__", "")
        if defined_in == "gin.config":
            raise Undescribable(f"it depends on {value.__qualname__}, which gin configures")
        self._write("function", defined_in, value.__module__, value.__qualname__)
        self._code(value.__code__)
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(cell.cell_contents)
            except ValueError:  # a name that is not assigned yet
                cells.append("empty cell")
        attributes = {k: v for k, v in value.__dict__.items() if k != "__wrapped__"}
        self._all("closure", (cells, value.__defaults__, value.__kwdefaults__, attributes))
        if not sources.is_installed(defined_in) and not sources.is_own(defined_in):
            names = _globals_of(value.__code__)
            used = {n: value.__globals__[n] for n in sorted(names) if n in value.__globals__}
            self._all("globals", (used,))

    def _code(self, code: types.CodeType) -> None:
        self._write(code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_flags)
        self._all("constants", code.co_consts)


def _globals_of(code: types.CodeType) -> set[str]:
    """Returns names that a function and the functions in it may read from its module."""
    inner = (_globals_of(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_of_python(kind: type) -> bool:
    """Returns whether a class and its bases but `object` are made by class statements."""
    return all(
        base is object or (base.__flags__ & _HEAP_TYPE and sources.is_python(base.__module__))
        for base in kind.__mro__
    )
