"""Influence of training documents on a model's completions, by EK-FAC: fits factors, scores documents, reports, removes.

  espalier influence fit --checkpoint=/tmp/espalier_tiny --documents=d.jsonl --out=/tmp/factors
  espalier influence score --factors=/tmp/factors --queries=q.jsonl --documents=d.jsonl --out=/tmp/scores.jsonl
  espalier influence report --scores=/tmp/scores.jsonl
  espalier influence remove --scores=/tmp/scores.jsonl --top=100 --out=/tmp/removed.jsonl --kept=/tmp/kept.jsonl

A query is {"prompt": "...", "completion": "..."}, a document {"text": "..."} or {"tokens": [...]}. A row of scores is
{"scores": [one for each query], "norm": ...}, in the order of the documents. docs/use/influence.md leads from a run and files to a
table of documents; `espalier influence NAME --help` shows the flags of one part.
"""

from espalier.launch import cli

COMMANDS = cli.sub_commands("influence")

if __name__ == "__main__":
    raise SystemExit(cli.subcommand(__doc__, COMMANDS))
