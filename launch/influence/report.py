"""Shows the documents with the most influence on each query, analyses of all scores, and a page to look through them.

Example, after `espalier influence score` wrote /tmp/scores.jsonl:

  espalier influence report --scores=/tmp/scores.jsonl --top=5 --out=/tmp/report

The tables go to standard output, and with --out to report.md and report.json of that folder, beside curves.svg and viewer.html, which a
browser opens without a network. "per nat" is the score divided by the completion's negative log-likelihood, so that queries of different
length can be compared; completions of less than 0.1 nats are divided by 0.1 and marked. "per norm" is the score divided by the
norm of the document's gradient. Labels in the files of queries and documents ("task", "kind", "correct", "control", "answer",
"procedure"; "source") add analyses: docs/use/influence.md.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

from espalier.common.bars import Bar
from espalier.common.ranges import Size
from espalier.common.storage import output_files, paths
from espalier.data.text import documents as document_files
from espalier.launch import cli
from espalier.launch.config.setting_flags import File, Folder
from espalier.launch.inference import row_files
from espalier.launch.inference.row_files import RowFileError
from espalier.launch.influence import labels, outputs

_CURVES = (
    "Summed positive influence per nat of the first documents, with Student intervals over queries"
)
_COMPARED = ("documents", "length")  # what --beside must have in common, beside prompts


def run(
    *,
    scores: File,
    queries: File | None = None,
    documents: File | None = None,
    beside: Sequence[File] = (),
    top: Size = 10,
    bottom: bool = False,
    rank_by: Literal["score", "per_norm"] = "score",
    within: Size | None = None,
    out: Folder | None = None,
) -> None:
    """Writes a report to a folder, or prints it.

    Args:
      scores: file of scores that `influence score` wrote.
      queries: by default the file that was scored.
      documents: by default the file that was scored.
      beside: scores by another method or model, whose rankings the same tables compare; repeatable.
      top: number of documents of each query at both ends.
      bottom: also the documents at the other end.
      rank_by: the score, or the score divided by the norm of the document's gradient.
      within: top documents that are searched and compared (default: a hundredth of all, from 10 to 500).
      out: write report.md, report.json, curves.svg (influence per nat against the number of documents) and viewer.html to this folder.

    Raises:
      RowFileError: see `report`.
    """
    from espalier.launch.influence import pages

    if out:
        row_files.check_folder(out)
    files = {"queries": queries, "documents": documents, "beside": beside}
    table, shown = report(scores, **files, top=top, rank_by=rank_by, within=within)
    text = "\n".join(pages.markdown(table, bottom=bottom))
    print("\n".join(pages.summary(table)) if out else text)
    if not out:
        return
    if not paths.is_remote(out):
        os.makedirs(out, exist_ok=True)
    curves: dict[str, str | bytes] = {}
    if picture := pages.curves(table["analyses"]["curves"]):
        curves["curves.svg"] = picture
        text += f"\n![{_CURVES}](curves.svg)\n"
    written: dict[str, str | bytes] = {
        "report.md": (text + "\n").encode("utf-8", "backslashreplace"),
        "report.json": json.dumps(table, indent=1) + "\n",
        **curves,
        "viewer.html": pages.page(shown),
    }
    for name, content in written.items():
        output_files.write(paths.join(out, name), content)
    _, *rest, last = written
    print(f"written: {paths.join(out, 'report.md')}, {', '.join(rest)} and {last}")


def report(
    scores: str,
    *,
    queries: str | None = None,
    documents: str | None = None,
    beside: Sequence[str] = (),
    top: int = 10,
    rank_by: str = "score",
    within: int | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the report as JSON values, and the data of the viewer; `run` describes the arguments.

    Raises:
      RowFileError: scores that are not complete or not comparable, or a file that is missing or has changed.
    """
    from espalier.launch.influence import analyses, pages, statistics
    from espalier.trainers.influence import queries as query_files

    scores = outputs.local_scores(scores)
    tops = outputs.read_top(scores)
    prepared, record = query_files.load(pathlib.Path(outputs.queries_folder(scores)))
    record["queries"]["path"] = queries = queries or record["queries"]["path"]
    asked = outputs.asked(scores, record, queries)
    documents = documents or record["documents"].get("path")
    if documents is not None:
        outputs.check_same(documents, record["documents"], "documents")
    count = tops["documents"]
    if within and record["per_layer"]:
        outputs.check_stored(tops, within, "within")
    within = min(within or analyses.searched(count), count)
    suffix = "" if rank_by == "score" else "_per_norm"
    firsts = [[e["document"] for e in query[f"top{suffix}"][:within]] for query in tops["queries"]]
    layers = statistics.LayerSums(firsts) if record["per_layer"] else None

    def add_layers(document: int, row: Mapping[str, Any]) -> None:
        if layers is not None and row.get("layers"):
            layers.add(document, row["layers"])

    outputs.check_stored(tops, top)
    scores_NQ, norms_N = outputs.read_table(scores, count, add_layers)
    if scores_NQ.shape[1] != len(asked):
        raise RowFileError(
            f"--queries={queries} has {len(asked)} queries, and --scores={scores} {scores_NQ.shape[1]}: give the file that was "
            "scored."
        )
    ranked = outputs.ranked_by(rank_by, scores_NQ, norms_N, method=record["method"])
    patterns = {
        (name, q): own
        for q, query in enumerate(asked)
        for name in ("answer", "procedure")
        if (own := getattr(query, name)) is not None
    }
    wanted = {i for chosen in outputs.shown(tops, top) for i in chosen}
    limit = record["documents"].get("limit")
    texts, sources, matching = _corpus(
        scores, documents, wanted, patterns, count=count, limit=limit
    )
    tokens = _token_rows(scores, queries=len(asked), count=count)
    given = analyses.Inputs(
        scores_NQ=ranked,
        queries=asked,
        nats=[max(float(x), analyses.LEAST_NATS) if x == x else None for x in prepared.nats],
        sources=sources,
        matching=None if documents is None else matching,
        layers=layers,
        tokens=tokens,
        method=record["method"],
        others=_others(beside, record, asked, count, rank_by),
        within=within,
    )
    made = pages.Made(
        **{"record": record, "tops": tops, "prepared": prepared, "given": given, "texts": texts},
        **{"norms_N": norms_N, "rank_by": rank_by, "top": top},
        analyses=analyses.analyse(given),
    )
    return pages.table(made), pages.shown(made)


def _others(
    beside: Sequence[str],
    record: Mapping[str, Any],
    asked: Sequence[labels.Query],
    count: int,
    rank_by: str,
) -> dict[str, Any]:
    """Returns other scores [N, Q] by method, and file or path where needed; those without norms are not divided by any."""
    from espalier.trainers.influence import queries as query_files

    result: dict[str, Any] = {}
    for path in map(outputs.local_scores, beside):
        outputs.read_top(path)
        _, other = query_files.load(pathlib.Path(outputs.queries_folder(path)))
        differing = [
            name for name in _COMPARED if _identity(other[name]) != _identity(record[name])
        ]
        same = _identity(other["queries"]) == _identity(record["queries"])
        theirs = outputs.asked(path, other, record["queries"]["path"] if same else None)
        if [one.prompt for one in theirs] != [one.prompt for one in asked]:
            differing = ["queries", *differing]
        if differing:
            raise RowFileError(
                f"--beside={path} has scores of other {', '.join(differing)} than --scores: give scores of the same files."
            )
        scores_NQ, norms_N = outputs.read_table(path, count)
        if rank_by == "per_norm" and norms_N is not None:
            scores_NQ = outputs.per_norm(scores_NQ, norms_N)
        method, own = other["method"], pathlib.Path(path)
        pairs = zip(theirs, asked, strict=True)
        if changed := sum(one.completion != first.completion for one, first in pairs):
            method += f", {changed:,} completions of its own"
        names = (method, f"{method} ({own.name})", f"{method} ({own})")
        taken = (record["method"], *result)
        result[next((name for name in names if name not in taken), names[-1])] = scores_NQ
    return result


def _identity(value: Any) -> Any:
    """Returns what identifies recorded files, wherever they are."""
    return {k: v for k, v in value.items() if k != "path"} if isinstance(value, dict) else value


def _corpus(
    scores: str,
    path: str | None,
    wanted: Collection[int],
    patterns: Mapping[Any, labels.Pattern],
    *,
    count: int,
    limit: int | None,
) -> tuple[dict[int, str], list[str] | None, Mapping[Any, Any]]:
    """Reads the documents once.

    Returns texts of wanted documents by number; the source of each document, None if no document has one; and numbers of the
    documents with a pattern, by its key, empty if the documents are no file.

    Args:
      scores: file of scores, which decoded texts are beside.
      path: JSON lines of documents; None for those of a mixture.
      wanted: numbers of the documents whose texts are returned.
      patterns: what is searched, by any key.
      count: number of scored documents.
      limit: number of first documents of the file that were scored; None for all.

    Raises:
      RowFileError: the file of decoded texts is damaged.
      DataError: the file cannot be read.
    """
    from espalier.launch.influence import inputs

    texts = _decoded(scores)
    if path is None:
        return {i: texts[i] for i in wanted if i in texts}, None, {}
    file = row_files.local(path, "documents")
    sources: list[str] = []

    def each() -> Iterator[str]:
        lines = document_files.read_json_lines(file, example=inputs.DOCUMENT_EXAMPLE)
        numbered = enumerate(itertools.islice(lines, limit))
        quiet = None if count > 10_000 else True
        for i, (_, row) in Bar(numbered, desc="documents", total=count, disable=quiet):
            sources.append(labels.source(row))
            text = row.get("text", row.get("tokens", ""))
            if not isinstance(text, str):
                text = texts.get(i, json.dumps(text))
            if i in wanted:
                texts[i] = text
            yield text

    matching = labels.matches(each(), patterns)
    named = any(source != labels.NO_SOURCE for source in sources)
    return {i: texts[i] for i in wanted if i in texts}, sources if named else None, matching


def _decoded(scores: str) -> dict[int, str]:
    """Returns the texts of documents that were read as tokens."""
    path = outputs.texts_file(scores)
    if not os.path.isfile(path):
        return {}
    rows = row_files.read(path, example='{"document": 0, "text": "..."}')
    try:
        return {int(row["document"]): str(row["text"]) for _, row in rows}
    except (KeyError, TypeError, ValueError):
        raise RowFileError(_damaged(path, "a row has no document and text")) from None


def _token_rows(scores: str, *, queries: int, count: int) -> list[dict[str, Any]]:
    """Returns the token scores of top and bottom documents; none if they were not asked for.

    Args:
      scores: file of scores.
      queries, count: numbers of queries and documents.

    Raises:
      RowFileError: the file is damaged.
    """
    path = outputs.tokens_file(scores)
    if not os.path.isfile(path):
        return []
    try:
        rows = [row for _, row in row_files.read(path, example='{"query": 0, "scores": [0.1]}')]
    except document_files.DataError as error:
        raise RowFileError(_damaged(path, str(error))) from None
    for number, row in enumerate(rows, 1):
        ids = row.get("query"), row.get("document")
        texts, values = row.get("texts"), row.get("scores")
        if (
            not all(
                type(i) is int and 0 <= i < n for i, n in zip(ids, (queries, count), strict=True)
            )
            or not isinstance(texts, list)
            or not isinstance(values, list)
            or len(texts) != len(values)
            or not all(isinstance(text, str) for text in texts)
            or not all(type(value) in (int, float) for value in values)
            or not isinstance(row.get("spurious"), bool)
        ):
            raise RowFileError(_damaged(path, f"line {number} has no text and score of each token"))
    return rows


def _damaged(path: str, problem: str) -> str:
    return (
        f"{path} is damaged ({problem}): delete it, and run the same `espalier influence score` command again, which writes it "
        "anew."
    )


_ADDRESSES = ("scores", "queries", "documents", "beside", "out")
main = cli.command(__doc__, "influence report", run, addresses=_ADDRESSES, huge_pages=False)

if __name__ == "__main__":
    raise SystemExit(main())
