"""Errors in the input: which of Python's errors they are, and the one line that a command prints of them."""

import errno
import io
import linecache
import os
import sys
import traceback
import types
from typing import cast

from espalier.launch import environment

PACKAGE = "espalier"
# Errors of disks, which name no file when they happen in the middle of one.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE)
_FULL = "Free some space, or use another disk (ESPALIER_CACHE moves the caches), then start again"
_REMEDIES = {
    errno.ENOENT: "Check this path, and the targets of links in it",
    errno.EACCES: "Change its permissions or those of its folder, or give another path",
    errno.EPERM: "Change its permissions or those of its folder, or give another path",
    errno.EROFS: "Give a path on a file system that can be written",
    errno.ENOTDIR: "A part of this path is a file: give another path, or move the file",
    errno.EISDIR: "A folder is in the place of a file: move it, or give another path",
    errno.EEXIST: "Something else is in this place: move it, or give another path",
    errno.ELOOP: "Its symbolic links lead in a circle: remove them, or give another path",
    errno.ENAMETOOLONG: "Give a shorter path",
    errno.EINVAL: "The file system does not take this name or request: give another path",
    errno.EIO: "The disk or its network failed: start again, or use another disk",
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
}
_LONGEST = 4000  # characters of a line of a message, which may quote a value of another's file
_NUL = "embedded null"  # how Python's errors about a path with this character begin
_EXHAUSTED = "RESOURCE_EXHAUSTED"  # how XLA's errors about a device's memory begin


def reason(error: BaseException) -> BaseException | None:
    """Returns the error to report instead of `error`: itself or its cause; None for a bug."""
    while _is_copy(error, error.__context__):  # without errno and the file's name
        error = cast(BaseException, error.__context__)
    if _of_project(error):
        return error
    cause: BaseException | None = error
    while cause is not None:  # libraries raise their own errors from those of the system
        if isinstance(cause, OSError) and (cause.filename or cause.errno in _DISK_ERRORS):
            return cause
        cause = cause.__cause__
    unreadable = isinstance(error, UnicodeDecodeError) and _open_file(error)
    return error if unreadable or str(error).startswith(_NUL) or _out_of_memory(error) else None


def _out_of_memory(error: BaseException) -> str:
    """Returns words for an error about memory of this host or of a device; '' for another error."""
    if isinstance(error, MemoryError):
        return "this host is out of memory"
    # The name of the class has changed between versions of jax, which is not imported here.
    of_xla = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
    return "a device is out of memory" if of_xla and _EXHAUSTED in str(error) else ""


def _is_copy(error: BaseException, of: BaseException | None) -> bool:
    """Returns whether gin made an error of another one, to add the functions that it was calling."""
    kind, base = type(error), type(of)
    return kind.__base__ is base and kind.__qualname__ == base.__qualname__


def _of_project(error: BaseException) -> bool:
    """Returns whether this project raised the error about its input."""
    if type(error).__module__.partition(".")[0] == PACKAGE:
        return True
    if not isinstance(error, ValueError | OSError) or error.__traceback__ is None:
        return False
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    source = linecache.getline(frame.f_code.co_filename, line)
    return _is_own(frame) and source.lstrip().startswith("raise ")


def _is_own(frame: types.FrameType) -> bool:
    spec = frame.f_globals.get("__spec__")  # with its own name also if the module runs as __main__
    return spec is not None and spec.name.partition(".")[0] == PACKAGE


def report(error: BaseException) -> None:
    if os.environ.get("ESPALIER_TRACEBACK") == "1":
        traceback.print_exception(error)
    error = reason(error) or error
    lines = [shortened(line, _LONGEST) for line in _text(error).split("\n")]
    print("\nerror: " + "\n".join(lines), file=sys.stderr)


def shortened(text: str, size: int) -> str:
    """Returns a text that may quote a long value, at most about `size` characters of its two ends."""
    half = size // 2
    return text if len(text) <= size else f"{text[:half]} ... {text[-half:]}"


def _text(error: BaseException) -> str:
    """Returns the message; for an error of the system, with the path, the caller and the remedy."""
    if _of_project(error) or not isinstance(error, OSError):
        if isinstance(error, UnicodeDecodeError) and (name := _open_file(error)):
            where = f"byte {error.start}: {error.reason}"
            return f"{name} is not UTF-8 text ({where}): put an undamaged copy back, or convert it."
        if memory := _out_of_memory(error):
            lines = str(error).strip().removeprefix(f"{_EXHAUSTED}: ").splitlines() or [""]
            detail = f" ({lines[0].rstrip('.')})" if lines[0] else ""
            return f"{memory}{detail}. docs/scale/out_of_memory.md has what saves memory, and how much."
        hint = ": a path holds the character NUL" if str(error).startswith(_NUL) else ""
        return f"{str(error).rstrip()}{hint}"
    names = [
        os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)
    ]
    names = names or list(filter(None, [_open_file(error)]))
    own = [f.f_code for f, _ in traceback.walk_tb(error.__traceback__) if _is_own(f)]
    file = os.path.relpath(own[-1].co_filename, environment.ROOT) if own else ""
    caller = f" ({own[-1].co_name} in {file})" if own else ""
    remedy = _REMEDIES.get(error.errno or 0, "Check this path")
    reason = f"{error.strerror or error}{caller}. {remedy}."
    return f"{' -> '.join(names)}: {reason}" if names else reason


def _open_file(error: BaseException) -> str | None:
    """Returns the name of the file that was being read or written when an error was raised, if it is known."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            name = getattr(value, "name", None) if isinstance(value, io.IOBase) else None
            if isinstance(name, str):
                return name
    return None
