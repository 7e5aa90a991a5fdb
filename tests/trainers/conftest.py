"""What several tests of training share."""

import functools
import pathlib
import subprocess
import sys
import textwrap

import pytest

from tests.processes import free_port, with_devices

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def processes(tmp_path):
    """Runs a script in processes of two devices each; its arguments are a folder, the process's index and a free port.

    The script must end with printing "fine" and its index. Returns what each process wrote to standard error.
    """

    def run(script: str, *, count: int) -> list[str]:
        port = free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(i), str(port)],
                env=with_devices(2, PYTHONPATH=str(ROOT)),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
        ]
        try:
            results = [process.communicate(timeout=250) for process in processes]
        finally:
            for process in processes:
                process.kill()
        for i, (out, err) in enumerate(results):
            assert f"fine {i}" in out, err[-3000:]
        return [err for _, err in results]

    return run


@pytest.fixture
def two_processes(processes):
    """Runs a script in two processes; see `processes`."""
    return functools.partial(processes, count=2)
