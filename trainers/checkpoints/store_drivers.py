"""Lets Orbax keep arrays on s3://, for which it has no driver: TensorStore has one.

Orbax 0.12 knows gs:// and paths of files; it takes any other address for a relative path. What it asks of an address are the
functions of one module each, which are replaced here; for gs:// and for files they do what they did before.
"""

import functools
import os

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from espalier.common.storage import paths


@functools.cache
def install() -> None:
    """Replaces Orbax's functions; once in a process."""
    # Steps on object stores end with a marker instead of a renaming.
    gcs_utils._GCS_PATH_PREFIX = paths.SCHEMES
    gcs_utils.get_kvstore_for_gcs = _kvstore
    tensorstore_utils._normalize_path = _plain
    tensorstore_utils._use_gcs_driver = paths.is_remote


def _plain(path: str) -> str:
    return paths.absolute(path) if paths.is_remote(path) else os.path.normpath(path)


def _kvstore(address: str) -> dict:
    spec = paths.kvstore(address)
    return {**spec, "path": spec["path"].rstrip("/")}
