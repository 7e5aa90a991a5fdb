"""The analyses as tables of text, for Markdown and for the viewer."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.launch.influence import statistics

Table = dict[str, Any]  # title, text, header, rows


def tables(analyses: Mapping[str, Any]) -> list[Table]:
    """Returns the tables of `analyses.analyse`: each has `title`, `text` (what it shows), `header` and `rows` of cells."""
    made = [_MAKERS[name](analyses) for name in _MAKERS if name in analyses]
    return [table for table in made if table["rows"]]


def _table(title: str, text: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    return {"title": title, "text": text, "header": [*header], "rows": [[*row] for row in rows]}


def number(value: float | None, digits: int = 3) -> str:
    """Returns a number with so many digits, "" if it is not known."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


_BOOTSTRAPS = (
    f"Intervals are bootstraps over queries, and left out for fewer than {statistics.LEAST_QUERIES} of them, over which a "
    "bootstrap is much too narrow."
)


def _percent(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{100 * value:.3g} %"


def _interval(shown: Mapping[str, Any] | None, text: Callable[..., str] = number) -> str:
    """Returns a value with its interval, if it has one."""
    if shown is None:
        return ""
    low, high = shown["low"], shown["high"]
    if low == high or math.isnan(low):
        return text(shown["value"])
    return f"{text(shown['value'])} [{text(low)}, {text(high)}]"


def _correlations(analyses: Mapping[str, Any]) -> Table:
    rows = []
    for row in analyses["correlations"]:
        first = _named(row["kind"], row["task"])
        other = _named(row["other_kind"], row["other_task"])
        kinds = ("pearson", "spearman", "overlap")
        rows.append(
            [first, other, f"{row['pairs']:,}", *(_interval(row[name], _fixed) for name in kinds)]
        )
    return _table(
        "Correlations of queries",
        "Means over pairs of queries of the correlations of their scores over all documents, and of the share that the first "
        f"{analyses['within']} documents have in common. {_BOOTSTRAPS} Random rankings have correlations of 0 "
        f"and an overlap of {number(analyses['random_overlap'], 2)} in expectation.",
        ["queries", "with queries", "pairs", "Pearson", "Spearman", "overlap"],
        rows,
    )


def _fixed(value: float) -> str:
    return "" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"  # not -0.00


def _named(kind: str, task: str) -> str:
    return ": ".join(filter(None, (kind, task))) or "all"


def _cumulative(analyses: Mapping[str, Any]) -> Table:
    return _table(
        "Positive influence of the top documents",
        "Means over queries with Student intervals: the summed positive scores of a part of the documents, divided by the "
        "completion's nats, their variation over queries (standard deviation / mean), and their share of all positive "
        "influence; each sum beside what as many random documents have in expectation.",
        ["documents", "kind", "per nat", "random", "variation", "share", "random"],
        [
            [
                f"first {row['documents']:,} ({_percent(row['part'])})",
                row["group"],
                _interval(row["per_nat"]),
                number(row["random_per_nat"]["value"]) if row["random_per_nat"] else "",
                number(row["per_nat"]["variation"], 2) if row["per_nat"] else "",
                _interval(row["share"], _percent),
                _percent(row["random_share"]["value"]) if row["random_share"] else "",
            ]
            for row in analyses["cumulative"]
        ],
    )


def _power_law(analyses: Mapping[str, Any]) -> Table:
    return _table(
        "Power law",
        "Slopes of log(score) against log(rank) over the first documents: means over queries with Student intervals.",
        ["kind", "answered", "queries", "documents", "slope"],
        [
            [
                *(row["group"], row["answered"], str(row["slope"]["queries"])),
                *(f"{row['documents']:,}", _interval(row["slope"], _fixed)),
            ]
            for row in analyses["power_law"]
        ],
    )


def _sources(analyses: Mapping[str, Any]) -> Table:
    shares = analyses["sources"]["shares"]
    rows = [["all documents", "", *(_percent(share) for share in shares.values())]]
    for row in analyses["sources"]["rows"]:
        values = (_times(row["multipliers"][name]) for name in shares)
        rows.append([f"{row['end']} {row['documents']:,}", row["group"], *values])
    return _table(
        "Over-representation of sources",
        "Shares of the sources in all documents, then multipliers: the share of a source at one end of the ranking divided by "
        "its share in all documents, 1 for random documents. Means over queries. " + _BOOTSTRAPS,
        ["documents", "kind", *shares],
        rows,
    )


def _times(shown: Mapping[str, float]) -> str:
    return _interval(shown, lambda value: f"{number(value, 2)}×")


def _presence(name: str, title: str, what: str) -> Callable[[Mapping[str, Any]], Table]:
    def make(analyses: Mapping[str, Any]) -> Table:
        return _table(
            title,
            f"Queries whose {what} occurs in one of their first {analyses['within']} documents (with Wilson intervals), and the "
            f"share of queries that as many random documents would give; queries whose {what} occurs in any document; and how "
            "often it occurs in the first documents (in how many different ones), and would in random ones.",
            [
                "kind",
                "answered",
                "queries",
                "in the top",
                "by chance",
                "anywhere",
                "times",
                "by chance",
            ],
            [
                [
                    *(row["group"], row["answered"], str(row["queries"])),
                    *(_interval(row["share"], _percent), _percent(row["chance"])),
                    *(str(row["in_corpus"]), f"{row['times']} ({row['distinct']})"),
                    number(row["expected"]),
                ]
                for row in analyses[name]
            ],
        )

    return make


def _layers(analyses: Mapping[str, Any]) -> Table:
    groups = analyses["layers"]
    parts: dict[tuple[str, str], None] = {}
    for shares in groups.values():
        parts |= dict.fromkeys((kind, key) for kind, own in shares.items() for key in own)
    return _table(
        "Layers and matrices",
        f"Shares of the summed scores of the first {analyses['layers_within']} documents, by layer and by matrix, as means over "
        "queries of a kind; a negative one pulls against the others.",
        ["part", *groups],
        [
            [
                f"layer {key}" if kind == "layers" else key,
                *(_percent(shares[kind].get(key)) for shares in groups.values()),
            ]
            for kind, key in parts
        ],
    )


def _tokens(analyses: Mapping[str, Any]) -> Table:
    return _table(
        "Tokens",
        "Documents with token scores, those whose influence is that of one or two tokens (spurious), the share of the absolute "
        "influence that a tenth of the tokens has, and the tokens with the largest sums.",
        ["kind", "documents", "spurious", "a tenth has", "largest sums"],
        [
            [
                *(row["group"], str(row["documents"]), str(row["spurious"])),
                _percent(row["tenth_share"]),
                ", ".join(f"{text} ({number(total)})" for text, total in row["tokens"]),
            ]
            for row in analyses["tokens"]
        ],
    )


def _methods(analyses: Mapping[str, Any]) -> Table:
    named = [kind for kind in ("answer", "procedure") if kind in analyses]
    return _table(
        "Methods",
        "Rankings compared with those of the first method, as means over queries, and the queries whose answer or procedure is "
        f"in their first {analyses['within']} documents. The last row is what random rankings give in expectation.",
        ["method", "Spearman", "overlap", *(f"{kind} in the top" for kind in named)],
        [
            [
                row["method"],
                *(number(row[name], 3) for name in ("spearman", "overlap")),
                *(_percent(row[kind]) for kind in named),
            ]
            for row in analyses["methods"]
        ],
    )


def _methods_of_kinds(analyses: Mapping[str, Any]) -> Table:
    return _table(
        "Rankings by kind of query",
        "Rankings by other methods or models compared with the first ones: Spearman correlations over all documents, and the "
        f"share that the first {analyses['within']} documents have in common, as means over queries with Student intervals. Random "
        f"rankings have a correlation of 0 and an overlap of {number(_chance(analyses), 2)} in expectation.",
        ["kind", "method", "queries", "Spearman", "largest", "overlap"],
        [
            [
                *(row["group"], row["method"], str(row["queries"])),
                *(_interval(row["spearman"]), number(row["most"]), _interval(row["overlap"])),
            ]
            for row in analyses["methods_of_kinds"]
        ],
    )


def _methods_of_queries(analyses: Mapping[str, Any]) -> Table:
    others = analyses["methods_of_queries"]
    return _table(
        "Rankings by query",
        "Spearman correlation of each query's scores with those of the first method or model, and the share of the first "
        f"{analyses['within']} documents in common, which is {number(_chance(analyses), 2)} by chance.",
        ["query", *(f"{name}: {what}" for name in others for what in ("Spearman", "overlap"))],
        [
            [str(q), *(number(own[what]) for own in rows for what in ("spearman", "overlap"))]
            for q, rows in enumerate(zip(*others.values(), strict=True), 1)
        ],
    )


def _chance(analyses: Mapping[str, Any]) -> float:
    """Returns the overlap of random rankings."""
    return float(analyses["methods"][-1]["overlap"])


def _controls(analyses: Mapping[str, Any]) -> Table:
    names = ("of_queries", "between", "of_controls", "difference")
    return _table(
        "Queries and controls",
        "A control has the form of a kind of queries, and its prompt states the answer. Means over pairs of queries, pairs of a "
        "query and a control, and pairs of controls; the difference is that of the first two. Intervals are bootstraps over queries and "
        f"controls, and left out for fewer than {statistics.LEAST_QUERIES} of either. The overlap is of the first "
        f"{analyses['within']} documents.",
        ["kind", "measure", "queries", "query and control", "controls", "difference"],
        [
            [
                row["kind"] or "all",
                row["measure"],
                *(_interval(row[name], _fixed) for name in names),
            ]
            for row in analyses["controls"]
        ],
    )


_MAKERS: dict[str, Callable[[Mapping[str, Any]], Table]] = {
    "methods": _methods,
    "methods_of_kinds": _methods_of_kinds,
    "methods_of_queries": _methods_of_queries,
    "correlations": _correlations,
    "controls": _controls,
    "answer": _presence("answer", "Answers in documents", "answer"),
    "procedure": _presence("procedure", "Procedures in documents", "procedure"),
    "sources": _sources,
    "cumulative": _cumulative,
    "power_law": _power_law,
    "layers": _layers,
    "tokens": _tokens,
}
