"""Writes preference pairs: of rated responses, or pairs whose order is known and can be checked.

Example: 1,000 messages of installed packages, in the language that is asked for against another one:

  python -m launch.prepare preference_pairs --kind=translations --output=/tmp/pairs.jsonl --limit=1000 --seed=1

Kinds:
  translations  from gettext catalogues of installed packages (Django and Sphinx are; Weblate has more)
  reasoning     right answers to problems of reasoning-gym (pip install reasoning-gym) against altered ones
                that its scorers give less
  arithmetic    right results of small sums and products against altered ones
  rated         --input=FILE with rows {"prompt": ..., "responses": [...], "ratings": [...]}: the best
                response against one that is rated lower

The rows are {"prompt", "chosen", "rejected"}, which t5x_configs/data/preferences.gin takes. All kinds
but the last are constructed: nobody was asked what they prefer.
"""

import argparse
import contextlib
import itertools
import pathlib
from collections.abc import Sequence

from launch import cli

KINDS = ("translations", "reasoning", "arithmetic", "rated")
_CONSTRUCTED = 10_000  # default number of pairs of kinds without a natural limit
_RATED = {"input": None, "rejected": "worst", "min_margin": 0.0}  # flags of one kind


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(
        __doc__, "prepare preference_pairs", _run, add_flags=_add_flags, argv=argv
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kind", required=True, choices=KINDS, help="source of the pairs")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines to write")
    parser.add_argument(
        "--limit",
        type=int,
        metavar="N",
        help=f"most pairs (default {_CONSTRUCTED:,}; rated: all that there are)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--input", metavar="FILE", help="rated: the responses, .jsonl, .gz or .zst")
    parser.add_argument(
        "--rejected",
        choices=("worst", "random", "next"),
        help="rated: which of those rated lower than the best (default worst)",
    )
    parser.add_argument(
        "--min_margin",
        type=float,
        metavar="X",
        help="rated: by how much the two ratings differ at least (default 0)",
    )


def _run(flags: argparse.Namespace) -> None:
    rated = {name: value for name in _RATED if (value := getattr(flags, name)) is not None}
    if flags.kind != "rated" and rated:
        raise ValueError(f"--{next(iter(rated))} is for --kind=rated.")
    if flags.kind == "rated" and flags.input is None:
        raise ValueError("--kind=rated needs --input.")
    if flags.limit is not None and flags.limit < 1:
        raise ValueError("--limit must be at least 1.")
    if flags.kind != "rated" and flags.limit is None:
        flags.limit = _CONSTRUCTED
    _write(flags, {**_RATED, **rated})


def _write(flags: argparse.Namespace, rated: dict) -> None:
    import tqdm

    from data.preference import binarise, constructed
    from data.preference.tally import Tally
    from data.text.documents import DataError
    from launch.inference import row_files

    # Creates the file's directory, such as a sweep arm's, but not its parents: those must exist.
    with contextlib.suppress(FileNotFoundError):
        pathlib.Path(flags.output).parent.mkdir(exist_ok=True)
    row_files.check_output(flags.output)
    dropped = Tally()
    if flags.kind == "rated":
        rows = row_files.read(rated["input"], example=binarise.EXAMPLE, flag="input")
        made = binarise.pairs(
            rows,
            rejected=rated["rejected"],
            min_margin=rated["min_margin"],
            seed=flags.seed,
            dropped=dropped,
        )
    else:
        make = {
            "translations": constructed.translations,
            "reasoning": constructed.reasoning,
            "arithmetic": constructed.arithmetic,
        }[flags.kind]
        made = make(limit=flags.limit, seed=flags.seed)
    made = itertools.islice(made, flags.limit)
    pairs = list(tqdm.tqdm(made, desc=flags.kind, unit=" pairs", disable=None))
    if not pairs:
        raise DataError(
            f"--kind={flags.kind}: no pair is made. "
            + (
                f"Dropped: {dropped}; lower --min_margin, or add responses that are rated apart."
                if dropped
                else "There is nothing to make one of: give another --input, or install packages with catalogues."
            )
        )
    row_files.write(flags.output, pairs)
    print(f"{flags.output}: {len(pairs):,} pairs" + (f"; dropped: {dropped}" if dropped else ""))


if __name__ == "__main__":
    raise SystemExit(main())
