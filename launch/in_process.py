"""Runs commands in this process, for notebooks: Python, JAX and compiled programs are shared with the cells."""

import contextlib
import io
import os
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator

from espalier.common import spelling
from espalier.launch import cli

_HUGE_PAGES = "ESPALIER_HUGE_PAGES"


class CommandError(Exception):
    """A command that does not exist, or that ended with another status than expected."""


def command(line: str, *, status: int = 0) -> str:
    """Runs a command as `espalier LINE` in a terminal, but in this process, and returns what it prints.

    Afterwards no tasks are registered, so that the next command can register other data under the same names.

    Args:
      line: the command, its sub-command and flags, quoted as in a shell; line breaks separate words.
      status: the exit status that is expected, such as 75 for a run that is interrupted.

    Raises:
      CommandError: there is no such command, or it ended with another status; the text has what it wrote to standard error.
    """
    name, *words = shlex.split(line)
    names = cli.command_names()
    if name not in names:
        raise CommandError(f"There is no command {name!r}; {spelling.nearest(name, names)}")
    out, err = io.StringIO(), io.StringIO()
    ended: int | str | None = 0
    with (
        _started([cli.CONSOLE, *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_module(cli.module_of(name), run_name="__main__")
        except SystemExit as end:
            ended = end.code
    if (ended or 0) != status:
        raise CommandError(
            f"espalier {name} ended with status {ended or 0}, not {status}.\n{err.getvalue()}".rstrip()
        )
    return out.getvalue()


@contextlib.contextmanager
def _started(argv: list[str]) -> Iterator[None]:
    """Context manager: the process looks as if it were started for a command, which does not restart it."""
    argv_before, huge_pages = sys.argv, os.environ.get(_HUGE_PAGES)
    sys.argv, os.environ[_HUGE_PAGES] = argv, "0"
    try:
        with warnings.catch_warnings():
            # The module may have been imported before; its functions are the same.
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.argv = argv_before
        if huge_pages is None:
            del os.environ[_HUGE_PAGES]
        else:
            os.environ[_HUGE_PAGES] = huge_pages
        if "espalier.data.tasks" in sys.modules:
            sys.modules["espalier.data.tasks"].clear()
