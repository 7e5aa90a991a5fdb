"""The report of a reproduction: claims with verdicts, figures and tables, as a Markdown page and as JSON."""

import dataclasses
import functools
import json
import math
import pathlib
import re
import string
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import files, tables
from espalier.launch.papers.shared import claim, criteria, verdicts_figure
from espalier.launch.papers.shared.claim import Claim, Effect
from espalier.launch.papers.shared.headline import Headline
from espalier.launch.plots import panels

Parts = Mapping[str, Any]  # part of an experiment -> its results; without parts that were not run
RECORD, TITLE = "results.json", "title"
_WIDTH = 100
VERDICTS = (
    "Each claim has one primary effect: a number by seed, such as the difference of two arms of the same seed. It is shown as\n"
    "the mean with an interval over seeds (Student's t). The claim *holds* where the whole interval lies within its bounds,\n"
    "*fails* where all of it lies outside, and is *undecided* otherwise; *not measured* means that the runs cannot say\n"
    "anything, such as a degenerate run, a score at its floor, or fewer seeds than the first look asks for. Seeds run in\n"
    "blocks, and a claim is looked at after each until one decides it, the last is done, or the runs were stopped; seeds that\n"
    "ran later, for other claims, change neither verdict nor interval. Intervals of several looks are wider than one of 95 %,\n"
    "so that all looks together miss the true value in at most 5 % of cases, if values over seeds are normal."
)
GAIN = "A gain is positive where the arm that is named first is better."
RULES = (
    f"{VERDICTS} *Smallest\n"
    "effect* is the distance from the bound that so many seeds show with a power of 80 %, if they vary as these do;\n"
    f"*exchanged* is in how many of {claim.DRAWS} exchanges of measurements at random, less those that leave the primary effect as it is\n"
    "or give no verdict, the claim would hold. In brackets is how many of them differ: a share below one in that number cannot\n"
    f"be seen, and with fewer than {claim.DIFFERENT} none is given. Secondary effects judge nothing; their intervals are of 95 %, over all of\n"
    f"their seeds. Claims in bold must hold at this scale too. {GAIN}\n"
    "Figures of arms side by side have the seeds that all of them have; tables of all arms say how many seeds each has."
)


@dataclasses.dataclass(frozen=True)
class Prose:
    """The texts of a paper's page, with {slots} for what its module knows, such as {length:,} or {experiment.STEPS}.

    Attributes:
      sections: name -> text.
      names: what slots may name beside the values that they are given.
    """

    sections: Mapping[str, str]
    names: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, module: str) -> "Prose":
        """Returns the sections of page.md beside a module, each below a line `<!-- name -->`; slots may name what the module has."""
        names = vars(sys.modules[module])
        text = pathlib.Path(names["__file__"]).with_name("page.md").read_text(encoding="utf-8")
        _, *parts = re.split(r"^<!-- (\w+) -->\n", text, flags=re.MULTILINE)
        pairs = zip(parts[::2], parts[1::2], strict=True)
        return cls({name: section.strip("\n") for name, section in pairs}, names)

    def __call__(self, section: str, **values: Any) -> str:
        """Returns a section with its slots filled.

        Raises:
          ValueError: a slot has no value, or a value no slot.
        """
        text = self.sections[section]
        fields = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
        slots = {re.split(r"[.\[]", name)[0] for name in fields}
        lacking, extra = slots - {*values, *self.names}, set(values) - slots
        if lacking or extra:
            raise ValueError(
                f"The section {section!r} has no value for the slots {sorted(lacking)}, and no slot for the values "
                f"{sorted(extra)}."
            )
        return text.format_map({**self.names, **values})

    def claim(
        self,
        name: str,
        part: str,
        measure: claim.Measure,
        *,
        planned: claim.Planned,
        above: float = -math.inf,
        below: float = math.inf,
        required: bool = False,
        control: bool = False,
        secondary: Mapping[str, Sequence[claim.Measure]] | None = None,
        looks: Sequence[int] | None = None,
        **values: Any,
    ) -> Claim:
        """Returns the claim of a section: paragraphs with its statement, its condition and the paper's figure, if it has one.

        Args:
          name: of the section and the claim.
          part: of the experiment, whose results have the primary effect.
          measure: of the primary effect.
          planned: what the number of seeds was chosen by.
          above, below: bounds of the primary effect.
          required: whether it must hold at small scale too.
          control: whether it is a control rather than a claim of the paper.
          secondary: part -> measures of further effects.
          looks: numbers of seeds at which it is judged; default: SEEDS of the experiment that the text may name.
          **values: of the slots.
        """
        statement, condition, *paper = self(name, **values).split("\n\n")
        return Claim(
            name=name,
            statement=statement,
            condition=condition,
            part=part,
            measure=measure,
            above=above,
            below=below,
            planned=planned,
            looks=tuple(self.names["experiment"].SEEDS if looks is None else looks),
            required=required,
            group=claim.CONTROL if control else claim.PAPER,
            paper="".join(paper),
            secondary=secondary or {},
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A paper's page.

    Attributes:
      slug: of the paper; the page is <slug>.md, figures and results.json go to the folder <slug>.
      title: of the page.
      source: the paper, as a link.
      intro: what to know before the verdicts, such as that a baseline is in doubt; below it are the rules of verdicts.
      claims: of the paper.
      places: part -> its name in the evidence.
      read: returns the results of each part from what the paper's `experiment.run` returns, also after a round trip through
        JSON, whose keys are text. The functions below take them.
      figures: returns file name -> (the figure, or None where there is nothing to draw; its caption).
      setup: returns how it was measured, as lines of Markdown.
      tables: returns the tables below the measurements, as lines of Markdown.
      shuffle: returns what `experiment.run` returns with its measurements exchanged at random, so that no claim is true.
      figures_last: whether the figures come after the measurements.
      headline: the paper's main effect and ours.
    """

    slug: str
    title: str
    source: str
    intro: str = ""
    claims: Sequence[Claim]
    places: Mapping[str, str]
    read: Callable[[Mapping[str, Any]], Parts] = dict
    figures: Callable[[Parts], Mapping[str, tuple[Any, str]]]
    setup: Callable[[Parts], Iterable[str]]
    tables: Callable[[Parts], Iterable[str]]
    shuffle: Callable[[Mapping[str, Any], np.random.Generator], Mapping[str, Any]] = (
        claim.shuffle_arms
    )
    figures_last: bool = False
    headline: Headline | None = None

    def judge(self, measured: Mapping[str, Any], *, secondary: bool = True) -> list[Claim]:
        """Returns the claims, judged on what `experiment.run` returns, with their secondary effects if these are wanted."""
        return claim.judge(self.claims, self.read(measured), self.places, secondary=secondary)

    def write(
        self, measured: Mapping[str, Any], out: pathlib.Path, facts: Mapping[str, Any]
    ) -> list[Claim]:
        """Writes page, figures and results.json; returns the judged claims.

        Args:
          measured: by the paper's `experiment.run`, complete or not, or the entry 'measured' of results.json.
          out: the folder, such as docs/reproductions.
          facts: 'command', 'versions', 'criteria' (of criteria.fix) and whatever else the numbers depend on.
        """
        measured = json.loads(json.dumps(measured))
        folder, parts = out / self.slug, self.read(measured)
        judged = claim.judge(self.claims, parts, self.places)
        primary = functools.partial(self.judge, secondary=False)
        null = claim.exchanges(primary, self.shuffle, measured)
        drawn = {"claims.png": (verdicts_figure.draw(judged, null), verdicts_figure.CAPTION)}
        captions = panels.save({**drawn, **self.figures(parts)}, folder)
        record = {
            "title": self.title,
            **facts,
            "headline": self.headline.record(judged, parts, self.places[self.headline.part])
            if self.headline
            else None,
            "claims": claim.record(judged, null),
            "measured": measured,
        }
        files.write(folder / RECORD, "\n".join(_json(record)) + "\n", synced=True)
        figures = [
            line
            for name, caption in captions.items()
            for line in (f"![{caption}]({self.slug}/{name})", "", f"*{caption}.*", "")
        ]
        body = [_measurements(judged, null), figures]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines = [
            *(f"# {self.title}", "", f"{self.source}.", "This page and its plots are written by"),
            *("", "```", str(facts["command"]), "```", "", "and never by hand.", ""),
            *((self.intro, "") if self.intro else ()),
            *(RULES, criteria.in_words(facts.get("criteria"), self.claims), ""),
            *(line for group in claim.GROUPS for line in _verdicts(judged, null, group)),
            *("## How it was measured", "", *self.setup(parts), ""),
            *(line for section in body[:: 1 if self.figures_last else -1] for line in section),
            *self.tables(parts),
            *_costs(measured),
            f"Versions: {versions}.",
        ]
        files.write(out / f"{self.slug}.md", "\n".join(lines) + "\n", synced=True)
        return judged


def _json(value: Any, indent: int = 0) -> list[str]:
    """Returns a value as lines of JSON: its objects down to those that fit a line, and lists of them line by line."""
    short = json.dumps(value)
    if len(short) + indent <= _WIDTH or not isinstance(value, dict | list):
        return [short]
    if isinstance(value, list):
        if not any(isinstance(one, dict) for one in value):
            return [short]
        items = [[json.dumps(one)] for one in value]
    else:
        items = []
        for key, one in value.items():
            first, *rest = _json(one, indent + 1)
            items.append([f"{json.dumps(key)}: {first}", *rest])
    pad, (start, end) = " " * (indent + 1), "[]" if isinstance(value, list) else "{}"
    out = [start]
    for at, lines in enumerate(items):
        # Lines below the first of an item have their indentation.
        first, *rest = lines
        out += [pad + first, *rest]
        out[-1] += "," if at < len(items) - 1 else ""
    return [*out, " " * indent + end]


_COLUMNS = (
    "claim",
    "holds if",
    "primary effect",
    "seeds",
    "smallest effect",
    "exchanged",
    "verdict",
)


def _verdicts(judged: Sequence[Claim], null: Mapping[str, Any], group: str) -> list[str]:
    """Returns the table of the verdicts of a group; required claims are bold."""
    rows = []
    for one in judged:
        if one.group != group:
            continue
        statement = f"{one.name} {one.statement}"
        shown = f"**{statement}**" if one.required else statement
        effect = one.primary.text(one.range) if one.primary else ""
        unit = f" {one.primary.unit}".rstrip() if one.primary else ""
        smallest = "" if math.isnan(one.smallest) else f"{one.smallest:.2g}{unit}"
        rows.append(
            (
                *(shown, one.condition, effect, str(one.seeds or ""), smallest),
                *(_held(one, null.get(one.name)), f"**{one.verdict}**"),
            )
        )
    return (
        table(_COLUMNS, rows, f"Claims {group}" if group == claim.PAPER else group.capitalize())
        if rows
        else []
    )


def _held(one: Claim, null: Mapping[str, Any] | None) -> str:
    if null is None:
        return "" if one.verdict == claim.NOT_MEASURED else "too few"
    return f"{null['holds']} of {null['draws']} ({null['different']})"


def _measurements(judged: Sequence[Claim], null: Mapping[str, Any]) -> list[str]:
    out = ["## Measurements", ""]
    for one in judged:
        paper = [f"The paper: {one.paper}.", ""] if one.paper else []
        primary = [_primary(one, null.get(one.name))] if one.primary else ["- Not measured."]
        lines = [*primary, _plan(one), *map(_secondary, one.others)]
        out += [f"### {one.name}: {one.statement}", "", *paper, *lines, ""]
    return out


def _primary(one: Claim, null: Mapping[str, Any] | None) -> str:
    effect = one.primary
    assert effect is not None
    note = f" ({effect.note})" if effect.note else ""
    later = len(effect.by_seed) - one.seeds
    looked = f" at {one.seeds} seeds" * (one.seeds in one.looks)
    looked += f", {later} more judge nothing" * (later > 0)
    verdict = one.verdict.capitalize() + looked + (f": {one.why}" if one.why else "")
    seen = effect.text(one.range)
    of_null = (
        f" With arms exchanged its mean lies between {null['low']:.3g} and {null['high']:.3g} in nine of ten draws."
        if null
        else ""
    )
    return (
        f"- **Primary**: {effect.where}: {effect.what}: {seen}{note}; holds {one.bounds()}. "
        f"**{verdict}.**{_absent(effect)}{of_null}"
    )


def _absent(effect: Effect) -> str:
    """Returns the seeds that an effect lacks, with the reasons, as a sentence."""
    gone = "; ".join(f"seed {seed}, {why}" for seed, why in effect.absent.items())
    return f" Left out: {gone}." if gone else ""


def _plan(one: Claim) -> str:
    planned = one.planned
    looks = ", ".join(map(str, one.looks))
    return (
        f"- Plan: judged at {looks} seeds, which show an effect of {planned.expected:.3g} with a power of {100 * one.power:.0f} %, "
        f"if the deviation over seeds is {planned.sd:.2g} ({planned.source})."
    )


def _secondary(effect: Effect) -> str:
    note = f" ({effect.note})" if effect.note else ""
    unmet = _absent(effect) + (f" No comparison: {effect.unmet}." if effect.unmet else "")
    seeds = len(effect.by_seed)
    return f"- {effect.where}: {effect.what}: {effect.text()}{note}, {seeds} seed{'s' * (seeds != 1)}.{unmet}"


def _costs(measured: Mapping[str, Any]) -> list[str]:
    """Returns the table of what the runs of each arm took, over all parts that are rows of runs; none without such rows."""
    seconds: dict[tuple[str, str], list[float]] = {}
    for part, value in measured.items():
        rows = value.get("rows", ()) if isinstance(value, Mapping) else value
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, Mapping) and row.get("seconds") is not None and "arm" in row:
                arm = row["arm"] + (f", {row['size']}" if row.get("size") else "")
                seconds.setdefault((part, arm), []).append(row["seconds"])
    if not seconds:
        return []
    total = sum(map(sum, seconds.values())) / 60
    cells = [
        (
            part,
            f"`{arm}`",
            str(len(every)),
            f"{sum(every) / len(every):.0f}",
            f"{sum(every) / 60:.1f}",
        )
        for (part, arm), every in seconds.items()
    ]
    header = ("part", "arm", "runs", "seconds of a run", "minutes of all")
    shown = table(header, [*cells, ("", "all", "", "", f"{total:.0f}")], "What the runs took")
    return [*shown, "Each run had one of two cores, which other work may have shared.", ""]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> list[str]:
    """Returns a Markdown table, below a heading if there is a title, and a blank line after it."""
    heading = [f"## {title}", ""] if title else []
    return [*heading, *tables.markdown(header, rows), ""]


def missing(names: Sequence[str], parts: Sequence[str], results: Parts) -> list[str]:
    """Returns the line that names runs, and those of `parts`, without results; none if there are none."""
    names = [*names, *(f"all of the part `{part}`" for part in parts if not results.get(part))]
    return [f"- Missing from this page: {', '.join(names)}."] if names else []
