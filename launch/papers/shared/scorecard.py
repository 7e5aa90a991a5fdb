"""What the reproductions say together: the scorecard of every claim, and a page of one line for each paper.

Both follow from the results.json of the papers.
"""

import collections
import json
import math
import os
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch.papers.shared import claim, criteria, page
from espalier.launch.plots import intervals, panels

START, END = "<!-- scorecard -->", "<!-- /scorecard -->"
LEARNED = "what_we_learned.md"
_FIGURE = "images/what_we_learned.png"
READING = {
    "reproduced": "the claim holds",
    "tie": "it does not hold, and the interval has zero within and half of the paper's number outside, on either side, or all of "
    "it is nearer to zero than what counts as no worse",
    "not shown": "it is undecided, and no tie: the interval of its primary effect has the bound within",
    "contradicted": "it fails, and is no tie",
    "not measured": "it has no runs, too few, or such as cannot judge it",
}
_COLOURS = dict(
    zip(READING, (panels.GREEN, panels.BLUE, panels.ORANGE, panels.RED, panels.GREY), strict=True)
)


def write(reproductions: pathlib.Path, out: pathlib.Path, readme: pathlib.Path) -> str:
    """Writes the scorecard of a folder of reproductions, what was learned beside it, and totals into a README between its marks.

    Args:
      reproductions: a folder with <slug>.md and <slug>/results.json for each paper.
      out: the Markdown file of the scorecard; what_we_learned.md and its figure are written beside it.
      readme: changed between START and END; left alone if it is missing or has no marks.

    Returns:
      The totals, as a sentence.

    Raises:
      ValueError: there are no results, or some are not those of a reproduction by today's rules.
    """
    every = read(reproductions)
    today = {slug: record for slug, record in every.items() if "headline" in record}
    begun = {
        slug: parts
        for slug, record in today.items()
        if (parts := criteria.unmeasured(record["criteria"], record["measured"]))
    }
    records = {slug: record for slug, record in today.items() if slug not in begun}
    there = os.path.relpath(reproductions, out.parent)
    total = totals(records)
    for slug, parts in begun.items():
        named = ", ".join(f"`{part}`" for part in parts)
        total += f" {slug} is judged in part so far, and not counted, since these parts have not run: {named}."
    if older := [slug for slug in every if slug not in today]:
        total += f" Not run under these rules yet, and not counted: {', '.join(older)}. Their pages are of an earlier round."
    text = [
        *("# Scorecard: every claim of every paper", ""),
        f"`espalier report --all` gathers it from {there}/*/results.json. The main effects and what they say",
        *(f"are on [one page]({LEARNED}).", "", f"{page.VERDICTS} {page.GAIN}", "", total, ""),
        *_head(records, there),
    ]
    for slug, record in records.items():
        main = (record["headline"] or {}).get("claim")
        order = {group: at for at, group in enumerate(claim.GROUPS)}
        rows = sorted(record["claims"], key=lambda x: (x["claim"] != main, order[x["group"]]))
        link = f"[{record[page.TITLE]}]({there}/{slug}.md)"
        text += page.table(_COLUMNS, map(_row, rows), link)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(text))
    figure = _draw(records)
    if figure is not None:
        target = out.parent / _FIGURE
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=100)
    (out.parent / LEARNED).write_text("\n".join(_learned(records, there, total, out.name)))
    if readme.exists() and START in (before := readme.read_text()):
        first, _, rest = before.partition(START)
        _, _, last = rest.partition(END)
        docs = os.path.relpath(out.parent, readme.parent)
        picture = f"![{_ALT}]({docs}/{_FIGURE})"
        shown = [
            total,
            "",
            picture,
            "",
            f"[What was learned]({docs}/{LEARNED}), [every claim]({docs}/{out.name}).",
        ]
        readme.write_text("\n".join([first + START, "", *shown, "", ""]) + END + last)
    return total


def read(reproductions: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Returns the records of a folder's papers by slug."""
    records = {
        path.parent.name: json.loads(path.read_bytes())
        for path in sorted(reproductions.glob(f"*/{page.RECORD}"))
    }
    if not records:
        raise ValueError(f"{reproductions} has no */{page.RECORD}: run espalier reproduce first.")
    for slug, record in records.items():
        if not isinstance(record, dict) or "claims" not in record:
            file = reproductions / slug / page.RECORD
            raise ValueError(f"{file} has no 'claims': write it with espalier reproduce.")
    return records


def totals(records: Mapping[str, Any]) -> str:
    """Returns how many claims hold, fail and are open, as a sentence."""
    every = [one for record in records.values() for one in record["claims"]]
    required = [one for one in every if one["required"]]

    def counted(claims: Sequence[Mapping[str, Any]]) -> str:
        counts = collections.Counter(one["verdict"] for one in claims)
        return ", ".join(
            f"{counts[verdict]} {_SAID[verdict][counts[verdict] > 1]}"
            for verdict in claim.VERDICTS
            if counts[verdict]
        )

    return (
        f"{len(records)} papers, {len(every)} claims: {counted(every)}. Of the {len(required)} that must hold at this "
        f"scale: {counted(required)}."
    )


_SAID = {  # of one claim, and of several
    claim.HOLDS: ("holds", "hold"),
    claim.FAILS: ("fails", "fail"),
    claim.UNDECIDED: ("is undecided", "are undecided"),
    claim.NOT_MEASURED: ("is not measured", "are not measured"),
}


def _head(records: Mapping[str, Any], reproductions: str) -> list[str]:
    """Returns the table of the numbers of claims by paper and verdict; in brackets those that must hold."""
    rows = []
    for slug, record in records.items():
        counts, required = (
            collections.Counter(
                one["verdict"] for one in record["claims"] if one["required"] >= must
            )
            for must in (False, True)
        )
        cells = [f"{counts[v]} ({required[v]})" if counts[v] else "" for v in claim.VERDICTS]
        rows.append((f"[{record[page.TITLE]}]({reproductions}/{slug}.md)", *cells))
    return page.table(("claims (those that must hold)", *claim.VERDICTS), rows)


_COLUMNS = (
    "claim (bold: it must hold at this scale)",
    "the paper's figure",
    "primary effect here [its interval]",
    "holds if the interval is",
    "seeds that judge it",
    "verdict",
)


def _row(one: Mapping[str, Any]) -> Sequence[str]:
    statement = f"{one['claim']} {one['statement']}"
    shown = f"**{statement}**" if one["required"] else statement
    here = "" if one["effect"] is None else f"{one['what']} ({one['where']}): {_number(one, 3)}"
    bounds = (_bound(one, key) for key in ("above", "below") if one[key] is not None)
    verdict = f"**{one['verdict']}**"
    if one["verdict"] == claim.UNDECIDED:
        low, high = (f"{end:.3f}" for end in one["interval"])
        verdict += f"; excluded: below {low}, above {high} {one['unit']}".rstrip()
    elif one["why"]:
        verdict += f": {one['why']}"
    return shown, one["paper"], here, " and ".join(bounds), str(len(one["seeds"]) or ""), verdict


def _bound(one: Mapping[str, Any], key: str) -> str:
    return f"{key} {one[key]:g} {one['unit']}".rstrip()


def _number(one: Mapping[str, Any], digits: int) -> str:
    low, high = (math.nan if end is None else end for end in one["interval"])
    seen = {"value": one["effect"], "low": low, "high": high}
    return f"{intervals.text(seen, digits)} {one['unit']}".rstrip()


# The page of one line for each paper.

_ALT = (
    "The main effect of each paper: the paper's number (black tick), ours (dot) with the interval that judges its claim, each row in its own unit, "
    "with no effect at the dashed line"
)


def _learned(records: Mapping[str, Any], there: str, total: str, card: str) -> list[str]:
    """Returns the lines of the page."""
    rows, minds = [], []
    for slug, record in records.items():
        head = record["headline"]
        if head is None:
            continue
        link = f"[{record[page.TITLE].partition(':')[0]}]({there}/{slug}.md)"
        rows.append(
            (link, head["what"], _paper(head), _ours(head), f"**{head['word']}**", head["why"])
        )
        minds.append((link, head["claim"], head["mind"]))
    words = "; ".join(f"*{word}*: {meaning}" for word, meaning in READING.items())
    return [
        *(f"# What we learned from {len(rows)} reproductions", ""),
        "The main effect of each paper beside the same number of small models that this project trains on two cores in",
        "an hour or two. The reading is of the claim that the last table names, whose bound may lie away from zero; the size of the",
        "effect is shown only for comparison. `espalier report --all` writes this page.",
        *("", total, f"Every claim: [the scorecard]({card}).", "", f"![{_ALT}]({_FIGURE})", ""),
        *page.table(("paper", "main effect", "the paper", "here", "reading", "why"), rows),
        *(f"{words}.", ""),
        *page.table(
            ("paper", "claim", "what would change our mind, and its cost"),
            minds,
            "What would change our mind",
        ),
    ]


def _paper(head: Mapping[str, Any]) -> str:
    if head["paper"] is None:
        return "no comparable number"
    return f"{head['paper']:+.{head['digits']}f} {head['unit']}"


def _ours(head: Mapping[str, Any]) -> str:
    if head["value"] is None:
        return "–"
    seen = {key: math.nan if head[key] is None else head[key] for key in ("value", "low", "high")}
    value, low, high = (f"{seen[key]:+.{head['digits']}f}" for key in ("value", "low", "high"))
    return f"{value} {head['unit']} [{low}, {high}]"


def _draw(records: Mapping[str, Any]) -> Any:
    """Returns the figure of all headlines, a row each; None if there are none."""
    shown = [
        (record[page.TITLE].partition(":")[0], head)
        for record in records.values()
        if (head := record["headline"])
    ]
    if not shown:
        return None
    figure, (axes,) = panels.panels(1, (8.0, 0.66 * len(shown) + 0.9))
    for at, (_, head) in enumerate(shown):
        _draw_row(axes, at, head)
    axes.axvline(0, color="black", lw=1, ls="--")
    axes.set_xlim(-1.1, 4.2)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=10)
    axes.set_xticks([0], ["no effect"], fontsize=10)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    handles = [
        axes.plot([], [], "o", color=colour, label=word)[0]
        for word, colour in _COLOURS.items()
        if any(head["word"] == word for _, head in shown)
    ]
    handles.append(axes.plot([], [], "|", ms=12, mew=2, color="black", label="the paper")[0])
    figure.legend(
        handles=handles, ncols=len(handles), frameon=False, fontsize=10, loc="outside lower center"
    )
    return figure


def _draw_row(axes: Any, at: int, head: Mapping[str, Any]) -> None:
    """Draws a row from -1 to 1, on whose scale the largest number is 1."""
    numbers = [head[key] for key in ("paper", "value", "low", "high") if head[key] is not None]
    scale = max((abs(number) for number in numbers), default=1.0) or 1.0
    colour = _COLOURS[head["word"]]
    if head["paper"] is not None:
        axes.plot(head["paper"] / scale, at, "|", ms=18, mew=2.5, color="black")
    if head["value"] is not None:
        if None not in (head["low"], head["high"]):
            axes.plot([head["low"] / scale, head["high"] / scale], [at, at], color=colour, lw=2.5)
        axes.plot(head["value"] / scale, at, "o", ms=7, color=colour)
    axes.text(1.15, at - 0.02, textwrap.fill(head["what"], 50), fontsize=9, va="bottom")
    theirs = "" if head["paper"] is None else f"; paper {_paper(head)}"
    axes.text(
        1.15, at + 0.04, f"here {_ours(head)}{theirs}", fontsize=8.5, va="top", color="#444444"
    )
