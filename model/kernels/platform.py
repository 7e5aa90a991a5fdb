"""The platform that programs are traced for, and whether the fast forms may be used.

Fast formulations (custom backward products, blocked and splash attention, chunked losses) are chosen
by `target_platform()`, never by `jax.default_backend()`: ahead-of-time compilation traces for TPUs
that are absent. Both settings are part of JAX's trace cache key, so a jitted function that is called
under another setting is traced again rather than served from the cache.
"""

import contextlib
from collections.abc import Iterator

import jax

PLATFORMS = ("cpu", "gpu", "tpu")
_ALIASES = {"cuda": "gpu", "rocm": "gpu"}

_target = jax.make_user_context(None)
_reference = jax.make_user_context(False)


def target_platform() -> str:
    """Returns the platform being traced for: 'cpu', 'gpu' or 'tpu'; the default backend's unless set."""
    name = _target.value or jax.default_backend()
    return _ALIASES.get(name, name)


@contextlib.contextmanager
def use_platform(name: str) -> Iterator[None]:
    """Traces for `name` inside, whatever devices this process has.

    Raises:
      ValueError: `name` is no known platform.
    """
    name = _ALIASES.get(name, name)
    if name not in PLATFORMS:
        raise ValueError(f"Unknown platform {name!r}: choose from {PLATFORMS}.")
    with _target(name):
        yield


@contextlib.contextmanager
def use_reference_forms() -> Iterator[None]:
    """Plain forms everywhere inside, overriding every `implementation` argument.

    The plain forms have no custom derivatives, so forward-mode and second derivatives work; the fast
    forms only differentiate once, in reverse. Influence functions and tests need this.
    """
    with _reference(True):
        yield


def reference_forms() -> bool:
    """Whether `use_reference_forms` is active."""
    return _reference.value
