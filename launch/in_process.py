"""Runs commands in this process, for notebooks: JAX, imports and compiled programs are shared with the cells."""

import contextlib
import io
import os
import runpy
import shlex
import sys
import warnings
from collections.abc import Iterator

from espalier.launch import cli


class CommandError(Exception):
    """A command that ended with a status other than 0; its text is what the command wrote to standard error."""


def command(line: str, *, status: int = 0) -> str:
    """Runs a command as `espalier LINE` does, in this process, and returns what it prints.

    Tasks that the command registers are removed when it ends, so that the next command can have others of the same names.

    Args:
      line: words of the command line, quoted as in a shell; line breaks separate words.
      status: the exit status that is expected, such as 75 for a run that is interrupted.

    Raises:
      CommandError: there is no such command, or it ended with another status.
    """
    name, *words = shlex.split(line)
    if name not in cli.command_names():
        raise CommandError(f"There is no command {name!r}: use one of {', '.join(cli.command_names())}.")
    out, err = io.StringIO(), io.StringIO()
    ended: int | str | None = 0
    with _started(["espalier", *words]), contextlib.redirect_stdout(out):
        with contextlib.redirect_stderr(err):
            try:
                runpy.run_module(cli.module_of(name), run_name="__main__", alter_sys=False)
            except SystemExit as end:
                ended = end.code
    if (ended or 0) != status:
        raise CommandError(f"espalier {name} ended with status {ended}.\n{err.getvalue()}".strip())
    return out.getvalue()


@contextlib.contextmanager
def _started(argv: list[str]) -> Iterator[None]:
    """Context manager: the process looks as if it were started for a command, and is never restarted."""
    before, huge_pages = sys.argv, os.environ.get("ESPALIER_HUGE_PAGES")
    sys.argv, os.environ["ESPALIER_HUGE_PAGES"] = argv, "0"
    try:
        with warnings.catch_warnings():
            # The module may have been imported before; its functions are the same.
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        sys.argv = before
        if huge_pages is None:
            del os.environ["ESPALIER_HUGE_PAGES"]
        else:
            os.environ["ESPALIER_HUGE_PAGES"] = huge_pages
        if "espalier.data.tasks" in sys.modules:
            sys.modules["espalier.data.tasks"].clear()
