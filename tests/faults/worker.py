"""A process that runs a share of the cases: python -m tests.faults.worker OUT, with its task on standard input.

It imports the project once, and forks a process for each case.
"""

import itertools
import json
import os
import pathlib
import signal
import sys
from typing import Any

from espalier.launch import environment
from tests.faults import runner, shim
from tests.faults.table import Bench, Row, selected


def rows() -> list[Row]:
    """Returns all rows by their numbers."""
    from tests.faults import (
        configs,
        damage,
        data_rows,
        invariances,
        kills,
        numbers,
        storage,
        stores,
    )
    from tests.faults.hostile import (
        adapters,
        code,
        contents,
        endpoints,
        lies,
        merges,
        outputs,
        paths,
        pickles,
        requests,
        settings,
        templates,
        weights,
    )

    modules = (configs, damage, data_rows, invariances, kills, numbers, storage, stores)
    hostile = (code, lies, paths, pickles, templates, weights)
    hostile += (adapters, contents, endpoints, merges, outputs, requests, settings)
    return sorted(
        (row for module in (*modules, *hostile) for row in module.ROWS), key=lambda row: row.number
    )


def serve(task: dict[str, Any]) -> None:
    """Runs cases and appends a line of JSON for each to OUT/results.jsonl.

    Args:
      task: 'out', 'seed', 'sample', and 'cases': [row, name] of each case to run.
    """
    os.environ.pop("LD_PRELOAD", None)  # for this process alone
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the process of a case is ended too
    out = pathlib.Path(task["out"])
    _import_the_project()
    wanted = [tuple(key) for key in task["cases"]]
    cases = {
        (row.number, case.name): case
        for row in rows()
        for case in selected(row, task["seed"], sample=task["sample"])
    }
    folder = out / f"work_{task['number']}"
    folder.mkdir(exist_ok=True)
    bench = Bench(out=out, folder=folder, seed=task["seed"], shim=shim.loaded())
    for number, keys in itertools.groupby(wanted, key=lambda key: key[0]):
        for case, result in runner.run_cases([cases[key] for key in keys], bench):
            line = json.dumps({"row": number, "case": case.name, **result}) + "\n"
            with open(out / "results.jsonl", "ab", buffering=0) as file:
                file.write(line.encode())


def _import_the_project() -> None:
    """Imports what cases use, so that forked processes have it."""
    import importlib

    names = (
        "gin",
        "seqio",
        "espalier.launch.train",
        "espalier.launch.convert",
        "espalier.launch.score",
    )
    for name in (*names, "espalier.launch.config.gin_config", "espalier.launch.run.load_run"):
        importlib.import_module(name)
    importlib.import_module("espalier.launch.weights.import_weights")


if __name__ == "__main__":
    environment.prepare()
    serve(json.loads(sys.stdin.read()))
