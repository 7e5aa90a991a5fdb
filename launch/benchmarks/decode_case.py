"""Model and prompts of both sides of the generation benchmarks, and the protocol to call them.

Each side is a long-lived process, so that calls alternate in warm processes. A request is one line of JSON, and so
is its answer. A request has an "op" and its arguments; decode_jax.py and decode_torch.py define the operations.
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
            # Large weights, so that logits are far from uniform and no choice is a tie.
            weights[peer_name(i, name)] = rng.normal(0, 0.05, shapes.get(name, (D, D)))
        for norm in ("norm", "mlp_norm"):
            weights[peer_name(i, norm)] = np.ones(D)
    filled = {name: array.astype(np.float32) for name, array in weights.items()}
    np.savez(os.path.join(folder, "weights.npz"), **filled)
    with open(os.path.join(folder, "case.json"), "w", encoding="utf-8") as file:
        json.dump(dict(sizes), file)


def prompts(sizes: Mapping[str, Any], batch: int, length: int) -> list[list[int]]:
    """Returns random prompts, the same on both sides."""
    return np.random.default_rng(1).integers(3, sizes["vocab_size"], (batch, length)).tolist()


class Side:
    """One side: a process that answers requests."""

    def __init__(self, process: subprocess.Popen, name: str):
        self._process = process
        self._name = name

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Sends a request and returns its answer.

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
    """Starts a side, yields it, and ends it on exit.

    Args:
      name: 'ours' or 'peer'.
      folder: folder that `write` wrote.
      python: the peer's interpreter; None for the one from `make peers`.

    Raises:
      PeerError: the peer is not installed.
    """
    if name == "ours":
        command = [sys.executable, "-m", "launch.benchmarks.jax.decode_jax", folder]
    else:
        command = peers.peer_command("decode_torch.py", folder)
        command[0] = python or command[0]
    # Both sides start as their users start them: only this project's launchers set malloc's tunables.
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
    """Answers requests until the input ends; `operations` has a function for each "op"."""
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(operations[request.pop("op")](**request)), flush=True)
