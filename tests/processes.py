"""What tests share that start processes."""

import os
import re
import socket


def free_port() -> int:
    """Returns a port of this machine that nothing listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def with_devices(devices: int, **more: str) -> dict[str, str]:
    """Returns the environment of a process with this many devices; programs are optimised as little as here."""
    flags = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags, **more}
