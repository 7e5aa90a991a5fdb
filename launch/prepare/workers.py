"""The flag --workers of commands that read much data: in how many processes of this machine they do."""

import argparse
from collections.abc import Callable
from typing import Any

from espalier.data.cache import pool
from espalier.launch import cli


def add_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="processes that read and tokenise (default: one for each core); the result is the same with any number",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def limited(run: Callable[[cli.Start], Any]) -> Callable[[cli.Start], Any]:
    """Returns a command's `run` that keeps to --workers, also while gin makes what the command is given."""

    def kept(start: cli.Start) -> Any:
        with pool.limited(start.flags.workers):
            return run(start)

    return kept
