"""The report of a reproduction: claims with verdicts, figures and tables, as a Markdown page and as JSON."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from launch.papers.shared import claim
from launch.papers.shared.claim import Claim
from launch.plots import intervals, panels

Measured = Mapping[str, Any]  # what a paper's `measure.run` returns, by part
MEANS = (
    "Values are means over seeds with 95 % intervals (Student's t). Claims in bold must\n"
    "hold at this scale too; the others are reported as they come out.\n\n" + intervals.BETTER
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A paper's page. All functions take what `measure.run` returns, complete or not.

    Attributes:
      slug: of the paper; the page is <slug>.md, figures and results.json go to the folder <slug>.
      title: of the page.
      source: the paper, as a link.
      intro: how values and verdicts are to be read.
      claims: returns the judged claims.
      figures: returns file name -> (the figure, or None where there is nothing to draw; its caption).
      setup: returns how it was measured, as lines of Markdown.
      tables: returns the tables below the measurements, as lines of Markdown.
      record: returns what results.json keeps beside command, versions and claims; a list under 'runs' at its end is
        written with one line per run if `run_lines`.
      figures_last: whether the figures come after the measurements.
    """

    slug: str
    title: str
    source: str
    intro: str
    claims: Callable[[Measured], list[Claim]]
    figures: Callable[[Measured], Mapping[str, tuple[Any, str]]]
    setup: Callable[[Measured], Iterable[str]]
    tables: Callable[[Measured], Iterable[str]]
    record: Callable[[Measured], Mapping[str, Any]]
    figures_last: bool = False
    run_lines: bool = False

    def write(self, measured: Measured, out: pathlib.Path, facts: Mapping[str, Any]) -> list[Claim]:
        """Writes page, figures and results.json; returns the judged claims.

        Args:
          measured: by the paper's `measure.run`.
          out: the folder, such as docs/reproductions.
          facts: 'command', 'versions' and whatever else the numbers depend on.
        """
        folder = out / self.slug
        captions = panels.save(self.figures(measured), folder)
        judged = self.claims(measured)
        record = {**facts, "claims": claim.record(judged), **self.record(measured)}
        (folder / "results.json").write_text(self._json(record))
        figures = [
            line
            for name, caption in captions.items()
            for line in (f"![{caption}]({self.slug}/{name})", "", f"*{caption}.*", "")
        ]
        measurements = ["## Measurements", "", *claim.measurements(judged)]
        body = [measurements, figures] if self.figures_last else [figures, measurements]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines = [
            *(
                f"# {self.title}",
                "",
                f"{self.source}.",
                "This page and its plots are written by",
                "",
            ),
            *("```", str(facts["command"]), "```", "", f"and never by hand. {self.intro}", ""),
            *(*claim.table(judged), ""),
            *("## How it was measured", "", *self.setup(measured), ""),
            *(line for section in body for line in section),
            *self.tables(measured),
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


def table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> list[str]:
    """Returns a Markdown table, below a heading if there is a title, and a blank line after it."""
    heading = [f"## {title}", ""] if title else []
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [*heading, lines[0], "|" + "---|" * len(header), *lines[1:], ""]


def missing(names: Sequence[str]) -> list[str]:
    """Returns the line that names the runs and parts without results; none if there are none."""
    return [f"- Missing, and left out above and below: {', '.join(names)}."] if names else []
