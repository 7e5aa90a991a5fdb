"""A search from the command line: prints what it does, the table of candidates, and the flags of the best one."""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from espalier.common import stages
from launch import cli
from launch.aot import apart, candidates, precompile, search, tpu_topology
from launch.aot.candidates import Candidate
from launch.aot.search import Result
from trainers.recipe import Recipe


def run(recipe: Recipe, flags: argparse.Namespace, words: Sequence[str], text: str) -> int:
    """Searches, and returns the exit status: 0 with a result, 1 if nothing fits, 75 if the time is over.

    Args:
      recipe: the run.
      flags: flags of the command.
      words: its words, without the flags of the search.
      text: the run's configuration.
    """
    topology = tpu_topology.parse(flags.topology)
    limit = topology.chip.hbm_bytes
    if flags.memory_limit is not None:
        if not 0 < flags.memory_limit * 1e9 <= limit:
            raise tpu_topology.TopologyError(
                f"--memory_limit={flags.memory_limit} must be above 0 and at most {limit / 1e9:.2f} GB, what a program has "
                f"on a {topology.generation} chip."
            )
        limit = flags.memory_limit * 1e9

    def compile_one(
        candidate: Candidate, seconds: float
    ) -> tuple[dict[str, Any] | None, str, bool]:
        most = min(seconds, 60 * flags.candidate_minutes)
        limits = apart.Limits(most, flags.candidate_gb * 1e9)
        with stages.stage(f"compiling {candidate}"):
            outcome = apart.compile_apart([*words, *candidate.words], limits)
        report = outcome.report
        line = f"peak {report['hbm_bytes']['peak'] / 1e9:.2f} GB" if report else outcome.problem
        print(f"  {line}, {outcome.seconds:.0f} s", flush=True)
        return report, outcome.problem, outcome.stopped

    facts: dict[str, Any] = {"text": text, "words": list(words), "topology": str(topology)}
    facts |= {"versions": tpu_topology.versions(), "source": search.source_digest()}
    timed = search.Timed(
        search.Store(facts, flags.search_dir),
        compile_one,
        precompile.write_json,
        seconds=60 * flags.search_minutes,
        report=lambda line: print(line, flush=True),
    )
    results: list[Result] = []
    finished = True
    try:
        for result in _results(recipe, flags, topology, timed, limit):
            results.append(result)
    except search.OutOfTime:
        finished = False
    chosen = search.best(results, flags.search, limit)
    print("\n" + search.table(results, chosen, limit))
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
        return search.all_layouts(layouts, timed, limit=limit)
    unit = candidates.batch_unit(recipe, topology)
    return search.largest_batch(
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
