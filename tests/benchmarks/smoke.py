"""Tries every benchmark beside its peer with --tiny, each in a process of its own: `make bench-smoke`.

A line begins with each, and says whether it ran, or what it lacks. The exit status is 1 if one failed for another reason than a peer or a
device that is not there.
"""

import subprocess
import sys
import time

from tests.benchmarks import __main__ as bench

_LACKS = ("run `make ", "cannot run this benchmark", "JAX has no GPU or TPU")


def main() -> int:
    """Runs all benchmarks; returns the exit status."""
    failed = 0
    for name in bench.BENCHMARKS:
        print(f"{name:16}", end=" ", flush=True)
        began = time.monotonic()
        command = [sys.executable, "-m", "tests.benchmarks", name, "--tiny"]
        result = subprocess.run(command, capture_output=True, text=True)
        error = next((x for x in result.stderr.splitlines() if x.startswith("error: ")), "")
        said = "ran"
        if result.returncode:
            lacks = any(words in error for words in _LACKS)
            failed += not lacks
            said = f"{'not here' if lacks else 'FAILED'}: {error or result.stderr[-300:]}"
        print(f"{time.monotonic() - began:5.0f} s  {said}", flush=True)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
