"""The report of the reproduction."""

from typing import Any

from launch.papers.shared import page
from launch.papers.snapkv import claims, figures, measure, needles
from launch.papers.snapkv.results import CHAT, SMALL, Results
from launch.plots import intervals


def _setup(parts: page.Parts) -> list[str]:
    results, out = parts["all"], []
    if results.runs:
        out.append(
            f"- *{SMALL}*: 2 layers of width 64, trained here on a synthetic task, seeds "
            f"{', '.join(results.retrieval)}. {len(results.runs[0]['accuracy']['line'])} prompts of {results.length} "
            "tokens for each: 48 lines of a key and four values, one answered question, and the question. Window 8."
        )
    if rows := results.needles:
        counts = {n: sum(one["tokens"] == n for one in rows) for n in (1024, 2048)}
        grid = ", ".join(f"{c} of {n} tokens" for n, c in counts.items() if c)
        out.append(
            f"- *{CHAT}*: SmolLM2-135M-Instruct from 4-bit weights. Haystacks of the King James "
            f"Bible: {grid}; five needles in each, all asked for, question last in the chat format, "
            f'the answer opened by "The magic number of ... is". Window {needles.WINDOW}, max '
            f"pooling over {needles.KERNEL}. The needles of a haystack are distractors of each other."
        )
    if results.latency:
        out.append(
            "- *Latency*: 4 layers of width 256, random weights and random keys and values; the two "
            "caches are timed in turn, compilation apart."
        )
    out.append(
        "- Policies see the same prompt, read once. The first answer token follows from the whole prompt, "
        "so the tokens after it are what tests a policy."
    )
    return out


def _record(parts: page.Parts) -> dict[str, Any]:
    results = parts["all"]
    return {
        "needles": _needles(results),
        "retrieval": _retrieval(results),
        "latency": results.latency,
    }


def _retrieval(results: Results) -> dict[str, Any]:
    """Returns exact match, and share of right tokens after the first, by method and capacity."""
    prompts = results.prompts[results.prompts["lines"] == measure.LINES]
    if prompts.empty:
        return {}
    out: dict[str, Any] = {}
    for (method, capacity), mine in prompts.groupby(["method", "capacity"], sort=False):
        scores = {"exact": "exact", "after the first": "later"}
        shares = {name: intervals.share(mine[score]) for name, score in scores.items()}
        out.setdefault(method, {})[str(capacity)] = shares
    full = prompts[prompts["method"] == "full"].groupby("seed", sort=False)["exact"]
    return {**out, "full by seed": {seed: intervals.share(mine) for seed, mine in full}}


def _needles(results: Results) -> dict[str, Any]:
    """Returns exact match and share of right digits by length, method and capacity."""
    out: dict[str, Any] = {}
    keys = ["tokens", "method", "capacity"]
    for (tokens, method, capacity), mine in results.questions.groupby(keys, sort=False):
        digits = results.digits(method, capacity, tokens)
        out.setdefault(str(tokens), {}).setdefault(method, {})[str(capacity)] = {
            "exact": intervals.share(mine["exact"]),
            "digits": round(float(digits.mean()), 4),
            "questions": len(digits),
        }
    return out


def _tables(parts: page.Parts) -> list[str]:
    out = []
    if retrieval := _retrieval(parts["all"]):
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
    for tokens, methods in _needles(parts["all"]).items():
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
    claims=claims.CLAIMS,
    places={"all": ""},
    read=lambda measured: {"all": Results(**measured)},
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    record=_record,
    figures_last=True,
)
write = REPORT.write
