"""Scores by one method of the demonstration with SmolLM2: `espalier influence score` into a folder that is made.

  python -m espalier.launch.papers.influence.smollm_scores --to=DIR --factors=FACTORS --queries=FILE --documents=FILE --method=bm25

writes DIR/scores.jsonl and what belongs to it; all other flags are those of `espalier influence score`.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

SCORES = "scores.jsonl"


def main(argv: Sequence[str]) -> int:
    """The command line."""
    from espalier.launch.influence import score

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="write the results to this folder"
    )
    flags, rest = parser.parse_known_args(argv)
    folder = pathlib.Path(flags.to)
    folder.mkdir(parents=True, exist_ok=True)
    return score.main([f"--out={folder / SCORES}", *rest])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
