"""The report of a reproduction: claims with verdicts, figures and tables, as a Markdown page and as JSON."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from launch.papers.shared import claim
from launch.papers.shared.claim import Claim
from launch.plots import intervals, panels

Parts = Mapping[str, Any]  # part of an experiment -> its results; without parts that were not run
MEANS = (
    "Values are means over seeds with 95 % intervals (Student's t). Claims in bold must\n"
    "hold at this scale too; other claims may fail.\n\n" + intervals.BETTER
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A paper's page.

    Attributes:
      slug: of the paper; the page is <slug>.md, figures and results.json go to the folder <slug>.
      title: of the page.
      source: the paper, as a link.
      intro: how to read values and verdicts.
      claims: of the paper.
      places: part -> its name in the evidence.
      read: returns the results of each part from what the paper's `measure.run` returns. The functions below take them.
      figures: returns file name -> (the figure, or None where there is nothing to draw; its caption).
      setup: returns how it was measured, as lines of Markdown.
      tables: returns the tables below the measurements, as lines of Markdown.
      record: returns further entries of results.json; a list under 'runs' at its end is written with one line per run
        if `run_lines`.
      figures_last: whether the figures come after the measurements.
    """

    slug: str
    title: str
    source: str
    intro: str = MEANS
    claims: Sequence[Claim]
    places: Mapping[str, str]
    read: Callable[[Mapping[str, Any]], Parts] = dict
    figures: Callable[[Parts], Mapping[str, tuple[Any, str]]]
    setup: Callable[[Parts], Iterable[str]]
    tables: Callable[[Parts], Iterable[str]]
    record: Callable[[Parts], Mapping[str, Any]]
    figures_last: bool = False
    run_lines: bool = False

    def judge(self, measured: Mapping[str, Any]) -> list[Claim]:
        """Returns the claims, judged on what `measure.run` returns."""
        return claim.judge(self.claims, self.read(measured), self.places)

    def write(
        self, measured: Mapping[str, Any], out: pathlib.Path, facts: Mapping[str, Any]
    ) -> list[Claim]:
        """Writes page, figures and results.json; returns the judged claims.

        Args:
          measured: by the paper's `measure.run`, complete or not.
          out: the folder, such as docs/reproductions.
          facts: 'command', 'versions' and whatever else the numbers depend on.
        """
        folder, parts = out / self.slug, self.read(measured)
        captions = panels.save(self.figures(parts), folder)
        judged = claim.judge(self.claims, parts, self.places)
        record = {**facts, "claims": claim.record(judged), **self.record(parts)}
        (folder / "results.json").write_text(self._json(record))
        figures = [
            line
            for name, caption in captions.items()
            for line in (f"![{caption}]({self.slug}/{name})", "", f"*{caption}.*", "")
        ]
        body = [_measurements(judged), figures]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines = [
            *(f"# {self.title}", "", f"{self.source}.", "This page and its plots are written by"),
            *("", "```", str(facts["command"]), "```", ""),
            *(f"and never by hand. {self.intro}", "", *_verdicts(judged)),
            *("## How it was measured", "", *self.setup(parts), ""),
            *(line for section in body[:: 1 if self.figures_last else -1] for line in section),
            *self.tables(parts),
            f"Versions: {versions}.",
        ]
        (out / f"{self.slug}.md").write_text("\n".join(lines) + "\n")
        return judged

    def _json(self, record: dict[str, Any]) -> str:
        if not self.run_lines:
            return json.dumps(record, indent=1) + "\n"
        runs = ",\n".join(f"  {json.dumps(run)}" for run in record.pop("runs"))
        head = json.dumps(record, indent=1).removesuffix("\n}")
        return f'{head},\n "runs": [\n{runs}\n ]\n}}\n'


def _verdicts(judged: Sequence[Claim]) -> list[str]:
    """Returns the table of verdicts; required claims are bold."""
    rows = []
    for one in judged:
        statement = f"{one.name} {one.statement}"
        shown = f"**{statement}**" if one.required else statement
        rows.append((shown, one.condition, f"**{one.verdict}**"))
    return table(("claim", "pass condition", "verdict"), rows)


def _measurements(judged: Sequence[Claim]) -> list[str]:
    out = ["## Measurements", ""]
    for one in judged:
        lines = [
            f"- {e.where}: {e.measured}. **{'Holds' if e.holds else 'Fails'}.**"
            for e in one.evidence
        ]
        out += [f"### {one.name}: {one.statement}", "", *(lines or ["- Not measured."]), ""]
    return out


def table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> list[str]:
    """Returns a Markdown table, below a heading if there is a title, and a blank line after it."""
    heading = [f"## {title}", ""] if title else []
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [*heading, lines[0], "|" + "---|" * len(header), *lines[1:], ""]


def missing(names: Sequence[str], parts: Sequence[str], results: Parts) -> list[str]:
    """Returns the line that names runs, and those of `parts`, without results; none if there are none."""
    names = [*names, *(f"all of the part `{part}`" for part in parts if not results.get(part))]
    return [f"- Missing from this page: {', '.join(names)}."] if names else []
