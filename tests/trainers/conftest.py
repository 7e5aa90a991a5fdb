"""What several tests of training share."""

import functools
import os
import pathlib
import re
import socket
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def processes(tmp_path):
    """Runs a script in processes of two devices each; its arguments are a folder, the process's index and a free port.

    The script must end with printing "fine" and its index. Returns what each process wrote to standard error.
    """

    def run(script: str, *, count: int) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = {
            **os.environ,
            # Two devices; else as here, so that programs are optimised as little.
            "XLA_FLAGS": re.sub(r"device_count=\d+", "device_count=2", os.environ["XLA_FLAGS"]),
            "PYTHONPATH": str(ROOT),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), str(i), str(port)],
                env=environment,
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
