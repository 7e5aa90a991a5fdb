"""The report of a reproduction: claims with verdicts, figures and tables, as a Markdown page and as JSON."""

import dataclasses
import json
import pathlib
import re
import string
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import tables
from espalier.launch.papers.shared import claim
from espalier.launch.papers.shared.claim import Claim, Effect
from espalier.launch.plots import panels

Parts = Mapping[str, Any]  # part of an experiment -> its results; without parts that were not run
RECORD, TITLE = "results.json", "title"
_WIDTH = 100
RULES = (
    "A claim is judged by effects: numbers by seed, such as differences of two arms of the same seed, as means with\n"
    "95 % intervals over seeds (Student's t). An effect *holds* where the whole interval lies within the claim's bounds,\n"
    "*fails* where all of it lies outside, and is *undecided* otherwise. It is *not measured* where it cannot say\n"
    "anything, such as with too few seeds or a degenerate run. A claim is *mixed* where some effects hold and some fail.\n"
    "Claims in bold must hold at this scale too; others may fail. A difference is positive where it supports its claim."
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

    def claim(self, name: str, measures: Any, *, required: bool = False, **values: Any) -> Claim:
        """Returns the claim of a section: paragraphs with its statement, its condition and the paper's figure, if it has one."""
        statement, condition, *paper = self(name, **values).split("\n\n")
        return Claim(name, statement, condition, measures, required, *paper)


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

    def judge(self, measured: Mapping[str, Any]) -> list[Claim]:
        """Returns the claims, judged on what `experiment.run` returns."""
        return claim.judge(self.claims, self.read(measured), self.places)

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
        drawn = {"claims.png": (effects_figure(judged), _EFFECTS)}
        captions = panels.save({**drawn, **self.figures(parts)}, folder)
        record = {
            "title": self.title,
            **facts,
            "claims": claim.record(judged),
            "measured": measured,
        }
        (folder / RECORD).write_text("\n".join(_json(record)) + "\n")
        figures = [
            line
            for name, caption in captions.items()
            for line in (f"![{caption}]({self.slug}/{name})", "", f"*{caption}.*", "")
        ]
        body = [_measurements(judged), figures]
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        lines = [
            *(f"# {self.title}", "", f"{self.source}.", "This page and its plots are written by"),
            *("", "```", str(facts["command"]), "```", "", "and never by hand.", ""),
            *((self.intro, "") if self.intro else ()),
            *(RULES, claim.criteria_in_words(facts.get("criteria"), self.claims), ""),
            *_verdicts(judged),
            *("## How it was measured", "", *self.setup(parts), ""),
            *(line for section in body[:: 1 if self.figures_last else -1] for line in section),
            *self.tables(parts),
            f"Versions: {versions}.",
        ]
        (out / f"{self.slug}.md").write_text("\n".join(lines) + "\n")
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


def _verdicts(judged: Sequence[Claim]) -> list[str]:
    """Returns the table of verdicts; required claims are bold."""
    rows = []
    for one in judged:
        statement = f"{one.name} {one.statement}"
        shown = f"**{statement}**" if one.required else statement
        decides = one.deciding
        effect = "" if decides is None or decides.verdict == claim.NOT_MEASURED else decides.text()
        rows.append((shown, one.condition, effect, f"**{one.verdict}**"))
    return table(("claim", "pass condition", "effect that decides", "verdict"), rows)


def _measurements(judged: Sequence[Claim]) -> list[str]:
    out = ["## Measurements", ""]
    for one in judged:
        paper = [f"The paper: {one.paper}.", ""] if one.paper else []
        lines = [_measurement(effect) for effect in one.effects]
        out += [f"### {one.name}: {one.statement}", "", *paper, *(lines or ["- Not measured."]), ""]
    return out


def _measurement(effect: claim.Effect) -> str:
    note = f" ({effect.note})" if effect.note else ""
    verdict = effect.verdict.capitalize() + (f": {effect.why}" if effect.why else "")
    return f"- {effect.where}: {effect.what}: {effect.text()}{note}; holds {effect.bounds()}. **{verdict}.**"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> list[str]:
    """Returns a Markdown table, below a heading if there is a title, and a blank line after it."""
    heading = [f"## {title}", ""] if title else []
    return [*heading, *tables.markdown(header, rows), ""]


def missing(names: Sequence[str], parts: Sequence[str], results: Parts) -> list[str]:
    """Returns the line that names runs, and those of `parts`, without results; none if there are none."""
    names = [*names, *(f"all of the part `{part}`" for part in parts if not results.get(part))]
    return [f"- Missing from this page: {', '.join(names)}."] if names else []


_COLOURS = {
    claim.HOLDS: panels.GREEN,
    claim.FAILS: panels.RED,
    claim.UNDECIDED: panels.ORANGE,
    claim.NOT_MEASURED: panels.GREY,
}
_EFFECTS = (
    "The effects that judge each claim: dots are seeds, lines are means with 95 % intervals, shaded is where the claim "
    "holds; green holds, red fails, orange is undecided, grey gives no verdict"
)
_ROW, _HEAD = 0.24, 0.8  # inches


def effects_figure(judged: Sequence[Claim]) -> Any:
    """Returns the figure; None without effects that vary over seeds."""
    shown = [(one, effects) for one in judged if (effects := _drawn(one))]
    if not shown:
        return None
    heights = [
        _HEAD + _ROW * sum(_label_lines(effect) for effect in effects) for _, effects in shown
    ]
    figure, every = panels.panels(1, (9.5, sum(heights)), rows=len(shown), heights=heights)
    for axes, (one, effects) in zip(every, shown, strict=True):
        _panel(axes, one, effects)
    return figure


def _drawn(one: Claim) -> list[Effect]:
    return [effect for effect in one.effects if not effect.exact and effect.by_seed]


def _label(effect: Effect) -> str:
    return textwrap.fill(f"{effect.what} ({effect.where})", 62)


def _label_lines(effect: Effect) -> int:
    return _label(effect).count("\n") + 1


def _panel(axes: Any, one: Claim, effects: Sequence[Effect]) -> None:
    rows = [(_label(e), list(e.by_seed.values()), e.range, _COLOURS[e.verdict]) for e in effects]
    panels.paired(axes, rows)
    low, high = axes.get_xlim()
    bounds = sorted({b for e in effects for b in (e.above, e.below) if np.isfinite(b)})
    low, high = min([low, *bounds]), max([high, *bounds])
    pad = 0.04 * (high - low)
    axes.set_xlim(low - pad, high + pad)
    for at, effect in enumerate(effects):
        left, right = max(effect.above, low - pad), min(effect.below, high + pad)
        axes.fill_betweenx([at - 0.45, at + 0.45], left, right, color=panels.GREEN, alpha=0.1, lw=0)
        for bound in (effect.above, effect.below):
            if np.isfinite(bound):
                axes.plot([bound, bound], [at - 0.45, at + 0.45], color="black", lw=0.8, ls=":")
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", alpha=0.25)
    units = {effect.unit for effect in effects}
    axes.set_xlabel(units.pop() if len(units) == 1 else "each in its own unit", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    title = textwrap.shorten(f"{one.name} {one.statement}", 100, placeholder=" …")
    axes.set_title(" ", fontsize=9)  # room for the heading, which starts at the figure's left edge
    heading = axes.annotate(
        f"{title}: {one.verdict}",
        (0.01, 1.0),
        xycoords=("figure fraction", "axes fraction"),
        xytext=(0, 5),
        textcoords="offset points",
        fontsize=9,
        weight="bold" if one.required else "normal",
    )
    heading.set_in_layout(False)
