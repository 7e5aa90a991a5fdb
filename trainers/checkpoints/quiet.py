"""Keeps what Orbax prints of a failed read or write, besides the error that it raises, out of standard error.

The error is raised once, to the caller, who reports it. Orbax also logs its traceback in each of its threads, leaves its
other reads and writes to asyncio, which logs each of them, and closes the event loop that they report to.
"""

import functools
import logging
import os
import sys
import types
from typing import Any

_ORBAX = f"{os.sep}orbax{os.sep}"


@functools.cache
def install() -> None:
    """Filters the logs of absl and asyncio, and the exceptions without a caller; once in a process."""
    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").addFilter(lambda record: _ORBAX not in record.getMessage())
    others = sys.unraisablehook

    def hook(raised: Any) -> None:
        if not _is_left_behind(raised):
            others(raised)

    sys.unraisablehook = hook


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _ORBAX in record.pathname)


def _is_left_behind(raised: Any) -> bool:
    """Returns whether an exception without a caller is of a read or write whose error has been raised before."""
    task = raised.object
    if isinstance(task, types.CoroutineType):
        return _ORBAX in task.cr_code.co_filename
    error = raised.exc_value
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
