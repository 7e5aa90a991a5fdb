"""Changes of Orbax in this process: what it prints of a failed read or write, and where it keeps arrays.

Of a failure, the error is raised once, to the caller, who reports it. Orbax also logs its traceback in each of its threads,
leaves its other reads and writes to asyncio, which logs each of them, and closes the event loop that they report to.

Orbax 0.12 knows gs:// and paths of files; it takes any other address for a relative path, also s3://, for which TensorStore
has a driver. What it asks of an address are the functions of one module each, which are replaced here; for gs:// and for
files they do what they did before.
"""

import functools
import logging
import os
import sys
import types
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from espalier.common.storage import paths

_ORBAX = f"{os.sep}orbax{os.sep}"


@functools.cache
def install() -> None:
    """Changes Orbax; once in a process."""
    logging.getLogger("absl").addFilter(_is_news)
    logging.getLogger("asyncio").addFilter(lambda record: _ORBAX not in record.getMessage())
    others = sys.unraisablehook

    def hook(raised: Any) -> None:
        if not _is_left_behind(raised):
            others(raised)

    sys.unraisablehook = hook
    # Steps on object stores end with a marker instead of a renaming.
    gcs_utils._GCS_PATH_PREFIX = paths.SCHEMES
    gcs_utils.get_kvstore_for_gcs = _kvstore
    tensorstore_utils._normalize_path = _plain
    tensorstore_utils._use_gcs_driver = paths.is_remote


def _is_news(record: logging.LogRecord) -> bool:
    return not (record.exc_info and _ORBAX in record.pathname)


def _is_left_behind(raised: Any) -> bool:
    """Returns whether an exception without a caller is of a read or write whose error has been raised before."""
    task = raised.object
    if isinstance(task, types.CoroutineType):
        return _ORBAX in task.cr_code.co_filename
    error = raised.exc_value
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def _plain(path: str) -> str:
    return paths.absolute(path) if paths.is_remote(path) else os.path.normpath(path)


def _kvstore(address: str) -> dict:
    spec = paths.kvstore(address)
    return {**spec, "path": spec["path"].rstrip("/")}
