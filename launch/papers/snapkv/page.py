"""The report of the reproduction."""

from collections.abc import Mapping
from typing import Any

from launch.papers.shared import page
from launch.papers.snapkv import claims, figures, measure, needles
from launch.plots import intervals


def _setup(measured: Mapping[str, Any]) -> list[str]:
    out = []
    if runs := measured.get("retrieval"):
        one = next(iter(runs.values()))["accuracy"]
        out.append(
            f"- *{claims.SMALL}*: 2 layers of width 64, trained here on a synthetic task, seeds "
            f"{', '.join(runs)}. {len(one['line'])} prompts of {one['length']} tokens for each: 48 "
            "lines of a key and four values, one answered question, and the question. Window 8."
        )
    if rows := measured.get("needles"):
        counts = {n: sum(one["tokens"] == n for one in rows) for n in (1024, 2048)}
        grid = ", ".join(f"{c} of {n} tokens" for n, c in counts.items() if c)
        out.append(
            f"- *{claims.CHAT}*: SmolLM2-135M-Instruct from 4-bit weights. Haystacks of the King James "
            f"Bible: {grid}; five needles in each, all asked for, question last in the chat format, "
            f'the answer opened by "The magic number of ... is". Window {needles.WINDOW}, max '
            f"pooling over {needles.KERNEL}. The needles of a haystack are distractors of each other."
        )
    if measured.get("latency"):
        out.append(
            "- *Latency*: 4 layers of width 256, random weights and random keys and values; the two "
            "caches are timed in turn, compilation apart."
        )
    out.append(
        "- Policies see the same prompt, read once. The first answer token follows from the whole prompt, "
        "so the tokens after it are what tests a policy."
    )
    return out


def _record(measured: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "needles": _needles(measured),
        "retrieval": _retrieval(measured),
        "latency": measured.get("latency"),
    }


def _retrieval(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns exact match, and share of right tokens after the first, by method and capacity."""
    runs = measured.get("retrieval", {})
    if not runs:
        return {}
    shares = {
        name: {
            capacity: {
                key: intervals.share(claims.small_exact(measured, name, int(capacity), first))
                for key, first in (("exact", 0), ("after the first", 1))
            }
            for capacity in capacities
        }
        for name, capacities in claims.runs_of(measured)[0]["accuracy"]["correct"].items()
    }
    by_seed = {
        seed: intervals.share(claims.small_full({"retrieval": {seed: run}}))
        for seed, run in runs.items()
    }
    return {**shares, "full by seed": by_seed}


def _needles(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns exact match and share of right digits by length, method and capacity."""
    out: dict[str, Any] = {}
    for tokens in sorted({one["tokens"] for one in measured.get("needles", [])}):
        first = next(one for one in measured["needles"] if one["tokens"] == tokens)
        for name, capacities in first["digits"].items():
            for capacity in capacities:
                digits = claims.needle_digits(measured, name, int(capacity), tokens)
                out.setdefault(str(tokens), {}).setdefault(name, {})[capacity] = {
                    "exact": intervals.share(digits.all(-1)),
                    "digits": round(float(digits.mean()), 4),
                    "questions": len(digits),
                }
    return out


def _tables(measured: Mapping[str, Any]) -> list[str]:
    out = []
    if retrieval := _retrieval(measured):
        rows = []
        for name, cells in retrieval.items():
            if not name.startswith("full"):
                pairs = [
                    [cells[str(c)][key]["value"] for key in ("exact", "after the first")]
                    for c in measure.CAPACITIES
                ]
                rows.append((name, *(f"{exact:.2f} ({later:.2f})" for exact, later in pairs)))
        header = ("method", *(f"C = {c}" for c in measure.CAPACITIES))
        title = "Retrieval model: exact match (right after the first token)"
        out += page.table(header, rows, title)
        full = intervals.text(next(iter(retrieval["full"].values()))["exact"])
        by_seed = retrieval["full by seed"].items()
        seeds = ", ".join(f"{seed}: {intervals.text(share)}" for seed, share in by_seed)
        out += [f"Full cache {full}; by seed {seeds}.", ""]
    for tokens, methods in _needles(measured).items():
        rows = [
            (
                name,
                capacity if int(capacity) else "all",
                intervals.text(cell["exact"]),
                f"{cell['digits']:.2f}",
            )
            for name, capacities in methods.items()
            for capacity, cell in capacities.items()
        ]
        header = ("method", "C", "exact match", "right digits")
        out += page.table(header, rows, f"Needles in {tokens} tokens")
    return out


REPORT = page.Report(
    slug="snapkv",
    title="SnapKV: the paper's claims, measured",
    source="[arXiv 2404.14469](https://arxiv.org/abs/2404.14469)",
    intro="All shares come with 95 % intervals over prompts.",
    claims=claims.claims,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    record=_record,
    figures_last=True,
)
write = REPORT.write
