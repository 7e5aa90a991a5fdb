"""Finds the documents with the most influence on a set of queries, and writes the corpus without them, to train again.

Example, after `espalier influence score` wrote /tmp/scores.jsonl:

  espalier influence remove --scores=/tmp/scores.jsonl --top=100 --out=/tmp/removed.jsonl --kept=/tmp/kept.jsonl

Documents are ranked by the sum of their scores over the chosen queries, which is their score for all these completions together. A
row of --out is {"document": number from 0, "score": sum}, from the highest. --kept has all other rows of the file of documents, in their
order. A model that is trained on these should complete the queries worse than one that is trained without as many random documents, which
--random_seed removes instead.
"""

import pathlib
from typing import Literal

import numpy as np
from etils import epath

from espalier.data.text import documents as document_files
from espalier.launch import cli
from espalier.launch.config.setting_flags import File, Name
from espalier.launch.inference import row_files
from espalier.launch.inference.row_files import RowFileError
from espalier.launch.influence import outputs


def run(
    *,
    scores: File,
    top: int,
    out: File,
    kept: File | None = None,
    queries: File | None = None,
    documents: File | None = None,
    kind: Name | None = None,
    task: Name | None = None,
    rank_by: Literal["score", "per_norm"] = "score",
    random_seed: int | None = None,
) -> None:
    """Writes the removed documents, and the others.

    Args:
      scores: file of scores that `influence score` wrote.
      top: number of documents that are removed.
      out: write the numbers of the removed documents to this file of JSON lines.
      kept: write the other documents to this file of JSON lines.
      queries: by default the file that was scored.
      documents: by default the file that was scored.
      kind: only queries of this kind count; controls do not.
      task: only queries of this task count.
      rank_by: the score, or the score divided by the norm of the document's gradient.
      random_seed: remove as many documents that are drawn with this seed instead.

    Raises:
      RowFileError: scores that are not complete, a file that is missing or has changed, an output that exists, or no query of
        the kind and task.
    """
    from espalier.trainers.influence import queries as query_files

    scores = outputs.local_scores(scores)
    count = outputs.read_top(scores)["documents"]
    _, record = query_files.load(pathlib.Path(outputs.queries_folder(scores)))
    if documents is not None and kept is None:
        raise RowFileError("--documents is read for --kept=FILE: give both, or remove --documents.")
    documents = documents or record["documents"].get("path")
    if kept is not None and documents is None:
        raise RowFileError(
            "--kept needs scores of a file of documents, and these are of a mixture or of sequences: leave the documents of "
            "--out out of your own data, and remove --kept."
        )
    asked = queries or record["queries"]["path"]
    inputs = {"scores": scores, "documents": documents, "queries": asked}
    for flag, path, others in (("out", out, inputs), ("kept", kept, {**inputs, "out": out})):
        row_files.check_output(path, flag, compressed=True, others=others)
        if path is not None and epath.Path(path).exists():
            raise RowFileError(f"--{flag}={path} exists: give another file, or delete it.")
    if not 1 <= top < count:
        raise RowFileError(
            f"--top={top} must be at least 1, and less than the {count:,} documents."
        )
    chosen = [
        q
        for q, one in enumerate(outputs.asked(scores, record, queries))
        if kind in (None, one.kind) and task in (None, one.task) and not one.control
    ]
    if not chosen:
        raise RowFileError(
            f"No query that is not a control has --kind={kind} and --task={task}: give labels that queries have, or none."
        )
    scores_NQ, norms_N = outputs.read_table(scores, count)
    ranked_NQ = outputs.ranked_by(rank_by, scores_NQ, norms_N, method=record["method"])
    sums_N = ranked_NQ[:, chosen].sum(1, dtype=np.float64)
    if random_seed is None:
        removed = np.argsort(-sums_N, kind="stable")[:top].tolist()
    else:
        removed = np.random.default_rng(random_seed).permutation(count)[:top].tolist()
    if kept is not None and documents is not None:
        outputs.check_same(documents, record["documents"], "documents")
        gone, file = set(removed), row_files.local(documents, "documents")
        rows = document_files.read_json_lines(file, example='{"text": "..."}')
        row_files.write(kept, (row for i, (_, row) in enumerate(rows) if i not in gone))
    row_files.write(out, ({"document": i, "score": float(sums_N[i])} for i in removed))
    what = "the highest sums" if random_seed is None else f"seed {random_seed}"
    print(f"{top:,} of {count:,} documents removed by {what} over {len(chosen):,} queries: {out}")


_ADDRESSES = ("scores", "queries", "documents", "out", "kept")
main = cli.command(__doc__, "influence remove", run, addresses=_ADDRESSES, huge_pages=False)

if __name__ == "__main__":
    raise SystemExit(main())
