"""A report as JSON values, as Markdown, and as the data of the viewer.

The viewer is one HTML file with its data inside, which needs no network. Documents may be hostile. Its data is JSON in an element that no browser executes, without the character that could end the
element; the script shows texts as text only; and the page's policy admits its own script and style by their digests, and
nothing else.
"""

import base64
import dataclasses
import hashlib
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.influence import analyses, tables
from espalier.launch.influence.outputs import ENDS, PLACE
from espalier.launch.plots import html_page, panels

_POLICY = "default-src 'none'; script-src '{script}'; style-src '{style}'; base-uri 'none'; form-action 'none'"
_SNIPPET = 90
_SUMMARISED = 10  # queries on the terminal
MOST_TEXT = 20_000  # characters of a document in the viewer


def page(data: Mapping[str, Any]) -> str:
    """Returns the HTML of the viewer of `data`, which `shown` makes."""
    files = importlib.resources.files("espalier.launch.influence") / "page"
    style, script, body = (
        (files / name).read_text(encoding="utf-8")
        for name in ("viewer.css", "viewer.js", "viewer.html")
    )
    policy = _POLICY.format(script=_digest(script), style=_digest(style))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Influence of documents</title>\n<style>{style}</style>\n</head>\n<body>\n{body}"
        f'<script type="application/json" id="data">{_embedded(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _embedded(data: Mapping[str, Any]) -> str:
    """Returns JSON in ASCII without <, > and &, so that it neither ends its element nor begins a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What a report is made of.

    Attributes:
      record: what the scores were made from.
      tops: documents at both ends of each ranking (launch/influence/outputs.py).
      prepared: queries as they were scored.
      given: what was analysed.
      texts: texts of documents by number.
      analyses: of all scores.
      norms_N: norms of the documents' gradients, or None.
      rank_by: 'score' or 'per_norm'.
      top: number of documents at an end.
    """

    record: Mapping[str, Any]
    tops: Mapping[str, Any]
    prepared: Any
    given: analyses.Inputs
    texts: Mapping[int, str]
    analyses: Mapping[str, Any]
    norms_N: np.ndarray | None
    rank_by: str
    top: int

    def nats(self, query: int) -> float | None:
        """Returns the negative log-likelihood of a completion; None where the method has none."""
        return _known(self.prepared.nats[query])

    def source(self, document: int) -> str | None:
        sources = self.given.sources
        return None if sources is None else sources[document]

    def per_nat(self, query: int, score: float) -> float | None:
        nats = self.given.nats[query]
        return None if nats is None else score / nats

    def per_norm(self, document: int, score: float) -> float | None:
        if self.norms_N is None:
            return None
        norm = float(self.norms_N[document])
        return score / norm if norm else 0.0


def _known(value: float) -> float | None:
    """Returns a number, None for NaN."""
    return float(value) if value == value else None


def table(made: Made) -> dict[str, Any]:
    """Returns the report as JSON values."""
    spurious = {(row["query"], row["document"]): row["spurious"] for row in made.given.tokens}
    suffix = "" if made.rank_by == "score" else "_per_norm"
    entries = []
    for q, (query, tops) in enumerate(zip(made.given.queries, made.tops["queries"], strict=True)):
        nats = made.nats(q)
        entry: dict[str, Any] = {
            **{"prompt": query.prompt, "completion": query.completion},
            **{"task": query.task, "kind": query.kind, "correct": query.correct},
            **{"control": query.control, "nats": nats},
            "nearly_certain": nats is not None and nats < analyses.LEAST_NATS,
            "kept": _known(made.prepared.kept[q]),
            "pearson": _known(made.prepared.pearson[q]),
        }
        for end in ("top", "bottom"):
            entry[end] = [
                {
                    "document": item["document"],
                    "score": item["score"],
                    "per_nat": made.per_nat(q, item["score"]),
                    "value": item["value"],
                    "source": made.source(item["document"]),
                    **{name: item[name] for name in PLACE if name in item},
                    "spurious": spurious.get((q, item["document"])),
                    "text": made.texts.get(item["document"]),
                }
                for item in tops[f"{end}{suffix}"][: made.top]
            ]
        entries.append(entry)
    return _plain(
        {
            **{"method": made.record["method"], "rank_by": made.rank_by},
            **{"documents": made.tops["documents"], "compression": compression(made)},
            **{"queries": entries, "analyses": dict(made.analyses)},
        }
    )


def _plain(value: Any) -> Any:
    """Returns JSON values in which NaN, which JSON does not have, is null."""
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def compression(made: Made) -> dict[str, Any] | None:
    """Returns how much of the queries' gradients compression keeps; None for a method without gradients.

    `kept` is the share of their squared norm, and `pearson` the correlation of scores of sample documents with uncompressed
    ones, each as mean and least value over queries.
    """
    if "rank" not in made.record:
        return None
    result: dict[str, Any] = {n: made.record[n] for n in ("rank", "query_dtype")}
    for name in ("kept", "pearson"):
        values = getattr(made.prepared, name)
        values = values[~np.isnan(values)]
        known = len(values) > 0
        result[name] = (
            {"mean": float(values.mean()), "least": float(values.min())} if known else None
        )
    return result


def markdown(report: Mapping[str, Any], *, bottom: bool) -> list[str]:
    """Returns the lines of a report as Markdown.

    Args:
      report: of `table`.
      bottom: whether to show the documents at the other end of the ranking too.
    """
    lines = [f"# Influence of {report['documents']:,} documents ({report['method']})", ""]
    lines += _compression_lines(report["compression"])
    for number, query in enumerate(report["queries"], 1):
        nats = "" if query["nats"] is None else f", {query['nats']:.2f} nats"
        mark = " (nearly certain: divided by 0.1 nats)" if query["nearly_certain"] else ""
        asked = f"{_cell(query['prompt'])} **{_cell(query['completion'])}**"
        lines += [f"## Query {number}{nats}{mark}", "", asked, ""]
        for end in ("top", *(["bottom"] if bottom else [])):
            lines += _table(end, query[end], report["rank_by"])
    for one in tables.tables(report["analyses"]):
        lines += [f"## {one['title']}", "", one["text"], ""]
        header, *rows = (
            [_without_tags(cell) for cell in row] for row in (one["header"], *one["rows"])
        )
        lines += html_page.table(header, rows)
    if omitted := report["analyses"]["omitted"]:
        lines += ["Not computed:", "", *(f"- {_escaped(text)}" for text in omitted), ""]
    return lines


def summary(report: Mapping[str, Any]) -> list[str]:
    """Returns a few lines on a report for a terminal: the first document of each of the first queries, and what it leaves out."""
    queries, per_norm = report["queries"], report["rank_by"] == "per_norm"
    lines = [
        f"{report['documents']:,} documents, {len(queries):,} queries, method {report['method']}",
        *filter(None, _compression_lines(report["compression"])),
    ]
    for number, query in enumerate(queries[:_SUMMARISED], 1):
        asked = f"{_clipped(query['prompt'])} {_clipped(query['completion'])}"
        lines.append(f"{number}. {asked}")
        for item in query["top"][:1]:
            mark = ", spurious" if item["spurious"] else ""
            value = f"{item['value']:.4g}{' per norm' if per_norm else ''}"
            where = f"first of the top: document {item['document']} ({value}{mark})"
            lines.append(f"   {where} {_clipped(item['text'] or '')}")
    if more := len(queries) - _SUMMARISED:
        lines += [f"... and {more:,} more queries"] if more > 0 else []
    if omitted := report["analyses"]["omitted"]:
        lines.append(f"{len(omitted)} analyses were not computed; the report says why")
    return lines


def _compression_lines(shown: Mapping[str, Any] | None) -> list[str]:
    if shown is None or shown["kept"] is None:
        return []
    rank = f"rank {shown['rank']}" if shown["rank"] else "whole matrices"
    text = f"Query gradients ({rank}, {shown['query_dtype'] if shown['rank'] else 'float32'}) keep "
    text += f"{100 * shown['kept']['mean']:.2f} % of their squared norm (least {100 * shown['kept']['least']:.2f} %)"
    if shown["pearson"] is not None:
        mean, least = (shown["pearson"][name] for name in ("mean", "least"))
        text += f"; their scores correlate at {mean:.4f} with uncompressed ones (least {least:.4f})"
    return [f"{text}.", ""]


def _table(end: str, items: Sequence[Mapping[str, Any]], rank_by: str) -> list[str]:
    per_norm = rank_by == "per_norm"
    last = "per norm" if per_norm else "per nat"
    sources = any(item["source"] for item in items)
    steps = any("step" in item for item in items)
    own = [name for name, shown in (("source", sources), ("step", steps)) if shown]
    header = [end, "document", *own, "score", last, "text"]
    rows = []
    for rank, item in enumerate(items, 1):
        value = item["value"] if per_norm else item["per_nat"]
        mark = " (spurious)" if item["spurious"] else ""
        cells = [
            *(str(rank), str(item["document"])),
            *([_without_tags(item["source"])] if sources else []),
            *([str(item["step"])] if steps else []),
            *(f"{item['score']:.4g}", "" if value is None else f"{value:.4g}"),
            f"{_without_tags(_clipped(item['text'] or ''))}{mark}",
        ]
        rows.append(cells)
    return html_page.table(header, rows)


def _cell(value: Any) -> str:
    """Returns the beginning of a text in one line of a table."""
    return _escaped(_clipped(value))


def _clipped(value: Any) -> str:
    text = " ".join(_text(value).split())
    return text if len(text) <= _SNIPPET else f"{text[:_SNIPPET]}..."


def _escaped(text: str) -> str:
    """Returns a text whose characters mean nothing in Markdown: no tag, no cell's end."""
    return _without_tags(text).replace("|", "\\|")


def _without_tags(text: str) -> str:
    return text.replace("\\", "\\\\").replace("<", "&lt;")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shown(made: Made) -> dict[str, Any]:
    """Returns the data of the viewer: both ends of both rankings, texts, token scores and the tables of analyses."""
    spurious = {(row["query"], row["document"]) for row in made.given.tokens if row["spurious"]}
    queries, numbers = [], set()
    ends = ENDS if made.norms_N is not None else ENDS[:2]
    for q, (query, tops) in enumerate(zip(made.given.queries, made.tops["queries"], strict=True)):
        entry: dict[str, Any] = {
            **{"prompt": _text(query.prompt), "completion": _text(query.completion)},
            **{"task": query.task, "kind": query.group, "correct": query.correct},
            "nats": made.nats(q),
        }
        for end in ends:
            items = tops[end][: made.top]
            numbers |= {item["document"] for item in items}
            entry[end] = [
                {
                    **{"document": item["document"], "score": item["score"]},
                    "per_nat": made.per_nat(q, item["score"]),
                    "per_norm": made.per_norm(item["document"], item["score"]),
                    "spurious": (q, item["document"]) in spurious,
                }
                for item in items
            ]
        queries.append(entry)
    texts = {i: made.texts.get(i, "") for i in sorted(numbers)}
    return _plain(
        {
            **{"method": made.record["method"], "count": made.tops["documents"]},
            **{"rank_by": made.rank_by, "per_norm": made.norms_N is not None},
            "queries": queries,
            "documents": {
                i: {
                    **{"text": text[:MOST_TEXT], "cut": len(text) > MOST_TEXT},
                    "source": made.source(i),
                }
                for i, text in texts.items()
            },
            "tokens": {
                f"{row['query']}:{row['document']}": {
                    "texts": row["texts"],
                    "scores": [float(f"{score:.4g}") for score in row["scores"]],
                }
                for row in made.given.tokens
                if row["document"] in numbers
            },
            "tables": tables.tables(made.analyses),
            "omitted": made.analyses["omitted"],
        }
    )


def curves(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns an SVG picture of the analysis of this name: influence per nat against the number of documents; None without nats."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["per_nat"] is not None:
            groups.setdefault(row["group"], []).append(row)
    if not groups:
        return None
    figure, (axes,) = panels.panels(1, (6.0, 3.6))
    for (group, own), colour in zip(groups.items(), panels.colours(len(groups)), strict=True):
        x, label = [row["documents"] for row in own], group.replace("$", r"\$")  # begins a formula
        for name, style, more in (("per_nat", "-", ""), ("random_per_nat", ":", ", random")):
            y = [row[name]["value"] for row in own]
            axes.plot(x, y, style, color=colour, marker=".", label=f"{label}{more}")
        low, high = ([row["per_nat"][end] for row in own] for end in ("low", "high"))
        axes.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axes.set(xscale="log", yscale="log", xlabel="first documents", ylabel="influence per nat")
    axes.legend(**panels.BESIDE)
    return html_page.svg(figure)
