"""SnapKV against the full cache after a long prompt: time, memory, and what compressing costs.

The model is that of the decode benchmark with a quarter of the layers, so that a prompt of 16,384 tokens
is read in seconds on two cores; like the model of the paper's figures it has as many key/value heads as
query heads. 64 tokens are generated, not 512: the time of a token does not depend on how many follow it
but for the few slots that they add. Compression is timed alone, of caches that hold the whole prompt, in
kvpress's within its hook: the difference of two prefills would be lost in their noise.
Longest prompts are of as many layers as the paper's model has, because one of them is whole while it is
read. kvpress runs in .venv-kvpress, which `make peers-kvpress` makes.
"""

import functools
import tempfile
from typing import Any

from launch.benchmarks import decode_case, pairs, peers

SIZES = {**decode_case.SMALL, "num_layers": 2, "max_length": 16_896}
BATCH, LENGTH, NEW = 2, 16_384, 64
PEER_NEW = 384  # its reading is subtracted: with 64 tokens the noise of that would be all there is
CAPACITY, WINDOW, KERNEL = 2_048, 64, 5
SNAPKV = {"capacity": CAPACITY, "window": WINDOW, "kernel": KERNEL, "pooling": "average"}
LAYERS = 32
BYTES = 2**30
KVPRESS_PYTHON = peers.ROOT / ".venv-kvpress" / "bin" / "python"


def run(*, rounds: int = 5) -> dict[str, Any]:
    """Alternates snapkv, the full cache and the peer's; then compresses alone.

    Raises:
      PeerError: kvpress is not installed.
    """
    if not KVPRESS_PYTHON.exists():
        raise peers.PeerError(f"{KVPRESS_PYTHON} is missing: run `make peers-kvpress` first.")
    python = str(KVPRESS_PYTHON)
    with tempfile.TemporaryDirectory() as folder:
        decode_case.write(folder, SIZES)
        with (
            decode_case.side("ours", folder) as ours,
            decode_case.side("peer", folder, python=python) as peer,
        ):
            return {
                "case": {**SIZES, "batch": BATCH, "prompt": LENGTH, "new": NEW, "snapkv": SNAPKV},
                "peer_versions": peer.ask("versions"),
                **_decoding(ours, peer, rounds),
                "compression": _compression(ours, peer, rounds),
                "longest_prompt": _longest_prompts(ours),
            }


def _decoding(ours: decode_case.Side, peer: decode_case.Side, rounds: int) -> dict[str, Any]:
    sizes = {"batch": BATCH, "length": LENGTH}
    full = functools.partial(ours.ask, "generate", new=NEW, **sizes)
    snapkv = functools.partial(full, policy="snapkv", settings=SNAPKV)
    for ask in (full, snapkv):
        ask()  # compiles
    token_ms: dict[str, list[float]] = {"full": [], "snapkv": [], "peer_full": []}
    found: dict[str, Any] = {}
    for _ in range(rounds):
        for name, ask in (("full", full), ("snapkv", snapkv)):
            found[name] = ask()
            token_ms[name].append(found[name]["decode_seconds"] / (NEW - 1) * 1e3)
        short, long = (peer.ask("generate", new=new, **sizes)["seconds"] for new in (1, PEER_NEW))
        token_ms["peer_full"].append((long - short) / (PEER_NEW - 1) * 1e3)
    return {
        "ms_per_token": token_ms,
        "snapkv_speed_over_full": pairs.ratio(token_ms["full"], token_ms["snapkv"]),
        "full_speed_over_peer": pairs.ratio(token_ms["peer_full"], token_ms["full"]),
        "cache_bytes": {name: answer["cache_bytes"] for name, answer in found.items()},
    }


def _compression(ours: decode_case.Side, peer: decode_case.Side, rounds: int) -> dict[str, Any]:
    sizes = {"batch": BATCH, "length": LENGTH}
    mine, copies, theirs = [], [], []
    for _ in range(max(2, rounds // 2)):
        answer = ours.ask("compress", new=NEW, policy="snapkv", settings=SNAPKV, **sizes)
        mine.append(answer["seconds"])
        copies.append(answer["copy_seconds"])
        ratio = 1 - CAPACITY / LENGTH
        answer = peer.ask("compress", ratio=ratio, window=WINDOW, kernel=KERNEL, **sizes)
        theirs.append(answer["seconds"])
    return {
        "time_over_kvpress": pairs.ratio(mine, theirs),
        "seconds": mine,
        "seconds_full_cache_copy": copies,
        "kvpress_seconds": theirs,
    }


def _longest_prompts(ours: decode_case.Side) -> dict[str, Any]:
    """The longest prompt of one row whose caches stay within BYTES while it is read and continued.

    From the shapes of the states of LAYERS layers; those of a run must have the calculated bytes.
    """
    found: dict[str, Any] = {"limit_bytes": BYTES, "layers": LAYERS}
    depth = LAYERS // SIZES["num_layers"]
    for name, settings in (("full", {}), ("snapkv", SNAPKV)):
        ask = functools.partial(ours.ask, "peak_bytes", new=NEW, policy=name, settings=settings)
        low, high = CAPACITY, 2**22
        while low + 1 < high:
            middle = (low + high) // 2
            fits = ask(length=middle, depth=depth)["bytes"] <= BYTES
            low, high = (middle, high) if fits else (low, middle)
        run = ours.ask("generate", batch=1, length=LENGTH, new=NEW, policy=name, settings=settings)
        found[name] = {
            "tokens": low,
            "bytes": ask(length=low, depth=depth)["bytes"],
            # The same calculation at the length of this benchmark, against buffers of a run.
            "calculated_decode_bytes": ask(length=LENGTH)["decode_bytes"],
            "measured_decode_bytes": run["cache_bytes"],
        }
    found["snapkv_over_full"] = found["snapkv"]["tokens"] / found["full"]["tokens"]
    return found
