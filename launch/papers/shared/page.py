"""Parts of a report on runs over several domains, as lines of a page and for its results.json."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.shared import claim
from launch.papers.shared.claim import Claim
from launch.papers.shared.domains import HELD_OUT, MEAN, PARTS, DomainRuns, held_out, on
from launch.plots import intervals


@dataclasses.dataclass(frozen=True)
class Report:
    """What a paper's page says whatever was measured.

    Attributes:
      paper: name of the page.
      title: of the page.
      source: the paper, as a link.
      text: on arms and on where it falls short, lines of a list.
      parts: of the experiment.
      runs: the class of the parts' runs.
      claims: what was found -> the claims.
      draw: what was found, a folder -> plots that it has written there, with their captions.
      columns: of the tables of arms, see `table`.
    """

    paper: str
    title: str
    source: str
    text: Sequence[str]
    parts: Sequence[str]
    runs: type[DomainRuns]
    claims: Callable[[Mapping[str, Any]], list[Claim]]
    draw: Callable[[Mapping[str, Any], pathlib.Path], dict[str, str]]
    columns: Mapping[str, tuple[str, float]] = dataclasses.field(default_factory=dict)

    def write(
        self, found: Mapping[str, Any], out: pathlib.Path, facts: Mapping[str, Any]
    ) -> list[Claim]:
        """Writes <paper>.md, <paper>/results.json and the plots into `out`.

        Args:
          found: by the paper's `experiment.run`, as far as it is there.
          out: the folder, such as docs/reproductions.
          facts: command, versions and whatever else the numbers depend on.

        Returns:
          The claims.
        """
        drawn = self.draw(found, out / self.paper)
        judged, runs = self.claims(found), self.runs.parts(found)
        record = {
            **facts,
            "claims": claim.record(judged),
            "parts": {name: kept(found[name], tuple(self.columns)) for name in runs},
            **{name: value for name, value in found.items() if name not in PARTS},
        }
        (out / self.paper / "results.json").write_text(json.dumps(record, indent=1) + "\n")
        lines = [*_head(self, judged, facts), *_setup(self, runs, found), *self.text, ""]
        for name, caption in drawn.items():
            lines += [f"![{caption}]({self.paper}/{name})", "", f"*{caption}.*", ""]
        lines += ["## Measurements", "", *claim.measurements(judged)]
        for name, results in runs.items():
            lines += table(f"All arms, {name}", results, self.columns)
        lines.append(
            "Versions: " + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()) + "."
        )
        (out / f"{self.paper}.md").write_text("\n".join(lines) + "\n")
        return judged


def _head(report: Report, judged: Sequence[Claim], facts: Mapping[str, Any]) -> list[str]:
    """The page down to how it was measured."""
    return [
        f"# {report.title}",
        "",
        f"{report.source}.",
        "This page and its plots are written by",
        "",
        "```",
        str(facts["command"]),
        "```",
        "",
        "and never by hand. Losses are of held-out text, in nats per token, means over seeds with 95 % intervals",
        "(Student's t). Claims in bold must hold at this scale too; the others are reported as they come out.",
        "",
        intervals.BETTER,
        "",
        *claim.table(judged),
        "",
        "## How it was measured",
        "",
    ]


def _setup(report: Report, runs: Mapping[str, DomainRuns], found: Mapping[str, Any]) -> list[str]:
    """What was trained, and what is not there."""
    out, missing = [], []
    for name, results in runs.items():
        seeds = sorted({seed for by_seed in results.planned.values() for seed in by_seed})
        trained = [row for row in results.rows if row["tokens"]]
        minutes = sum(row["seconds"] for row in results.rows) / 60
        known = [results.floors.get(domain) for domain in results.domains]
        domains = ", ".join(
            f"{domain} ({floor:.3f})" if floor is not None else domain
            for domain, floor in zip(results.domains, known, strict=True)
        )
        entropy = "; in brackets their entropy" if any(x is not None for x in known) else ""
        out.append(
            f"- *{name}*: domains {domains}{entropy}. {len(trained)} runs, seeds "
            f"{', '.join(map(str, seeds))}; {minutes:.0f} minutes of runs. {_budgets(results)}"
        )
        missing += [f"{name} {what}" for what in results.lacking()]
    missing += [f"all of the part `{part}`" for part in report.parts if not found.get(part)]
    if missing:
        out.append(f"- Missing, and left out above and below: {', '.join(missing)}.")
    return out


def _budgets(results: DomainRuns) -> str:
    """Updates of the arms, those of one number together."""
    by_steps: dict[int, list[str]] = {}
    for row in results.rows:
        arms = by_steps.setdefault(row["step"], []) if row["tokens"] else []
        if (name := f"`{row['arm']}`") not in arms:
            arms.append(name)
    said = [f"{steps:,} ({', '.join(arms)})" for steps, arms in sorted(by_steps.items())]
    return f"Updates: {'; '.join(said)}." if said else ""


def table(title: str, results: DomainRuns, columns: Mapping[str, tuple[str, float]]) -> list[str]:
    """Losses of all arms by domain.

    Args:
      title: above it.
      results: of a part.
      columns: further numbers of rows -> (their heading, what they are divided by).
    """
    given = {
        "parameters": ("10³ parameters", 1e3),
        "tokens": ("10⁶ tokens", 1e6),
        **columns,
    }
    heads = [*(heading for heading, _ in given.values()), MEAN, *results.domains]
    out = [f"## {title}", "", f"| arm | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for arm in dict.fromkeys(row["arm"] for row in results.rows):
        rows = list(results.find(arm).values())
        if not any(map(held_out, rows)):  # made, and not measured
            continue
        cells = []
        for key, (_, unit) in given.items():
            values = [row[key] / unit for row in rows if row.get(key)]
            cells.append(f"{np.mean(values):.4g}" if values else "")
        for score in (MEAN, *map(on, results.domains)):
            values_N = results.values(arm, score)
            cells.append(results.mean(values_N, score) if values_N.size else "")
        out.append(f"| {results.label(arm)} (`{arm}`) | {' | '.join(cells)} |")
    return [*out, ""]


def kept(found: Mapping[str, Any], more: Sequence[str] = ()) -> dict[str, Any]:
    """Of a part, what the page is made of, for whoever wants to count again.

    Args:
      found: as domain_runs.part returns it.
      more: further keys of rows.
    """
    keys = ("run", "arm", "seed", "parents", "parameters", "step", "tokens", "seconds", *more)
    rows = [
        {
            **{key: row.get(key) for key in keys},
            "loss": held_out(row),
            "curve": row["curve"],
            "evaluations": {
                name: value
                for name, value in row.get("evaluations", {}).items()
                if name != HELD_OUT
            },
        }
        for row in found["rows"]
    ]
    return {"domains": list(found["domains"]), "floors": dict(found["floors"]), "runs": rows}
