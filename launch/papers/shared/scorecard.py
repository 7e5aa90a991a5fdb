"""The scorecard: every claim of every paper in one table, from the results.json of the reproductions."""

import collections
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch.papers.shared import claim, page
from espalier.launch.plots import intervals

START, END = "<!-- scorecard -->", "<!-- /scorecard -->"


def write(reproductions: pathlib.Path, out: pathlib.Path, readme: pathlib.Path) -> str:
    """Writes the scorecard of a folder of reproductions, and its head into a README between its marks.

    Args:
      reproductions: a folder with <slug>.md and <slug>/results.json for each paper.
      out: the Markdown file.
      readme: changed between START and END; left alone if it is missing or has no marks.

    Returns:
      The head: the number of claims by paper and verdict.

    Raises:
      ValueError: there are no results, or some are not those of a reproduction.
    """
    records = read(reproductions)
    there = os.path.relpath(reproductions, out.parent)
    text = [
        *(
            "# Scorecard",
            "",
            "All claims of all papers, as `espalier report --all` gathers them from",
        ),
        *(
            f"{there}/*/results.json. Claims in bold must hold at small scale too.",
            "",
            page.RULES,
            "",
        ),
        *head(records, there),
    ]
    for slug, record in records.items():
        if page.TITLE not in record:
            continue
        link = f"{there}/{slug}.md"
        text += page.table(_COLUMNS, map(_row, record["claims"]), f"[{record[page.TITLE]}]({link})")
    out.write_text("\n".join(text))
    lines = head(records, os.path.relpath(reproductions, readme.parent))
    if readme.exists() and START in (before := readme.read_text()):
        first, _, rest = before.partition(START)
        _, _, last = rest.partition(END)
        readme.write_text("\n".join([first + START, "", *lines]) + END + last)
    return "\n".join(lines)


def read(reproductions: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the records of a folder's papers by slug."""
    records = {
        path.parent.name: json.loads(path.read_bytes())
        for path in sorted(reproductions.glob(f"*/{page.RECORD}"))
    }
    if not records:
        raise ValueError(f"{reproductions} has no */{page.RECORD}: run launch.reproduce first.")
    for slug, record in records.items():
        if not isinstance(record, dict) or "claims" not in record:
            file = reproductions / slug / page.RECORD
            raise ValueError(f"{file} has no 'claims': write it with launch.reproduce.")
    return records


def head(records: Mapping[str, Any], reproductions: str) -> list[str]:
    """Returns the table of the numbers of claims by paper and verdict; in brackets those that must hold."""
    rows, older = [], []
    for slug, record in records.items():
        if page.TITLE not in record:  # judged by other rules, without intervals
            older.append(f"[{slug}]({reproductions}/{slug}.md)")
            continue
        counts, required = (
            collections.Counter(
                one["verdict"] for one in record["claims"] if one["required"] >= must
            )
            for must in (False, True)
        )
        cells = [f"{counts[v]} ({required[v]})" if counts[v] else "" for v in claim.VERDICTS]
        rows.append((f"[{record[page.TITLE]}]({reproductions}/{slug}.md)", *cells))
    lines = page.table(("claims (those that must hold)", *claim.VERDICTS), rows) if rows else []
    if older:
        lines += [
            f"Not yet run under these rules, and so without a place here: {', '.join(older)}.",
            "",
        ]
    return lines


_COLUMNS = ("claim", "the paper", "here, with 95 % interval", "seeds", "verdict")


def _row(one: Mapping[str, Any]) -> Sequence[str]:
    statement = f"{one['claim']} {one['statement']}"
    shown = f"**{statement}**" if one["required"] else statement
    seeds = ", ".join(map(str, one["seeds"]))
    return shown, one["paper"], _here(one), seeds, f"**{one['verdict']}**"


def _here(one: Mapping[str, Any]) -> str:
    """Returns the effect that decides a claim, in words."""
    if one["effect"] is None:
        return ""
    same = [
        e
        for e in one["effects"]
        if e["effect"] == one["effect"] and e["interval"] == one["interval"]
    ]
    low, high = (math.nan if end is None else end for end in one["interval"])
    shown = intervals.text({"value": one["effect"], "low": low, "high": high}, 3)
    return f"{same[0]['what']} ({same[0]['where']}): {shown} {same[0]['unit']}".rstrip()
