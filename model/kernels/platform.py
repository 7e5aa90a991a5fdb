"""The platform that programs are traced for, and whether fast implementations may be used.

Fast implementations (custom backward products, blocked and splash attention, chunked losses) are chosen
by `target_platform()`, never by `jax.default_backend()`, because ahead-of-time compilation can trace for
TPUs that the machine does not have. Both settings are part of JAX's trace cache key: a jitted function
that is called with another setting is traced again.
"""

import contextlib
from collections.abc import Iterator

import jax

PLATFORMS = ("cpu", "gpu", "tpu")
_ALIASES = {"cuda": "gpu", "rocm": "gpu"}

_target = jax.make_user_context(None)
_reference = jax.make_user_context(False)


def target_platform() -> str:
    """Returns the platform that is traced for: 'cpu', 'gpu' or 'tpu'; by default JAX's backend."""
    name = _target.value or jax.default_backend()
    return _ALIASES.get(name, name)


@contextlib.contextmanager
def use_platform(name: str) -> Iterator[None]:
    """Context manager that traces programs for platform `name`, whatever devices this process has.

    Raises:
      ValueError: `name` is not a known platform.
    """
    name = _ALIASES.get(name, name)
    if name not in PLATFORMS:
        raise ValueError(f"Unknown platform {name!r}: choose from {PLATFORMS}.")
    with _target(name):
        yield


@contextlib.contextmanager
def use_reference_forms() -> Iterator[None]:
    """Context manager that uses reference implementations and overrides every `implementation` argument.

    Reference implementations have no custom derivatives, so forward-mode and second derivatives work, as
    influence functions and tests need. Fast implementations support only first derivatives in reverse mode.
    """
    with _reference(True):
        yield


def reference_forms() -> bool:
    """Returns whether `use_reference_forms` is active."""
    return _reference.value
