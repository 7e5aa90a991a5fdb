"""Sweeps of a reproduction: run as far as they are not done, and read."""

import pathlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from launch.sweeping.file import Run

_PAPERS = pathlib.Path(__file__).parents[1]


class StoppedError(Exception):
    """A sweep was stopped and goes on when it is started again."""


def rows(
    folder: pathlib.Path,
    name: str,
    given: int | str,
    *,
    workers: int = 1,
    minutes: float | None = None,
) -> list[dict[str, Any]]:
    """The results of a sweep of a paper; what has been trained before is not trained again.

    Args:
      folder: of the sweep.
      name: of its file, as PAPER/FILE without .py.
      given: to its file: the number of seeds, or a text with more.
      workers: runs at once.
      minutes: after which it stops; the same call goes on.

    Raises:
      ValueError: the sweep could not be run.
      StoppedError: it was stopped, by a signal or the time.
    """
    from launch import cli, sweep

    file = _file(name, given)
    words = [f"--sweep={file}", f"--out={folder}", f"--workers={workers}"]
    status = sweep.main([*words, *([] if minutes is None else [f"--minutes={minutes}"])])
    if status == cli.INTERRUPTED:
        raise StoppedError(f"The sweep in {folder} was stopped; the same command goes on.")
    if status == 2:
        raise ValueError(f"The sweep {file} was not run; see above.")
    # With status 1 some runs have failed: the others are reported.
    return sweep.read_results(folder)


def planned(name: str, given: int | str) -> "tuple[Run, ...]":
    """All runs of a sweep, done or not; as `rows` takes them."""
    from launch.sweeping import file

    return file.read(_file(name, given))


def _file(name: str, given: int | str) -> str:
    return f"{_PAPERS / name}.py:{given}"
