"""Runs this project's side of a benchmark; compare.ours has the command.

  python -m tests.benchmarks.ours MODULE ARGUMENTS

Calls `side(*ARGUMENTS)` of the module in tests/benchmarks, and prints its report, if it returns one, as a line of JSON.
"""

import importlib
import json
import sys

from espalier.launch import environment

# The other modules are started as the project's commands are.
_LIBRARY = ("hf_import", "loss_memory", "merge")


def main(module: str, *arguments: str) -> None:
    if module not in _LIBRARY:
        environment.restart_with_huge_pages()
        environment.prepare()
    report = importlib.import_module(f"tests.benchmarks.{module}").side(*arguments)
    if report is not None:
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
