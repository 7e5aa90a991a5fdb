"""Commands of the project called in the process of a case, with their output."""

import contextlib
import importlib
import io
from collections.abc import Sequence

from espalier.launch import cli
from tests.faults.table import Silent, Unclear


def call(command: str, flags: Sequence[str]) -> tuple[int, str]:
    """Returns exit status and output of `python -m espalier.launch.COMMAND FLAGS`, run in this process."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            if command == "train":
                status = cli.main("Trains.", entry="espalier.launch.train:train", argv=flags)
            else:
                status = importlib.import_module(cli.module_of(command)).main(flags)
        except SystemExit as end:  # of the parser of flags
            status = end.code if isinstance(end.code, int) else 1
    return status, output.getvalue()


def refused(command: str, flags: Sequence[str], *words: str) -> str:
    """Calls a command, which must end with one clear error that has the words; returns the error.

    Raises:
      Silent: the status is 0.
      Unclear: another status, or an error without the words or too long to read.
    """
    status, text = call(command, flags)
    if status == 0:
        raise Silent(f"accepted: ...{text[-300:]}")
    message = text[text.rindex("error: ") :] if "error: " in text else ""
    if status != cli.USAGE_ERROR or not message or len(message) > 5000:
        raise Unclear(f"status {status}, an error of {len(message)} characters: ...{text[-300:]}")
    if missing := [word for word in words if word not in message]:
        raise Unclear(f"the error does not name {missing}: {message[:400]}")
    return message
