"""Reads files of a checkpoint that may be hostile: nothing outside of it, no devices, bounded sizes."""

import json
import os
import pathlib
import stat
from typing import Any

from espalier.common import files

MAX_JSON = 16 << 20  # bytes of a JSON file of settings
MAX_BYTES = 128 << 20  # bytes of a vocabulary


class CheckpointFileError(ValueError):
    """Files of a checkpoint are missing, damaged, inconsistent, or not safe to read."""


def resolve(folder: str | os.PathLike, name: str) -> pathlib.Path | None:
    """Returns the path of a checkpoint's file without links; None if there is no such file.

    Args:
      folder: the checkpoint's directory.
      name: path of the file in it.

    Raises:
      CheckpointFileError: it is no regular file, or a link leads out of the checkpoint.
    """
    path = pathlib.Path(folder, name)
    try:
        if not os.path.lexists(path):
            return None
        root, target = pathlib.Path(folder).resolve(), path.resolve()
        if not files.is_within(target, root):
            raise CheckpointFileError(
                f"{path} is a link to {target}, outside of the checkpoint. Put the file itself there if "
                "you trust it"
            )
        if not stat.S_ISREG(target.stat().st_mode):
            raise CheckpointFileError(f"{path} is not a regular file. Copy the checkpoint again")
    except (OSError, UnicodeError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise CheckpointFileError(
            f"{str(path)[:300]!r} cannot be read ({error}). Copy the checkpoint again"
        ) from None
    return target


def read(folder: str | os.PathLike, name: str, *, max_bytes: int = MAX_BYTES) -> bytes | None:
    """Returns the content of a checkpoint's file; None if there is no such file.

    Raises:
      CheckpointFileError: see `resolve`; or the file is longer than `max_bytes`.
    """
    path = pathlib.Path(folder, name)
    if (target := resolve(folder, name)) is None:
        return None
    try:
        with open(target, "rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointFileError(
            f"{path} cannot be read ({error.strerror}). Change its permissions"
        ) from None
    if len(content) > max_bytes:
        raise CheckpointFileError(
            f"{path} is longer than {max_bytes:,} bytes, the limit for such a file. Do not use this "
            "checkpoint, or copy it again"
        )
    return content


def read_text(folder: str | os.PathLike, name: str, *, max_bytes: int) -> str | None:
    """Returns the text of a checkpoint's file; None if there is no such file.

    Raises:
      CheckpointFileError: see `read`; or the file is not UTF-8.
    """
    content = read(folder, name, max_bytes=max_bytes)
    try:
        return None if content is None else content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointFileError(
            f"{pathlib.Path(folder, name)} is not UTF-8 at byte offset {error.start}. Copy it again from "
            "the checkpoint"
        ) from None


def read_json(folder: str | os.PathLike, name: str, *, max_bytes: int = MAX_JSON) -> dict[str, Any]:
    """Returns the object in a JSON file of settings, or {} if there is no such file.

    Raises:
      CheckpointFileError: see `read`; or the file is not a JSON object.
    """
    path = pathlib.Path(folder, name)
    content = read(folder, name, max_bytes=max_bytes)
    if content is None:
        return {}
    try:
        values = json.loads(content)
    except RecursionError:
        raise CheckpointFileError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise CheckpointFileError(
            f"{path} is damaged: {error}. Copy it again from the checkpoint"
        ) from None
    if not isinstance(values, dict):
        raise CheckpointFileError(f"{path} is not a JSON object. Copy it again from the checkpoint")
    return values
