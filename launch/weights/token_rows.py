"""Texts that a transform of a model is measured on, as rows without padding."""

from typing import Any

import numpy as np

from launch.inference import row_files
from launch.run.load_run import EXAMPLE
from model.transforms.base import TransformError

_LENGTH = 512


def token_rows(loaded: Any, path: str, *, flag: str, length: int | None = None) -> np.ndarray:
    """Returns the texts of a file, one after the other, cut into C rows of T tokens: [C, 1, T].

    Args:
      loaded: the run whose vocabulary reads the texts.
      path: file of rows as for launch.score.
      flag: the flag with the path, for messages; `--<flag>_length` is T.
      length: T; None for 512.

    Raises:
      TransformError: the texts are shorter than a row.
      RowFileError: the file cannot be read.
    """
    length = length or _LENGTH
    rows = row_files.read(path, example=EXAMPLE, flag=flag)
    ids = [id for where, row in rows for id in loaded.context(loaded.tokens(row, where))]
    if len(ids) < length:
        raise TransformError(
            f"--{flag}={path} has {len(ids)} tokens, fewer than one row of {length}: give more text, or a smaller "
            f"--{flag}_length."
        )
    count = len(ids) // length
    return np.asarray(ids[: count * length], np.int32).reshape(count, 1, length)
