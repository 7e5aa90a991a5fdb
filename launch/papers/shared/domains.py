"""Runs that are evaluated on several domains: losses of groups of domains, at the end and over training, and routers' loads.

A collapsed router makes a comparison with it decide nothing.
"""

import collections
import dataclasses
import functools
import importlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Self

import numpy as np

from espalier.launch.papers.shared import page, results, sweeps
from espalier.launch.papers.shared.claim import Measure
from espalier.launch.papers.shared.results import named

ROUTING = "routing"  # the evaluation, launch/evaluate/routing.py
# Largest share of the tokens that one expert of a layer may get. Above it, a top-1 router has collapsed: the layer is dense
# in all but name, and a comparison with it decides nothing.
LOAD_BOUND = 0.8
ROUTERS = {"mlp": "FFN", "attention": "attention"}


def choices(
    row: Mapping[str, Any], router: str, domains: Sequence[str] | None = None
) -> np.ndarray | None:
    """Returns the share of each domain's tokens whose first choice an expert is: [layer, domain, expert].

    Of all domains that were measured if `domains` is None; None without the evaluation 'routing' on all of them.
    """
    chosen = ((row.get("evaluations") or {}).get(ROUTING) or {}).get("chosen", {})
    names = tuple(chosen) if domains is None else domains
    if not chosen or not all(router in chosen.get(name, {}) for name in names):
        return None
    return np.array([chosen[name][router] for name in names]).swapaxes(0, 1)


def largest_loads(choices_LDE: np.ndarray) -> np.ndarray:
    """Returns the largest share of the tokens of all domains, in equal parts, that an expert of each layer gets."""
    return choices_LDE.mean(1).max(-1)


def collapsed(row: Mapping[str, Any], routers: Sequence[str]) -> str:
    """Returns which of a run's top-1 routers sends too many tokens of a layer to one expert; empty if none does."""
    for router in routers:
        if (choices_LDE := choices(row, router)) is None:
            return f"the loads of its {ROUTERS[router]} router were not measured"
        for layer, load in enumerate(largest_loads(choices_LDE)):
            if load > LOAD_BOUND:
                return (
                    f"the {ROUTERS[router]} router of layer {layer} sends {load:.2f} of the tokens to one expert, "
                    f"more than {LOAD_BOUND}"
                )
    return ""


def load_table(name: str, runs: Any) -> list[str]:
    """Returns the table of the largest loads of all routers by layer: the mean over seeds, and the largest."""
    lines, layers = [], 0
    for arm in runs.arms:
        rows = [row for row in runs.find(arm).values() if row["tokens"]]
        for router, kind in ROUTERS.items():
            measured = [x for row in rows if (x := choices(row, router)) is not None]
            if not measured:
                continue
            loads_NL = np.array([largest_loads(x) for x in measured])
            cells = [
                f"{mean:.2f} ({most:.2f})"
                for mean, most in zip(loads_NL.mean(0), loads_NL.max(0), strict=True)
            ]
            top = "top-1" if router in runs.top_1(arm) else ""
            lines.append((runs.title(arm), kind, top, *cells))
            layers = len(cells)
    if not lines:
        return []
    title = f"Largest share of the tokens that one expert gets, {name}: mean over seeds (largest)"
    header = ("arm", "router", "", *(f"layer {i}" for i in range(layers)))
    return page.table(header, lines, title)


MEAN, PERPLEXITY = "mean loss", "mean perplexity"
_KEYS = (
    *("run", "arm", "seed", "parents", "step", "tokens", "tokens_total", "flops", "seconds"),
    *("evaluations", "digest"),
)
# The parts of these papers that are sweeps.
SYNTHETIC, TEXT, SIZES, BALANCE = "synthetic", "text", "sizes", "balance"
PARTS = {
    SYNTHETIC: "generated domains",
    TEXT: "text of installed packages",
    SIZES: "generated domains at other widths",
    BALANCE: "generated domains, with biases in place of a balance loss",
}
# Of the part BALANCE: a bias of a score between 0 and 1 goes from one end to the other in a sixth of a mixture's updates.
BALANCED_BY = "t5x_configs/methods/moe/balance_bias.gin"
BIAS_RATE = 0.01
HELD_OUT = "held_out"
SOLVED = 0.02  # nats above the entropy: arms that are all nearer to it cannot differ
_INTRO = "Losses are of held-out text, in nats per token."


@dataclasses.dataclass(frozen=True)
class DomainRuns(results.Results):
    """Runs of a part, as `part` returns them. A score is the mean loss of a group of domains, or the mean of perplexities.

    Attributes:
      domains: names of all tasks, the general one first.
      groups: score -> the domains whose losses, in nats per token, it averages.
      floors: entropy of a domain in nats per token, where it is known.
      planned: arm -> seed -> names of the evaluations that the run should have.
    """

    domains: Sequence[str] = ()
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    planned: Mapping[str, Mapping[int, Sequence[str]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, measured: Mapping[str, Any]) -> Self:
        """Returns the runs of a part from what `part` returns."""
        domains = tuple(measured["domains"])
        groups: dict[str, Sequence[str]] = {MEAN: domains}
        for domain in domains:
            groups[on(domain)] = (domain,)
            groups[off(domain)] = tuple(other for other in domains if other != domain)
        groups |= cls.more_groups(domains)
        planned = {
            arm: {int(seed): names for seed, names in by_seed.items()}
            for arm, by_seed in measured["planned"].items()
        }
        return cls(measured["rows"], domains, groups, measured["floors"], planned)

    @classmethod
    def more_groups(cls, domains: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """Returns a paper's own groups, in addition to MEAN, and `on` and `off` of each domain."""
        del domains
        return {}

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        losses = held_out(row)
        scores = {
            score: float(np.mean([losses[task] for task in tasks]))
            if tasks and all(task in losses for task in tasks)
            else None
            for score, tasks in self.groups.items()
        }
        complete = scores[MEAN] is not None
        return scores | {
            PERPLEXITY: float(np.mean([np.exp(losses[task]) for task in self.domains]))
            if complete
            else None
        }

    def digits(self, score: str) -> int:
        return 3

    def limits(self, score: str) -> tuple[float, float] | None:
        """Returns the losses of a model that has learned all of some generated domains, and of one that has learned nothing."""
        if score not in self.groups or (floor := self.floor(score)) is None:
            return None
        from espalier.launch.papers.nexus import lag_domains

        return floor + SOLVED, float(np.log(len(lag_domains.SYMBOLS)))

    def parts(self, score: str) -> Sequence[str]:
        """Returns the scores of a group's domains."""
        tasks = self.groups.get(score, ())
        return [on(task) for task in tasks] if len(tasks) > 1 else []

    def floor(self, score: str) -> float | None:
        """Returns the mean entropy of a group of domains, None where one of them is not known."""
        floors = [self.floors.get(task) for task in self.groups[score]]
        known = [floor for floor in floors if floor is not None]
        return float(np.mean(known)) if floors and len(known) == len(floors) else None

    def at(self, step: int) -> Self:
        """Returns the runs as they were evaluated at a step, without those that were not.

        At step 0 a run has the losses of its start, the run of the arm `<arm>_start`, if there is one.
        """
        return self._by_step.get(step) or dataclasses.replace(self, rows=[])

    @functools.cached_property
    def _by_step(self) -> dict[int, Self]:
        rows = collections.defaultdict(list)
        # Not by `find`: who reads one arm at a step has not read all of them.
        made = {(row["arm"], row["seed"]): row for row in self.rows}
        for row in self.rows:
            curve = dict(row["curve"])
            start = made.get((f"{row['arm']}_start", row["seed"]))
            if start and curve.get(0) is None:
                curve[0] = held_out(start)
            for step, losses in curve.items():
                if losses:
                    tasks = {task: {"loss": loss} for task, loss in losses.items()}
                    rows[step].append({**row, "held_out": tasks, "step": step})
        return {step: dataclasses.replace(self, rows=some) for step, some in rows.items()}

    def steps(self, *arms: str) -> list[int]:
        """Returns the steps at which all runs of the arms were evaluated; step 0 where the start is known."""
        rows = [row for arm in arms for row in self.find(arm).values()]
        return sorted(
            step
            for step, runs in self._by_step.items()
            if rows and all(row["seed"] in runs.find(row["arm"]) for row in rows)
        )

    def lacking(self) -> list[str]:
        """Returns the names of planned runs and evaluations that are missing, with their seeds."""
        seeds = sorted({seed for by_seed in self.planned.values() for seed in by_seed})
        gone = [seed for seed in seeds if seed not in self.seeds]
        out = [f"all of seed {seed}" for seed in gone]
        for arm, by_seed in self.planned.items():
            rows = self.find(arm)
            left = [seed for seed in by_seed if seed not in rows and seed not in gone]
            out += named(f"`{arm}`", left, set(by_seed) - set(gone))
            for name in dict.fromkeys(name for names in by_seed.values() for name in names):
                left = [
                    s for s in rows if name in by_seed.get(s, ()) and not self._has(rows[s], name)
                ]
                out += named(f"`{name}` of `{arm}`", left, by_seed)
        return out

    def _has(self, row: Mapping[str, Any], evaluation: str) -> bool:
        if evaluation == HELD_OUT:
            return set(self.domains) <= set(held_out(row))
        return bool(row["evaluations"].get(evaluation))

    def top_1(self, arm: str) -> Sequence[str]:
        """Returns the kinds of routers of an arm, of loads.ROUTERS, that choose one expert for each token."""
        del arm
        return ()

    def degenerate(self, row: Mapping[str, Any]) -> str:
        return collapsed(row, self.top_1(row["arm"])) if row.get("tokens") else ""

    def choices(self, arm: str, router: str = "mlp") -> dict[int, np.ndarray]:
        """Returns `loads.choices` of an arm's runs on all domains by seed: [layer, domain, expert]."""
        tables = {seed: choices(row, router, self.domains) for seed, row in self.find(arm).items()}
        return {seed: table for seed, table in tables.items() if table is not None}

    def experts(self, arm: str, count: int) -> list[str]:
        """Returns the names of an arm's experts, numbers if they are not known."""
        measured = self.evaluation(arm, ROUTING)
        names = measured[0]["experts"] if measured else []
        return list(names) if len(names) == count else [f"expert {i}" for i in range(count)]

    def evaluation(self, arm: str, name: str) -> list[Any]:
        """Returns the results of an evaluation of an arm, of the seeds that have it."""
        rows = self.find(arm).values()
        return [row["evaluations"][name] for row in rows if row.get("evaluations", {}).get(name)]


def on(domain: str) -> str:
    """Returns the score of a domain alone."""
    return f"loss on {domain}"


def off(domain: str) -> str:
    """Returns the score of all domains but one."""
    return f"mean loss off {domain}"


def held_out(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the loss by task of a run's last evaluation, else of its evaluation 'held_out' (espalier evaluate loss)."""
    tasks = row.get("held_out") or (row.get("evaluations") or {}).get(HELD_OUT, {}).get("tasks", {})
    return {task: float(values["loss"]) for task, values in tasks.items() if "loss" in values}


# How claims are measured.


def pairs(
    *arms: tuple[str, str], score: str = MEAN, step: int | None = None, **settings: Any
) -> Measure:
    """Returns a measure of whether the first arm of each pair has the lower loss at a step, or at the end if None.

    `settings` are `relative` of `Results.gain`, and fields of `Effect`.
    """
    measure = results.compare(score, *arms, **settings)
    if step is None:
        return measure
    return lambda runs, where: measure(runs.at(step), f"{where}, {step} updates")


# How parts are run and read.


def run(
    paper: str, *, parts: Sequence[str], model_dir: str, seeds: int, **options: Any
) -> dict[str, Any]:
    """Returns what `part` returns, by part; `model_dir` is the parent of the parts' folders, `options` are for `sweeps.rows`."""
    return {name: part(paper, name, model_dir, seeds, **options) for name in parts}


def part(paper: str, name: str, model_dir: str, seeds: int, **options: Any) -> dict[str, Any]:
    """Returns {"rows", "domains", "floors", "planned"} of a part of a paper's sweep, after its unfinished runs.

    The sweep's file is launch/papers/<paper>/experiment.py. It takes 'PART,SEEDS' and has DOMAINS by part, the general one
    first; a tuple among them groups several. Beyond the first seeds only those arms are planned that go on
    (`sweeps.Further`).

    Raises:
      ValueError, sweeps.StoppedError: see `sweeps.rows`.
    """
    entries = sweep(paper).DOMAINS[name]
    domains = [x for entry in entries for x in ((entry,) if isinstance(entry, str) else entry)]
    file = f"{paper}/experiment", f"{name},{seeds}"
    rows = sweeps.parts(model_dir, {name: file}, with_course, **options)[name]
    planned: dict[str, dict[int, tuple[str, ...]]] = collections.defaultdict(dict)
    further = options.get("further")
    for one in sweeps.planned(*file):
        if further is not None and not further.includes(one):
            continue
        # A trained run is evaluated on its held-out rows when it ends.
        planned[one.arm][one.seed] = (*one.evaluations, *(() if one.made else (HELD_OUT,)))
    floors = entropy_floors(domains)
    return {"rows": rows, "domains": tuple(domains), "floors": floors, "planned": planned}


def sweep(paper: str) -> Any:
    """Returns the module of a paper's sweep."""
    return importlib.import_module(f"espalier.launch.papers.{paper}.experiment")


def with_course(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what pages need of a row, with 'curve', [(step, {task: loss})] of its evaluations, and 'parameters'.

    A run that was made and not trained has an empty curve and None.
    """
    curve: dict[int, dict[str, float]] = {}
    for line in sweeps.metrics(directory):
        for key, value in line.items():
            if key.startswith("eval/") and key.endswith("/loss"):
                task = key.removeprefix("eval/").removesuffix("/loss")
                curve.setdefault(line["step"], {})[task] = value
    about = directory / "run.json"
    parameters = json.loads(about.read_text())["parameters"] if about.exists() else None
    losses = {task: {"loss": loss} for task, loss in held_out({**row, "evaluations": {}}).items()}
    return {
        **{key: row.get(key) for key in _KEYS},
        **{"held_out": losses, "curve": sorted(curve.items()), "parameters": parameters},
    }


def entropy_floors(domains: Sequence[str]) -> dict[str, float]:
    """Returns the entropy of those domains that are generated (launch/papers/nexus/lag_domains.py)."""
    from espalier.launch.papers.nexus import lag_domains

    known = [domain for domain in domains if domain in lag_domains.DOMAINS]
    return {name: lag_domains.entropy_floor(lag_domains.DOMAINS[name]) for name in known}


# The report.


def shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns measurements with the losses of arms exchanged at random within each seed; all else stays with its arm.

    Losses at the end are exchanged between all arms, those on the way between arms that were read at the same steps. Parts
    without rows of runs stay as they are.
    """
    return {
        part: {**value, "rows": _exchanged(value["rows"], rng)} if "rows" in value else value
        for part, value in measured.items()
    }


def _exchanged(rows: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> list[Any]:
    groups: dict[Any, list[int]] = collections.defaultdict(list)
    for at, row in enumerate(rows):
        if row["held_out"]:
            groups[row["seed"], "held_out"].append(at)
        if row["curve"]:
            groups[row["seed"], "curve", *(step for step, _ in row["curve"])].append(at)
        if row["evaluations"].get(HELD_OUT):
            groups[row["seed"], "evaluations"].append(at)
    out = [dict(row) for row in rows]
    for (_, key, *_steps), places in groups.items():
        for at, source in zip(places, rng.permutation(places), strict=True):
            value = rows[source][key]
            if key == "evaluations":
                value = {**rows[at][key], HELD_OUT: value[HELD_OUT]}
            out[at][key] = value
    return out


def report(
    runs: type[DomainRuns],
    parts: Sequence[str],
    text: Sequence[str],
    columns: Mapping[str, tuple[str, float]] = MappingProxyType({}),
    places: Mapping[str, str] = MappingProxyType({}),
    intro: str = "",
    **settings: Any,
) -> page.Report:
    """Returns the page of a paper whose runs are evaluated on domains.

    Args:
      runs: class of the parts' runs.
      parts: of the experiment; those that are not in PARTS have results of their own kind.
      text: on the arms and on limits of the experiment, lines of a Markdown list.
      columns: further numbers of rows in the tables -> (their heading, the unit they are divided by).
      places: part that is not in PARTS -> its name in the effects.
      intro: what to know before the verdicts.
      **settings: the remaining fields of `page.Report`; by default arms are exchanged by `shuffle`.
    """
    shown = {"parameters": ("10³ parameters", 1e3), "tokens": ("10⁶ tokens", 1e6), **columns}
    return page.Report(
        intro="\n".join(filter(None, (intro, _INTRO))),
        places={**{name: name for name in PARTS}, **places},
        read=functools.partial(_read, runs),
        setup=lambda results: [*_setup(results, parts), *text],
        tables=lambda results: [
            line
            for name, one in swept(results).items()
            for line in (*_table(f"All arms, {name}", one, shown), *load_table(name, one))
        ],
        **{"shuffle": shuffle, **settings},
    )


def _read(runs: type[DomainRuns], measured: Mapping[str, Any]) -> dict[str, Any]:
    swept = {name: runs.of(measured[name]) for name in PARTS if measured.get(name, {}).get("rows")}
    return swept | {name: value for name, value in measured.items() if name not in PARTS}


def swept(results: page.Parts) -> dict[str, Any]:
    """Returns the results of those PARTS that have any."""
    return {name: results[name] for name in PARTS if name in results}


def _setup(results: page.Parts, parts: Sequence[str]) -> list[str]:
    """Returns the description of the runs, and the names of missing ones."""
    out, missing = [], []
    for name, one in swept(results).items():
        seeds = sorted({seed for by_seed in one.planned.values() for seed in by_seed})
        trained = [row for row in one.rows if row["tokens"]]
        minutes = sum(row["seconds"] for row in one.rows) / 60
        domains = ", ".join(
            f"{domain} ({one.floors[domain]:.3f})" if domain in one.floors else domain
            for domain in one.domains
        )
        entropy = "; in brackets their entropy" if set(one.floors) & set(one.domains) else ""
        out.append(
            f"- *{name}*: domains {domains}{entropy}. {len(trained)} runs, seeds "
            f"{', '.join(map(str, seeds))}; {minutes:.0f} minutes of runs. {_budgets(trained)}"
        )
        missing += [f"{name} {what}" for what in one.lacking()]
    return [*out, *page.missing(missing, parts, results)]


def _budgets(trained: Sequence[Mapping[str, Any]]) -> str:
    """Returns the updates of the arms, arms with the same number together."""
    arms: dict[int, dict[str, None]] = {}
    for row in trained:
        arms.setdefault(row["step"], {})[f"`{row['arm']}`"] = None
    budgets = [f"{steps:,} ({', '.join(names)})" for steps, names in sorted(arms.items())]
    return f"Updates: {'; '.join(budgets)}." if budgets else ""


def _table(title: str, runs: DomainRuns, columns: Mapping[str, tuple[str, float]]) -> list[str]:
    """Returns the table of the losses of all arms by domain."""
    scores = [MEAN, *map(on, runs.domains)]
    lines = []
    for arm in runs.arms:
        rows = list(runs.find(arm).values())
        if not any(map(held_out, rows)):  # made, and not measured
            continue
        cells = []
        for key, (_, unit) in columns.items():
            values = [row[key] / unit for row in rows if row.get(key)]
            cells.append(f"{np.mean(values):.4g}" if values else "")
        lines.append((runs.title(arm), str(len(rows)), *cells, *runs.cells(arm, scores)))
    headings = (heading for heading, _ in columns.values())
    return page.table(("arm", "seeds", *headings, MEAN, *runs.domains), lines, title)
