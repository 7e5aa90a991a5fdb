"""Writes the log-probability of each token of texts under a trained model.

Example, after a run in /tmp/espalier_tiny (see espalier train --help):

  echo '{"text": "import os\\n"}' > /tmp/x.jsonl
  espalier score --checkpoint=/tmp/espalier_tiny --inputs=/tmp/x.jsonl --output=/tmp/y.jsonl

Rows are {"text": "..."} or {"tokens": [...]}, each with optional "targets" (a text or tokens), or
{"messages": [...]}, where an assistant's turn at the end is the targets. Of an encoder-decoder they are
{"inputs": ..., "targets": ...}, texts or tokens; only inputs that are texts end with EOS. The output has them in order
with "logprobs", one natural logarithm per target, and their "sum". Without targets every token of the row is
one. The model's START_TOKEN comes before the first token; if it is None, the first token of a row has no
log-probability. With --adapter, which is repeatable, all rows follow for
each, with its "adapter". Finished rows are in y.jsonl.partial until all are finished; /dev/stdout, a pipe or a
device gets each row at once.

With --beam_pipeline_options the workers of an Apache Beam pipeline score shards of the rows, each with the model read once; the
output is the same. Shards are in y.jsonl.shards until all are finished, and the same command continues after those that are there.
"""

import argparse

from espalier.common import pipelines
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.load import load_run


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_row_flags(parser)
    pipelines.add_flag(parser)


def _run(start: cli.Start) -> None:
    from espalier.launch.inference import score, shards

    pipeline = shards.pipeline(start, "espalier.launch.inference.score:scorer_of")
    given = setting_flags.given(start.flags, score.score)
    score.score(start(), **given, pipeline=pipeline)


main = load_run.command(__doc__, "score", _run, _add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
