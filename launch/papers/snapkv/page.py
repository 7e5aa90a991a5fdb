"""The report: what holds and what does not, as a page that people read and as JSON."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.shared import claim
from launch.papers.shared.claim import Claim
from launch.papers.snapkv import claims, figures, measure, needle_run
from launch.plots import intervals


def write(found: Mapping[str, Any], out: pathlib.Path, facts: Mapping[str, Any]) -> None:
    """Writes snapkv.md, snapkv/results.json and the plots into `out`.

    Args:
      found: by `experiment.run`.
      out: the folder, such as docs/reproductions.
      facts: command, versions and whatever else the numbers depend on.
    """
    folder = out / "snapkv"
    drawn = figures.draw(found, folder)
    judged = claims.claims(found)
    record = {
        **facts,
        "claims": claim.record(judged),
        "needles": _needle_table(found),
        "retrieval": _retrieval_table(found),
        "latency": found.get("latency"),
    }
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / "snapkv.md").write_text("\n".join(_page(found, judged, drawn, facts, record)) + "\n")


def _page(
    found: Mapping[str, Any],
    judged: Sequence[Claim],
    drawn: Mapping[str, str],
    facts: Mapping[str, Any],
    record: Mapping[str, Any],
) -> list[str]:
    lines = [
        "# SnapKV: the paper's claims, measured",
        "",
        "[arXiv 2404.14469](https://arxiv.org/abs/2404.14469). This page and its plots are written by",
        "",
        "```",
        str(facts["command"]),
        "```",
        "",
        "and never by hand. All shares come with 95 % intervals over prompts.",
        "",
        *claim.table(judged),
        "",
        "## How it was measured",
        "",
        *_setup(found),
        "",
        "## Measurements",
        "",
    ]
    lines += claim.measurements(judged)
    for name, caption in drawn.items():
        lines += [f"![{caption}](snapkv/{name})", "", f"*{caption}.*", ""]
    lines += _tables(record)
    lines += ["Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + "."]
    return lines


def _setup(found: Mapping[str, Any]) -> list[str]:
    out = []
    if runs := found.get("retrieval"):
        one = next(iter(runs.values()))["accuracy"]
        out.append(
            f"- *{claims.SMALL}*: 2 layers of width 64, trained here on a synthetic task, seeds "
            f"{', '.join(runs)}. {len(one['line'])} prompts of {one['length']} tokens for each: 48 "
            "lines of a key and four values, one answered question, and the question. Window 8."
        )
    if needles := found.get("needles"):
        counts = {n: sum(one["tokens"] == n for one in needles) for n in (1024, 2048)}
        grid = ", ".join(f"{c} of {n} tokens" for n, c in counts.items() if c)
        out.append(
            f"- *{claims.CHAT}*: SmolLM2-135M-Instruct from 4-bit weights. Haystacks of the King James "
            f"Bible: {grid}; five needles in each, all asked for, question last in the chat format, "
            f'the answer opened by "The magic number of ... is". Window {needle_run.WINDOW}, max '
            f"pooling over {needle_run.KERNEL}. The needles of a haystack are distractors of each other."
        )
    if found.get("latency"):
        out.append(
            "- *Latency*: 4 layers of width 256, random weights and random keys and values; the two "
            "caches are timed in turn, compilation apart."
        )
    out.append(
        "- Policies see the same prompt, read once. The first answer token follows from the whole prompt, "
        "so the tokens after it are what tests a policy."
    )
    return out


def _retrieval_table(found: Mapping[str, Any]) -> dict[str, Any]:
    """Exact match, and share of right tokens after the first, by method and capacity."""
    runs = found.get("retrieval", {})
    if not runs:
        return {}
    one = next(iter(runs.values()))["accuracy"]["correct"]
    return {
        name: {
            capacity: {
                "exact": intervals.share(claims.small_exact(found, name, int(capacity))),
                "after the first": intervals.share(
                    claims.small_exact(found, name, int(capacity), first=1)
                ),
            }
            for capacity in capacities
        }
        for name, capacities in one.items()
    } | {
        "full by seed": {
            seed: intervals.share(
                [all(row) for row in next(iter(r["accuracy"]["correct"]["full"].values()))]
            )
            for seed, r in runs.items()
        }
    }


def _needle_table(found: Mapping[str, Any]) -> dict[str, Any]:
    """Exact match and share of right digits by length, method and capacity."""
    out: dict[str, Any] = {}
    for tokens in sorted({one["tokens"] for one in found.get("needles", [])}):
        first = next(one for one in found["needles"] if one["tokens"] == tokens)
        for name, capacities in first["digits"].items():
            for capacity in capacities:
                digits = claims.needle_digits(found, name, int(capacity), tokens)
                out.setdefault(str(tokens), {}).setdefault(name, {})[capacity] = {
                    "exact": intervals.share(digits.all(-1)),
                    "digits": round(float(digits.mean()), 4),
                    "questions": len(digits),
                }
    return out


def _tables(record: Mapping[str, Any]) -> list[str]:
    out = []
    if table := record["retrieval"]:
        out += [
            "## Retrieval model: exact match (right after the first token)",
            "",
            "| method | " + " | ".join(f"C = {c}" for c in measure.CAPACITIES) + " |",
            "|---|" + "---|" * len(measure.CAPACITIES),
        ]
        for name, by_capacity in table.items():
            if name.startswith("full"):
                continue
            cells = [
                f"{by_capacity[str(c)]['exact']['value']:.2f} "
                f"({by_capacity[str(c)]['after the first']['value']:.2f})"
                for c in measure.CAPACITIES
            ]
            out.append(f"| {name} | " + " | ".join(cells) + " |")
        full = next(iter(table["full"].values()))["exact"]
        seeds = ", ".join(f"{s}: {intervals.text(v)}" for s, v in table["full by seed"].items())
        out += ["", f"Full cache {intervals.text(full)}; by seed {seeds}.", ""]
    for tokens, methods in record["needles"].items():
        out += [
            f"## Needles in {tokens} tokens",
            "",
            "| method | C | exact match | right digits |",
            "|---|---|---|---|",
        ]
        out += [
            f"| {name} | {capacity if int(capacity) else 'all'} | {intervals.text(cell['exact'])} | "
            f"{cell['digits']:.2f} |"
            for name, capacities in methods.items()
            for capacity, cell in capacities.items()
        ]
        out.append("")
    return out
