"""Flags of `launch.evaluate win_rate`, and what they mean together."""

import argparse
import pathlib
from collections.abc import Sequence

from launch.evaluation.judges import spec
from launch.evaluation.judges.base import JudgeError

_OWN_CONFIG = "t5x_configs/runs/load_run.gin"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    group = parser.add_argument_group("answers, rows of launch.generate")
    group.add_argument("--a", metavar="[NAME=]FILE", help="of one system")
    group.add_argument("--b", metavar="[NAME=]FILE", help="of the other")
    group.add_argument(
        "--systems",
        nargs="+",
        metavar="[NAME=]FILE",
        help="of two systems or more, each against each, in place of --a and --b",
    )
    group = parser.add_argument_group("judging")
    group.add_argument("--judge", required=True, metavar="KIND:WHERE", help="one of those below")
    group.add_argument("--out", required=True, metavar="DIR", help="where results go")
    group.add_argument(
        "--attempts",
        type=int,
        default=3,
        metavar="N",
        help="times that a question is asked until the reply can be read (default 3)",
    )
    group.add_argument(
        "--allow_ties",
        action="store_true",
        help="let the judge call answers equally good; without it, ties are of disagreeing orders",
    )


def files(flags: argparse.Namespace) -> dict[str, str]:
    """Files of answers by the names of their systems.

    Raises:
      JudgeError: flags that do not go together, or two systems of one name.
    """
    pair = (flags.a, flags.b)
    if flags.systems is not None and pair != (None, None) or flags.systems is None and None in pair:
        raise JudgeError("Give either --a=FILE and --b=FILE, or --systems with two files or more.")
    found: dict[str, str] = {}
    for text in flags.systems or pair:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = pathlib.Path(text).stem, text
        if name in found:
            raise JudgeError(
                f"{found[name]} and {path} are both called {name!r}: name them, as in --a=NAME={path}."
            )
        found[name] = path
    return found


def default_files(flags: argparse.Namespace) -> Sequence[str]:
    """Gin files read before the user's: those of the checkpoint that judges, if one does.

    Raises:
      JudgeError: --judge names none.
      LoadError, FileNotFoundError: as load_run.default_files.
    """
    from launch.run import load_run

    checkpoint = spec.parse(flags.judge).checkpoint
    if checkpoint is None:
        return [_OWN_CONFIG]
    of_run = argparse.Namespace(checkpoint=checkpoint, gin_file=flags.gin_file)
    return load_run.default_files(of_run, own=_OWN_CONFIG)
