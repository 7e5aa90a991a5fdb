"""Runs that are evaluated on several domains: losses of groups of domains, at the end and over training."""

import dataclasses
import importlib
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

import numpy as np

from launch.papers.shared import results as paired
from launch.papers.shared import sweeps
from launch.papers.shared.claim import Evidence

MEAN = "mean loss"
PARTS = ("synthetic", "real")
HELD_OUT = "held_out"
_LOSS = "/loss"


@dataclasses.dataclass(frozen=True)
class DomainRuns(paired.Results):
    """Rows of a part, as `part` returns them.

    Attributes:
      domains: names of all tasks, the general one first.
      groups: score -> the domains over which losses, in nats per token, are averaged for it.
      floors: entropy of a domain in nats per token, where it is known.
      planned: what should be there: arm -> seed -> names of what is measured of the run.
    """

    domains: Sequence[str] = ()
    groups: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    floors: Mapping[str, float] = dataclasses.field(default_factory=dict)
    planned: Mapping[str, Mapping[int, Sequence[str]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, found: Mapping[str, Any]) -> Self:
        """Of what `part` returns."""
        domains = tuple(found["domains"])
        known: dict[str, Sequence[str]] = {MEAN: domains}
        for domain in domains:
            known[on(domain)] = (domain,)
            known[off(domain)] = tuple(other for other in domains if other != domain)
        groups = {**known, **cls.more_groups(domains)}
        return cls(found["rows"], domains, groups, found["floors"], found["planned"])

    @classmethod
    def parts(cls, found: Mapping[str, Any]) -> dict[str, Self]:
        """Those of PARTS that an experiment has found rows of."""
        return {name: cls.of(found[name]) for name in PARTS if found.get(name, {}).get("rows")}

    @classmethod
    def more_groups(cls, domains: Sequence[str]) -> Mapping[str, Sequence[str]]:
        """A paper's own groups, beside MEAN, all domains, and `on` and `off` of each domain."""
        del domains
        return {}

    def score(self, row: Mapping[str, Any], name: str) -> float | None:
        losses = held_out(row)
        wanted = self.groups[name]
        if not wanted or any(task not in losses for task in wanted):
            return None
        return float(np.mean([losses[task] for task in wanted]))

    def digits(self, name: str) -> int:
        return 3

    def floor(self, name: str) -> float | None:
        """The mean entropy of a group of domains, None where one of them is not known."""
        found = [self.floors.get(task) for task in self.groups[name]]
        known = [floor for floor in found if floor is not None]
        return float(np.mean(known)) if found and len(known) == len(found) else None

    def at(self, step: int) -> Self:
        """The same runs as they were evaluated at a step; those that were not are left out.

        Before its first update a run is what it starts from, which an arm `<arm>_start` may say.
        """
        rows = []
        for row in self.rows:
            losses = dict(row["curve"]).get(step)
            if losses is None and step == 0:
                start = self.find(f"{row['arm']}_start").get(row["seed"])
                losses = held_out(start) if start else None
            if losses:
                named = {task: {"loss": loss} for task, loss in losses.items()}
                rows.append({**row, "held_out": named, "step": step})
        return dataclasses.replace(self, rows=rows)

    def steps(self, *arms: str) -> list[int]:
        """At which all runs of these arms were evaluated, the start included where it is known."""
        rows = [row for arm in arms for row in self.find(arm).values()]
        if not rows:
            return []
        found = set.intersection(*({step for step, _ in row["curve"]} for row in rows))
        if 0 not in found and all(self.at(0).find(row["arm"]).get(row["seed"]) for row in rows):
            found.add(0)
        return sorted(found)

    def lacking(self) -> list[str]:
        """What was planned and is not there, as a reader is told: arms or some seeds of them, and evaluations."""
        there = {row["seed"] for row in self.rows}
        seeds = sorted({seed for by_seed in self.planned.values() for seed in by_seed})
        gone = [seed for seed in seeds if seed not in there]
        out = [f"all of seed {seed}" for seed in gone]
        for arm, by_seed in self.planned.items():
            rows = self.find(arm)
            left = [seed for seed in by_seed if seed not in rows and seed not in gone]
            out += _named(f"`{arm}`", left, set(by_seed) - set(gone))
            for name in dict.fromkeys(name for names in by_seed.values() for name in names):
                left = [
                    s for s in rows if name in by_seed.get(s, ()) and not self._has(rows[s], name)
                ]
                out += _named(f"`{name}` of `{arm}`", left, by_seed)
        return out

    def _has(self, row: Mapping[str, Any], name: str) -> bool:
        if name == HELD_OUT:
            return set(self.domains) <= set(held_out(row))
        return bool(row["evaluations"].get(name))

    def evaluation(self, arm: str, name: str) -> list[Any]:
        """What an evaluation of an arm found, of the seeds that have it."""
        rows = self.find(arm).values()
        return [row["evaluations"][name] for row in rows if row.get("evaluations", {}).get(name)]


def on(domain: str) -> str:
    """The score of a domain alone."""
    return f"loss on {domain}"


def off(domain: str) -> str:
    """The score of all domains but one."""
    return f"mean loss off {domain}"


def _named(what: str, seeds: Sequence[int], planned: Collection[int]) -> list[str]:
    """Seeds of something that are not there, all of them by its name alone; nothing if there are none."""
    if not seeds:
        return []
    some = f" (seed {', '.join(map(str, seeds))})" if len(seeds) < len(planned) else ""
    return [what + some]


def lower(
    results: DomainRuns, where: str, one: str, other: str, score: str = MEAN, **options: bool
) -> list[Evidence]:
    """Whether an arm has the lower loss: `paired.better`."""
    return paired.better(results, where, score, one, other, lower=True, **options)


def held_out(row: Mapping[str, Any]) -> dict[str, float]:
    """Loss by task of a row's last evaluation, or of its evaluation 'held_out' (launch.evaluate loss) if it was made."""
    found = row.get("held_out") or {}
    if not found:
        found = (row.get("evaluations") or {}).get(HELD_OUT, {}).get("tasks", {})
    return {task: float(values["loss"]) for task, values in found.items() if "loss" in values}


def run(
    paper: str,
    *,
    model_dir: str,
    seeds: int,
    workers: int = 1,
    minutes: float | None = None,
    parts: Sequence[str] = PARTS,
) -> dict[str, Any]:
    """What `part` returns, by part.

    Args:
      paper: name of its sweep.
      model_dir: parent of the parts' folders.
      seeds: of each arm.
      workers: runs at once.
      minutes: after which a sweep stops; the same command goes on.
      parts: of PARTS.

    Raises:
      ValueError: a sweep could not be run.
      sweeps.StoppedError: it was stopped, by a signal or the time.
    """
    folder = pathlib.Path(model_dir)
    return {
        name: part(paper, name, folder / name, seeds, workers=workers, minutes=minutes)
        for name in parts
    }


def part(
    paper: str,
    name: str,
    folder: pathlib.Path,
    seeds: int,
    *,
    workers: int = 1,
    minutes: float | None = None,
) -> dict[str, Any]:
    """{"rows", "domains", "floors", "planned"} of a part of a paper's sweep, which goes on where it stopped.

    The sweep's file is launch/papers/<paper>/sweep.py; it is given 'PART,SEEDS' and has DOMAINS, by part, the general one
    first, some of them perhaps in a tuple of their own.

    Raises:
      ValueError, sweeps.StoppedError: see `sweeps.rows`.
    """
    entries = sweep(paper).DOMAINS[name]
    domains = [x for entry in entries for x in ((entry,) if isinstance(entry, str) else entry)]
    given = f"{name},{seeds}"
    rows = sweeps.rows(folder, f"{paper}/sweep", given, workers=workers, minutes=minutes)
    planned: dict[str, dict[int, tuple[str, ...]]] = {}
    for run in sweeps.planned(f"{paper}/sweep", given):
        # One that is trained is evaluated on its held-out rows as it ends.
        measured = (*run.evaluations, *(() if run.made else (HELD_OUT,)))
        planned.setdefault(run.arm, {})[run.seed] = measured
    return {
        "rows": [with_course(row, folder / row["directory"]) for row in rows],
        "domains": tuple(domains),
        "floors": entropy_floors(domains),
        "planned": planned,
    }


def sweep(paper: str) -> Any:
    """The module of a paper's sweep."""
    return importlib.import_module(f"launch.papers.{paper}.sweep")


def with_course(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """A row with what its run's directory says of its course.

    Adds 'curve', [(step, {task: loss})], as it was evaluated, and 'parameters'; empty and None where it was made
    and not trained.
    """
    from trainers.telemetry.metric_writers import rows_in_force

    path = directory / "metrics.jsonl"
    curve: dict[int, dict[str, float]] = {}
    for line in rows_in_force(str(path)) if path.exists() else ():
        losses = {
            key.removeprefix("eval/").removesuffix(_LOSS): value
            for key, value in line.items()
            if key.startswith("eval/") and key.endswith(_LOSS)
        }
        if losses:
            curve.setdefault(line["step"], {}).update(losses)
    about = directory / "run.json"
    parameters = json.loads(about.read_text())["parameters"] if about.exists() else None
    return {**row, "curve": sorted(curve.items()), "parameters": parameters}


def entropy_floors(domains: Sequence[str]) -> dict[str, float]:
    """Of those domains that are generated (data/nexus/lag_domains.py)."""
    from data.nexus import lag_domains

    known = [domain for domain in domains if domain in lag_domains.DOMAINS]
    return {name: lag_domains.entropy_floor(lag_domains.DOMAINS[name]) for name in known}
