"""Searches the weights of a linear merge of runs by their losses on held-out texts, one file a domain or language.

Example, of three runs of one model:

  espalier merge search --models english=/tmp/english python=/tmp/python markup=/tmp/markup \\
      --held_out english=english.jsonl python=python.jsonl --out=/tmp/weights
  espalier merge --config=/tmp/weights/merge.yml --out=/tmp/merged

Files have rows as for launch.score. Equal weights and each model alone are tried first. `coordinate` then changes one weight at a
time to 0, 0.3, 0.5, 0.7 and 1; `random` draws weights. A domain's loss counts as its ratio to that of the best single model there.
Among the trials whose worst domain is within --delta of the best worst one, that with the lowest mean ratio is chosen. The table
shows also the gain of leaving out each model: a positive number is a collision. Trials are in trials.jsonl: the same command goes on
where it was. Use other texts to report the result.
All models are in memory at once.
"""

import argparse
import dataclasses

from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.merge.trials import SearchFlags


def _add_flags(parser: argparse.ArgumentParser) -> None:
    for name, what in (("models", "NAME=DIR"), ("held_out", "NAME=FILE")):
        parser.add_argument(f"--{name}", required=True, nargs="+", metavar=what)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the search")
    names = [field.name for field in dataclasses.fields(SearchFlags)][3:]
    setting_flags.add(parser.add_argument_group("search"), SearchFlags, names=names)


def _run(flags: argparse.Namespace) -> None:
    from espalier.launch.merge import search_run

    print("\n".join(search_run.run(SearchFlags(**setting_flags.given(flags, SearchFlags)))))


main = cli.command(__doc__, "merge search", _run, add_flags=_add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
