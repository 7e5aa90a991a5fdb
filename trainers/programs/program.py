"""`jit` with a store: a program that another process has compiled is neither traced nor compiled again.

The store is on with ESPALIER_PROGRAMS=1, if jax's cache of compiled programs is (launch/environment.py sets it). A program's key has
all that determines it: see trainers/programs/description.py for its function, trainers/programs/surroundings.py for the rest.
"""

import logging
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.stages import Compiled, Lowered, Traced

from espalier.model.kernels import platform
from espalier.trainers.programs import description, store, structures, surroundings
from espalier.trainers.programs.structures import Unstorable

# (shapes of a program's results): raises an error if they are refused.
Check = Callable[[Any], None]
_TRACED = (None, None, None, None)  # in a signature, of an argument without a value
_log = logging.getLogger(__name__)


def jit(
    function: Callable[..., Any], *, out_shardings: Any = None, donate_argnums: Any = ()
) -> Any:
    """Returns `jax.jit` of a function with these options; its programs are stored if `store.folder` has a folder.

    All that the function reads is in its closure, defaults and arguments; values that change on an object after the first call
    are not seen, as with `jax.jit`. All calls are made under the same mesh, rules of logical axes and flags of jax.
    """
    jitted = jax.jit(function, out_shardings=out_shardings, donate_argnums=donate_argnums)
    if store.folder() is None:
        return jitted
    return StoredFunction(jitted, function, (out_shardings, donate_argnums))


def compiled(function: Any, *args: Any, check: Check | None = None, **kwargs: Any) -> Any:
    """Returns the compiled program of a jitted function for arguments or their shapes, from the store if it is there.

    Args:
      function: of `jit`, or another with `trace`, or with a method `compiled`.
      check: called with the shapes of the results before the program is compiled or used; may raise.
    """
    own = getattr(function, "compiled", None)
    if own is not None:
        return own(*args, check=check, **kwargs)
    return _lower(function, args, kwargs, check).compile()


def _lower(jitted: Any, args: Any, kwargs: Any, check: Check | None) -> Lowered:
    traced = jitted.trace(*args, **kwargs)
    if check is not None:
        check(traced.out_info)
    return traced.lower()


class StoredFunction:
    """A jitted function whose programs are stored. `trace` and `lower` are jax's own."""

    def __init__(self, jitted: Any, function: Callable[..., Any], options: Any):
        self.__wrapped__ = function
        self._jitted = jitted
        self._options = options
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._newest: tuple[Any, Callable[..., Any]] | None = None
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        signature = _signature(args, kwargs)
        newest = self._newest
        if newest is None or newest[0] != signature:
            if _TRACED in signature[1]:
                return self._jitted(*args, **kwargs)  # a part of another program
            newest = self._newest = (signature, self.compiled(*args, **kwargs))
        return newest[1](*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Traced:
        return self._jitted.trace(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Lowered:
        return self._jitted.lower(*args, **kwargs)

    def compiled(self, *args: Any, check: Check | None = None, **kwargs: Any) -> Any:
        """See `compiled`; a call with these arguments then finds the program made."""
        signature = _signature(args, kwargs)
        with self._lock:
            program = self._programs.get(signature)
            if program is None:
                program = self._load_or_compile(signature, args, kwargs, check)
                self._programs[signature] = program
        return program

    def _load_or_compile(
        self, signature: Any, args: Any, kwargs: Any, check: Check | None
    ) -> Compiled:
        name = getattr(self.__wrapped__, "__qualname__", repr(self.__wrapped__))
        path = key = None
        try:
            executable = _executable()
            key = self._key(name, signature)
            if (folder := store.folder()) is not None:
                path = folder / f"{store.digest(key)}{store.SUFFIX}"
        except (description.Undescribable, Unstorable) as reason:
            _log.debug("The program of %s is not stored: %s.", name, reason)
        if path is not None and (program := store.read(path, executable.load)) is not None:
            if check is not None:
                check(program.out_info)
            return program
        lowered = _lower(self._jitted, args, kwargs, check)
        if path is None:
            return lowered.compile()
        with executable.recorded() as entry:
            program = lowered.compile()
        try:
            store.write(path, key, *executable.parts(program, entry))
        except Unstorable as reason:
            _log.debug("The program of %s is not stored: %s.", name, reason)
        return program

    def _key(self, name: str, signature: Any) -> dict[str, Any]:
        if jax.process_count() > 1:  # one process might load a program that another compiles
            raise Unstorable("several processes run it")
        definition, leaves, forms = signature
        return {
            "function": name,
            "closure": description.digest((self.__wrapped__, self._options)),
            "arguments": structures.tree(definition),
            "leaves": [_leaf_key(leaf) for leaf in leaves],
            "forms": list(forms),
            **surroundings.of_process(),
            **surroundings.of_call(),
        }


def _executable() -> Any:
    """Returns the module that knows jax's private interfaces; raises Unstorable if this jax has others."""
    try:
        from espalier.trainers.programs import executable
    except ImportError as error:
        raise Unstorable(f"this version of jax has another form of programs ({error})") from error
    return executable


def _signature(args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...], tuple[str, bool]]:
    """Returns what distinguishes the programs of a function: the arguments' tree and leaves, and the forms that models have."""
    leaves, definition = jax.tree.flatten((args, kwargs))
    forms = platform.target_platform(), platform.reference_forms()
    return definition, tuple(map(_leaf, leaves)), forms


def _leaf(leaf: Any) -> tuple[Any, ...]:
    """Returns (shape, dtype, whether weakly typed, sharding if the array is bound to it) of an argument or its shape."""
    if isinstance(leaf, jax.core.Tracer):
        return _TRACED
    if (committed := getattr(leaf, "committed", None)) is not None:  # faster than isinstance
        placed = leaf.sharding if committed else None
        # Arrays of random keys have no weak types.
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), placed
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.shape, leaf.dtype, False, None
    return (), type(leaf), True, None  # a number of Python


def _leaf_key(leaf: tuple[Any, ...]) -> list[Any]:
    shape, dtype, weak, placed = leaf
    name = dtype.__name__ if isinstance(dtype, type) else str(dtype)
    return [list(shape), name, weak, structures.sharding(placed)]
