"""The model and prompts that both sides of the generation benchmarks share, and how they are asked.

Each side is a process that stays: it is sent one request a line and answers one line, both JSON, so that
calls alternate in warm processes. Requests name an "op" and its arguments; see decode_jax.py and
decode_torch.py for what they do.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from launch.benchmarks import peers
from launch.benchmarks.case import peer_name

SMALL: dict[str, Any] = {
    "num_layers": 8,
    "embed_dim": 384,
    "num_heads": 6,
    "num_kv_heads": 6,
    "mlp_dim": 1024,
    "vocab_size": 8192,
    "norm_eps": 1e-6,
    "rope_base": 10_000.0,
    "max_length": 256,
}


def write(folder: str, sizes: Mapping[str, Any]) -> None:
    """Writes case.json and weights.npz, under the peer's names and in its layouts."""
    rng = np.random.default_rng(0)
    D, F, V = sizes["embed_dim"], sizes["mlp_dim"], sizes["vocab_size"]
    kv_width = D // sizes["num_heads"] * sizes["num_kv_heads"]
    shapes = {"key": (kv_width, D), "value": (kv_width, D)}
    shapes |= {"gate": (F, D), "up": (F, D), "down": (D, F)}
    weights = {
        "model.embed_tokens.weight": rng.normal(0, 0.05, (V, D)),
        "model.norm.weight": np.ones(D),
    }
    for i in range(sizes["num_layers"]):
        for name in ("query", "key", "value", "out", "gate", "up", "down"):
            # Far from uniform, so that no choice is a tie.
            weights[peer_name(i, name)] = rng.normal(0, 0.05, shapes.get(name, (D, D)))
        for norm in ("norm", "mlp_norm"):
            weights[peer_name(i, norm)] = np.ones(D)
    filled = {name: array.astype(np.float32) for name, array in weights.items()}
    np.savez(os.path.join(folder, "weights.npz"), **filled)
    with open(os.path.join(folder, "case.json"), "w", encoding="utf-8") as file:
        json.dump(dict(sizes), file)


def prompts(sizes: Mapping[str, Any], batch: int, length: int) -> list[list[int]]:
    """Random tokens, the same on both sides."""
    return np.random.default_rng(1).integers(3, sizes["vocab_size"], (batch, length)).tolist()


class Side:
    """A process that answers requests."""

    def __init__(self, process: subprocess.Popen, name: str):
        self._process = process
        self._name = name

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
          PeerError: the process ended.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            stdin.flush()
        for line in stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise peers.PeerError(f"The process of {self._name} ended; its errors are above.")


@contextlib.contextmanager
def side(name: str, folder: str, *, python: str | None = None) -> Iterator[Side]:
    """Starts a side, and ends it.

    Args:
      name: 'ours' or 'peer'.
      folder: what `write` wrote.
      python: the peer's interpreter; None for that of `make peers`.

    Raises:
      PeerError: the peer is not installed.
    """
    if name == "ours":
        command = [sys.executable, "-m", "launch.benchmarks.jax.decode_jax", folder]
    else:
        command = peers.peer_command("decode_torch.py", folder)
        command[0] = python or command[0]
    # As its users start it: malloc's settings are this project's own business.
    variables = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    process = subprocess.Popen(
        command,
        cwd=peers.ROOT,
        env=variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Side(process, name)
    finally:
        process.kill()
        process.wait()


def serve(operations: Mapping[str, Any]) -> None:
    """Answers requests with the functions of their names until there are no more."""
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(operations[request.pop("op")](**request)), flush=True)
