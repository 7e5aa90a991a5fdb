"""Shows the documents with the most influence on each query, from a file of scores.

Example, after `python -m launch.influence score` wrote /tmp/scores.jsonl:

  python -m launch.influence report --scores=/tmp/scores.jsonl --top=5 --out=/tmp/report

The table goes to standard output, and with --out also to report.md and report.json of that folder. "per nat" is the score
divided by the completion's negative log-likelihood, so that queries of different length can be compared; completions of less
than 0.1 nats are divided by 0.1 and marked. "per norm" is the score divided by the norm of the document's gradient.
"""

import argparse
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch import cli
from launch.attribution import ranking
from launch.inference import row_files

LEAST_NATS = 0.1
_SNIPPET = 90


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(
        __doc__, "influence report", _run, add_flags=_add_flags, huge_pages=False, argv=argv
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scores", required=True, metavar="FILE", help="that `score` wrote")
    parser.add_argument("--queries", metavar="FILE", help="by default the file that was scored")
    parser.add_argument("--documents", metavar="FILE", help="by default the file that was scored")
    parser.add_argument("--top", type=int, default=10, metavar="N", help="documents (default 10)")
    parser.add_argument("--bottom", action="store_true", help="also the documents at the other end")
    parser.add_argument(
        "--rank_by",
        choices=("score", "per_norm"),
        default="score",
        help="the score (default), or the score divided by the norm of the document's gradient",
    )
    parser.add_argument("--out", metavar="DIR", help="folder for report.md and report.json")


def _run(flags: argparse.Namespace) -> None:
    if flags.out:
        row_files.check_folder(flags.out)
    if flags.top < 1:
        raise row_files.RowFileError(f"--top={flags.top} must be at least 1.")
    table = report(
        flags.scores,
        queries=flags.queries,
        documents=flags.documents,
        top=flags.top,
        bottom=flags.bottom,
        rank_by=flags.rank_by,
    )
    text = "\n".join(markdown(table))
    print(text)
    if flags.out:
        folder = pathlib.Path(flags.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.md").write_text(text + "\n", encoding="utf-8")
        (folder / "report.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def report(
    scores: str,
    *,
    queries: str | None = None,
    documents: str | None = None,
    top: int = 10,
    bottom: bool = False,
    rank_by: str = "score",
) -> dict[str, Any]:
    """Returns the top documents of each query as JSON values.

    Args:
      scores: file of scores.
      queries, documents: the files that were scored; None for the recorded ones.
      top: number of documents.
      bottom: whether to show the other end of the ranking too.
      rank_by: 'score' or 'per_norm'.

    Raises:
      RowFileError: scores that are not complete, or a file that is missing.
    """
    from trainers.influence import queries as query_files

    tops = ranking.read_top(scores)
    prepared, record = query_files.load(pathlib.Path(ranking.queries_folder(scores)))
    queries = queries or record["queries"]["path"]
    documents = documents or record["documents"].get("path")
    asked = [row for _, row in row_files.read(queries, example="{...}", flag="queries")]
    if len(asked) != len(tops["queries"]):
        raise row_files.RowFileError(
            f"--queries={queries} has {len(asked)} queries, and --scores={scores} {len(tops['queries'])}: give the file that was "
            "scored."
        )
    suffix = "" if rank_by == "score" else "_per_norm"
    ends = [f"top{suffix}", *([f"bottom{suffix}"] if bottom else [])]
    shown = {e["document"] for q in tops["queries"] for end in ends for e in q[end][:top]}
    texts = _texts(documents, shown)
    spurious = _spurious(scores)
    entries = []
    for q, (row, query) in enumerate(zip(asked, tops["queries"], strict=True)):
        nats = float(prepared.nats[q])
        least = max(nats, LEAST_NATS) if nats == nats else None
        entry: dict[str, Any] = {
            **{"prompt": row.get("prompt"), "completion": row.get("completion")},
            **{
                "nats": nats if least else None,
                "nearly_certain": bool(least and nats < LEAST_NATS),
            },
        }
        for end in ends:
            entry[end.removesuffix("_per_norm")] = [
                {
                    "document": item["document"],
                    "score": item["score"],
                    "per_nat": item["score"] / least if least else None,
                    "value": item["value"],
                    "spurious": spurious.get((q, item["document"])),
                    "text": texts.get(item["document"]),
                }
                for item in query[end][:top]
            ]
        entries.append(entry)
    return {
        "method": record["method"],
        "rank_by": rank_by,
        "documents": tops["documents"],
        "queries": entries,
    }


def _texts(path: str | None, wanted: set[int]) -> dict[int, str]:
    """Returns the beginnings of documents by index; none for a mixture's."""
    if path is None:
        return {}
    from data.text import documents

    lines: Iterator[tuple[int, Mapping[str, Any]]] = documents.read_json_lines(pathlib.Path(path))
    texts = {}
    for index, (_, row) in enumerate(lines):
        if index in wanted:
            value = row.get("text", row.get("tokens", ""))
            texts[index] = value if isinstance(value, str) else json.dumps(value)
    return texts


def _spurious(scores: str) -> dict[tuple[int, int], bool]:
    """Returns which pairs of (query, document) have token scores, and whether the document is spurious."""
    path = pathlib.Path(f"{scores}.tokens.jsonl")
    if not path.is_file():
        return {}
    rows = row_files.read(str(path), example="{...}", flag="scores")
    return {(row["query"], row["document"]): bool(row["spurious"]) for _, row in rows}


def markdown(table: Mapping[str, Any]) -> list[str]:
    """Returns the lines of a report as Markdown."""
    lines = [f"# Influence of {table['documents']:,} documents ({table['method']})", ""]
    for number, query in enumerate(table["queries"], 1):
        nats = "" if query["nats"] is None else f", {query['nats']:.2f} nats"
        mark = " (nearly certain: divided by 0.1 nats)" if query["nearly_certain"] else ""
        asked = f"{_cell(query['prompt'])} **{_cell(query['completion'])}**"
        lines += [f"## Query {number}{nats}{mark}", "", asked, ""]
        for end in ("top", "bottom"):
            if end in query:
                lines += _table(end, query[end], table["rank_by"])
    return lines


def _table(end: str, items: Sequence[Mapping[str, Any]], rank_by: str) -> list[str]:
    per_norm = rank_by == "per_norm"
    last = "per norm" if per_norm else "per nat"
    lines = [f"| {end} | document | score | {last} | text |", "|---|---|---|---|---|"]
    for rank, item in enumerate(items, 1):
        value = item["value"] if per_norm else item["per_nat"]
        shown = "" if value is None else f"{value:.4g}"
        mark = " (spurious)" if item["spurious"] else ""
        text = _cell(item["text"] or "")
        lines.append(
            f"| {rank} | {item['document'] + 1} | {item['score']:.4g} | {shown} | {text}{mark} |"
        )
    return [*lines, ""]


def _cell(value: Any) -> str:
    """Returns the beginning of a text in one line of a table."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= _SNIPPET else f"{text[:_SNIPPET]}..."


if __name__ == "__main__":
    raise SystemExit(main())
