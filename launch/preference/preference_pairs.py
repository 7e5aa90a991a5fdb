"""Writes preference pairs: from rated responses, or constructed pairs whose order can be verified.

Example: 1,000 messages of installed packages, in the requested language against another one:

  espalier prepare preference_pairs --kind=translations --output=/tmp/pairs.jsonl --limit=1000 --seed=1

Kinds:
  translations  from gettext catalogues of installed packages (Django and Sphinx are; Weblate has more)
  reasoning     right answers to problems of reasoning-gym (pip install reasoning-gym) against altered answers
                with a lower score
  arithmetic    right results of small sums and products against altered results
  rated         --input=FILE with rows {"prompt": ..., "responses": [...], "ratings": [...]}: the best
                response against one with a lower rating

The rows are {"prompt", "chosen", "rejected"}, which t5x_configs/data/preferences.gin reads. All kinds
but the last are constructed, without human judgements.
"""

import contextlib
import itertools
import pathlib
from typing import Any, Literal

from espalier.common.ranges import Size
from espalier.launch import cli

_CONSTRUCTED = 10_000  # default number of pairs of kinds without a natural limit


def _write_pairs(
    *,
    kind: Literal["translations", "reasoning", "arithmetic", "rated"],
    output: pathlib.Path,
    limit: Size | None = None,
    seed: int = 0,
    input: str | None = None,
    rejected: Literal["worst", "random", "next"] | None = None,
    min_margin: float | None = None,
) -> None:
    """Writes preference pairs as JSON lines.

    Args:
      kind: what the pairs are made from.
      output: write the rows to this file of JSON lines.
      limit: maximum number of pairs (default 10,000; rated: no limit).
      seed: random seed of choices.
      input: rated: the responses, .jsonl, .gz or .zst.
      rejected: rated: the response below the best one to pair it with (default worst).
      min_margin: rated: minimum difference of the two ratings (default 0).

    Raises:
      ValueError: settings of another kind or out of range.
      RowFileError, DataError: files that cannot be read or written, or no pair.
    """
    from espalier.common.bars import Bar
    from espalier.data.preference import constructed
    from espalier.data.tasks import Tally
    from espalier.data.text.documents import DataError
    from espalier.launch.inference import row_files

    options: dict[str, Any] = {"rejected": rejected, "min_margin": min_margin}
    options = {name: value for name, value in options.items() if value is not None}
    if kind != "rated" and (input or options):
        raise ValueError(f"--{next(iter(options), 'input')} is for --kind=rated.")
    if kind == "rated" and input is None:
        raise ValueError("--kind=rated needs --input.")
    # Creates the file's directory, such as a sweep arm's, but not its parents: those must exist.
    with contextlib.suppress(FileNotFoundError):
        output.parent.mkdir(exist_ok=True)
    row_files.check_output(str(output), compressed=True, others={"input": input})
    dropped = Tally()
    if kind == "rated":
        rows = row_files.read(input or "", example=constructed.EXAMPLE, flag="input")
        made = constructed.of_ratings(rows, **options, seed=seed, dropped=dropped)
    else:
        limit = limit or _CONSTRUCTED
        made = getattr(constructed, kind)(limit=limit, seed=seed)
    made = itertools.islice(made, limit)
    pairs = list(Bar(made, desc=kind, unit=" pairs"))
    if not pairs:
        reason = "There is no source: give another --input, or install packages with catalogues."
        if str(dropped):
            reason = (
                f"Dropped: {dropped}; lower --min_margin, or add responses with different ratings."
            )
        raise DataError(f"--kind={kind}: there are no pairs. {reason}")
    row_files.write(str(output), pairs)
    print(f"{output}: {len(pairs):,} pairs" + (f"; dropped: {dropped}" if str(dropped) else ""))


main = cli.command(__doc__, "prepare preference_pairs", _write_pairs)

if __name__ == "__main__":
    raise SystemExit(main())
