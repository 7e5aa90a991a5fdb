"""Start-up time of every command: `--help`, and the imports of the model and the trainers."""

import statistics
import subprocess
import sys
import time
from typing import Any

_IMPORTS = (
    "import pathlib, importlib\n"
    "for package in ('model', 'trainers'):\n"
    "    for path in sorted(pathlib.Path(package).rglob('*.py')):\n"
    "        name = '.'.join(('espalier', *path.with_suffix('').parts))\n"
    "        importlib.import_module(name.removesuffix('.__init__'))\n"
)


def run(*, repeats: int = 7) -> dict[str, Any]:
    """Returns median seconds of fresh processes, from start to exit."""
    return {
        "help_seconds": _seconds(["-m", "espalier.launch.train", "--help"], repeats),
        "import_model_and_trainers_seconds": _seconds(["-c", _IMPORTS], repeats),
        "python_alone_seconds": _seconds(["-c", "pass"], repeats),
    }


def _seconds(arguments: list[str], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
