"""Paths in a run's configuration that the machines of its job do not see."""

import glob
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch import environment
from launch.cluster.base import SubmitError
from launch.cluster.launch_config import Launch

_NAMES = re.compile(r"(^|_)(DIR|DIRECTORY|PATH|FILES?|TOKENIZER)$")  # of macros with paths


def check(settings: Launch, macros: Mapping[str, Any], gin_files: Sequence[str]) -> None:
    """Warns, on standard error, of every path that the job's machines do not share.

    Args:
      settings: the launch configuration.
      macros: final values of the configuration's macros by name. Absolute paths count under any name, and relative ones
        under names such as FILES and TOKENIZER, unless this project has them.
      gin_files: gin files of the command line.

    Raises:
      SubmitError: MODEL_DIR would be lost with a container.
    """
    unseen: dict[str, list[str]] = {}  # by reason
    for name, value in [*macros.items(), ("--gin_file", gin_files)]:
        for path in _paths(name, value):
            if reason := settings.unseen(os.path.join(settings.directory, path)):
                unseen.setdefault(reason, []).append(f"{name} = {path!r}")
                if name == "MODEL_DIR" and settings.in_container:
                    raise SubmitError(f"{name} = {path!r}: {reason}.")
    for reason, named in unseen.items():
        print(f"warning: {', '.join(named)}: {reason}.", file=sys.stderr)


def _paths(name: str, value: Any) -> Iterator[str]:
    """Yields the local paths in a value, which may have parts."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _paths(name, part)
    if not isinstance(value, str) or not value or "://" in value:
        return
    if (
        os.path.isabs(value)
        or (name == "--gin_file" or _NAMES.search(name))
        and not glob.glob(os.path.join(environment.ROOT, value))
    ):
        yield value
