"""Searches the largest batch, or the best layout, of a run on absent TPUs, and says what each candidate would cost.

Each candidate is compiled in a process of its own. Its report is stored under a digest of the configuration, the candidate,
the compiler's versions and the source code, so that a stopped search continues where it was.
The command prints what it does, the table of candidates, and the flags of the best one.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from espalier.common import stages
from espalier.launch import cli, environment
from espalier.launch.config import setting_flags
from espalier.launch.precompile import apart, candidates, precompile, tpu_topology
from espalier.launch.precompile.candidates import Candidate
from espalier.launch.precompile.settings import Search
from espalier.trainers.recipe import Recipe

Kind = Literal["batch", "layout"]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a candidate costs, or why it was not compiled.

    Attributes:
      report: see docs/scale/precompile_report.md; None without one.
      reason: why there is none.
    """

    candidate: Candidate
    report: dict[str, Any] | None
    reason: str = ""

    @property
    def peak(self) -> int | None:
        return self.report["hbm_bytes"]["peak"] if self.report else None

    def fits(self, limit: float) -> bool:
        return bool(self.report and self.report["fits"]) and (self.peak or 0) <= limit

    @property
    def step(self) -> float:
        """The least seconds of a step, if collectives use one ring of links."""
        times = self.report and self.report["roofline_seconds"]
        return times["step_one_ring"] if times else float("inf")


class OutOfTime(Exception):  # noqa: N818 - it ends a search that goes on later
    """The search's time is over before a candidate that it needs."""


# Returns the result of a candidate; raises OutOfTime.
Compile = Callable[[Candidate], Result]


def largest_batch(
    candidate_of: Callable[[int], Candidate], compile: Compile, *, unit: int, limit: float
) -> Iterator[Result]:
    """Yields results until the largest multiple of `unit` rows that fits is known.

    Memory grows about linearly with the batch: after two sizes, the next one is where the line through them meets the limit.
    Then the interval between the largest that fits and the smallest that does not is halved.

    Args:
      candidate_of: returns the candidate of a number of rows.
      limit: bytes of a chip.
    """
    peaks: dict[int, int] = {}
    fits, fails, count = 0, None, 1
    while True:
        result = compile(candidate_of(count * unit))
        yield result
        if result.report is not None:
            peaks[count] = result.peak or 0
        if result.fits(limit):
            fits = count
        else:
            fails = count
        if fails == fits + 1:
            return
        count = _next_count(peaks, fits, fails, limit)


def _next_count(peaks: dict[int, int], fits: int, fails: int | None, limit: float) -> int:
    """Returns the next multiple to try: above `fits`, and below `fails` if there is one."""
    guess = 2 * fits if fails is None else (fits + fails) // 2
    below = sorted(count for count in peaks if count <= fits)[-2:]
    if len(below) == 2 and fails is None:
        (a, b), grown = below, peaks[below[1]] - peaks[below[0]]
        if grown > 0:
            guess = b + int((limit - peaks[b]) * (b - a) / grown)
    guess = max(guess, fits + 1)
    return guess if fails is None else min(guess, fails - 1)


def all_layouts(
    candidates: Sequence[Candidate], compile: Compile, *, limit: float
) -> Iterator[Result]:
    """Yields a result for every candidate, which must be in the order of growing memory for activations.

    A candidate whose state alone is too large is not compiled; nor is one that does not fit with more rematerialisation.
    """
    too_large: set[Any] = set()
    for candidate in candidates:
        place = (candidate.mesh, candidate.rules)
        if candidate.argument_bytes > limit:
            size = candidate.argument_bytes / 1e9
            yield Result(candidate, None, f"state and batch alone are {size:.2f} GB")
        elif place in too_large:
            yield Result(candidate, None, "does not fit with more rematerialisation")
        else:
            result = compile(candidate)
            if not result.fits(limit):
                too_large.add(place)
            yield result


def best(results: Sequence[Result], kind: Kind, limit: float) -> Result | None:
    """Returns the largest batch, or the layout with the shortest step, among those that fit; None if none does."""
    fitting = [result for result in results if result.fits(limit)]
    if kind == "batch":
        return max(fitting, key=lambda result: result.candidate.batch_size, default=None)
    return min(fitting, key=lambda result: (result.step, result.peak), default=None)


def table(results: Sequence[Result], chosen: Result | None, limit: float) -> str:
    """Returns the table of candidates: memory, whether it fits, bytes sent, least time, share of the peak, seconds a row."""
    head = ("", "rows", "mesh", "rules", "remat", "peak GB", "fits", "sent GB", "step >=", "MFU <=")
    rows: list[tuple[str, ...]] = [head]
    for result in results:
        one = result.candidate
        mesh = " x ".join(f"{axis} {size}" for axis, size in one.mesh) or "one chip"
        mark = "*" if result is chosen else ""
        start = (mark, str(one.batch_size), mesh, one.rules, one.remat or "")
        rows.append((*start, *_costs(result, limit)))
    widths = [max(len(row[i]) for row in rows if len(row) == len(head)) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    )


def _costs(result: Result, limit: float) -> tuple[str, ...]:
    report = result.report
    if report is None:
        return (result.reason,)
    fits = "yes" if result.fits(limit) else "NO"
    costs = (f"{(result.peak or 0) / 1e9:.2f}", fits)
    if not report["roofline_seconds"]:
        return (*costs, "", "", "")
    sent = sum(total["bytes"] for total in report["collectives"].values())
    mfu = report["roofline_seconds"]["mfu_bound_one_ring"]
    return (*costs, f"{sent / 1e9:.1f}", f"{result.step:.3g} s", f"{mfu:.0%}")


class Store:
    """Reports of candidates on disk.

    Args:
      configuration: everything but the candidate that a report depends on.
      folder: the folder; None for the cache.
    """

    def __init__(self, configuration: Any, folder: pathlib.Path | None = None):
        self._text = json.dumps(configuration, sort_keys=True)
        self.folder = folder or pathlib.Path(environment.cache_dir(), "precompile")

    def path(self, candidate: Candidate) -> pathlib.Path:
        """Returns the file of a candidate's report."""
        text = json.dumps([self._text, candidate.words])
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"

    def read(self, candidate: Candidate) -> Result | None:
        """Returns a stored result; None if there is none that can be read."""
        try:
            stored = json.loads(self.path(candidate).read_text(encoding="utf-8"))
            return Result(candidate, stored["report"], stored["reason"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def write(self, result: Result) -> None:
        """Stores a result."""
        facts = {"report": result.report, "reason": result.reason}
        document = {**facts, "candidate": str(result.candidate)}
        precompile.write_json(self.path(result.candidate), document)


def source_digest() -> str:
    """Returns a digest of the code that decides on compiled programs."""
    digest = hashlib.sha256()
    for package in ("model", "trainers", "launch/precompile"):
        for path in sorted(pathlib.Path(environment.ROOT, package).rglob("*.py")):
            digest.update(path.as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Timed:
    """Compiles candidates within the time of a search, or returns their stored results.

    Args:
      store: stored results.
      run: compiles a candidate within these seconds; returns its result, and whether its limits ended it.
      seconds: time of the search.
    """

    def __init__(
        self,
        store: Store,
        run: Callable[[Candidate, float], tuple[Result, bool]],
        *,
        seconds: float,
    ):
        self._store, self._run = store, run
        self._ends = time.monotonic() + seconds

    def __call__(self, candidate: Candidate) -> Result:
        stored = self._store.read(candidate)
        if stored is not None:
            print(f"{candidate}: stored", flush=True)
            return stored
        left = self._ends - time.monotonic()
        if left <= 0:
            raise OutOfTime
        print(f"{candidate}: compiling, {left / 60:.0f} min left", flush=True)
        result, stopped = self._run(candidate, left)
        if stopped and self._ends - time.monotonic() <= 0:
            raise OutOfTime  # not the candidate's own limit
        if not stopped:
            self._store.write(result)
        return result


def run(recipe: Recipe, flags: argparse.Namespace, words: Sequence[str], text: str) -> int:
    """Searches, and returns the exit status: 0 with a result, 1 if nothing fits, 75 if the time is over.

    Args:
      recipe: the run.
      flags: flags of the command.
      words: its words, without the flags of the search.
      text: the run's configuration.
    """
    topology = tpu_topology.parse(flags.topology)
    settings = Search(**setting_flags.given(flags, Search))
    limit = topology.chip.hbm_bytes
    if settings.memory_limit is not None:
        if not 0 < settings.memory_limit * 1e9 <= limit:
            raise tpu_topology.TopologyError(
                f"--memory_limit={settings.memory_limit} must be above 0 and at most {limit / 1e9:.2f} GB, what a program has "
                f"on a {topology.generation} chip."
            )
        limit = settings.memory_limit * 1e9

    def compile_one(candidate: Candidate, seconds: float) -> tuple[Result, bool]:
        most = min(seconds, 60 * settings.candidate_minutes)
        limits = apart.Limits(most, settings.candidate_gb * 1e9)
        with stages.stage(f"compiling {candidate}"):
            outcome = apart.compile_apart([*words, *candidate.words], limits)
        report = outcome.report
        line = f"peak {report['hbm_bytes']['peak'] / 1e9:.2f} GB" if report else outcome.problem
        print(f"  {line}, {outcome.seconds:.0f} s", flush=True)
        return Result(candidate, report, outcome.problem), outcome.stopped

    facts: dict[str, Any] = {"text": text, "words": list(words), "topology": str(topology)}
    facts |= {"versions": tpu_topology.versions(), "source": source_digest()}
    store = Store(facts, settings.search_dir)
    timed = Timed(store, compile_one, seconds=60 * settings.search_minutes)
    results: list[Result] = []
    finished = True
    try:
        for result in _results(recipe, flags, topology, timed, limit):
            results.append(result)
    except OutOfTime:
        finished = False
    chosen = best(results, flags.search, limit)
    print("\n" + table(results, chosen, limit))
    if chosen is not None:
        print(f"\nbest{'' if finished else ' so far'}: {chosen.candidate}")
        print(f"  {shlex.join(chosen.candidate.words)}")
    elif finished:
        print(f"\nnothing fits into {limit / 1e9:.2f} GB")
    if not finished:
        print("\nthe time of the search is over: the same command continues it")
    if flags.json:
        _write(flags, results, chosen, finished, limit)
    return cli.INTERRUPTED if not finished else int(chosen is None)


def _results(recipe: Recipe, flags: argparse.Namespace, topology, timed, limit: float):
    if flags.search == "layout":
        layouts = candidates.layouts(recipe, topology)
        print(f"{len(layouts)} layouts fit this run", flush=True)
        return all_layouts(layouts, timed, limit=limit)
    unit = candidates.batch_unit(recipe, topology)
    return largest_batch(
        lambda rows: candidates.of_recipe(recipe, topology, rows), timed, unit=unit, limit=limit
    )


def _write(
    flags: argparse.Namespace,
    results: Sequence[Result],
    chosen: Result | None,
    finished: bool,
    limit: float,
) -> None:
    document = {
        "search": flags.search,
        "topology": flags.topology,
        "memory_limit_bytes": limit,
        "finished": finished,
        "best": None if chosen is None else chosen.candidate.words,
        "candidates": [
            {
                **dataclasses.asdict(result.candidate),
                "mesh": dict(result.candidate.mesh),
                "flags": result.candidate.words,
                "fits": result.fits(limit),
                "reason": result.reason,
                "report": result.report,
            }
            for result in results
        ],
    }
    precompile.write_json(flags.json, document)
