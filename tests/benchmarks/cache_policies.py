"""SnapKV against the full cache after a long prompt: time, memory, and the cost of compression.

The model is that of the decode benchmark with half of the layers, so that it reads a prompt of 16,384 tokens
in seconds on two cores. Like the model of the paper's figures, it has as many key/value heads as query heads. It
generates 64 tokens, not 512: apart from the few slots that further tokens add, the time per token does not depend
on their number. Compression is timed alone, on caches with the whole prompt; kvpress's is timed within its hook.
The difference of two prefills would be smaller than their noise. The longest prompts are computed for the number
of layers of the paper's model, because one layer's cache is uncompressed while the prompt is read. kvpress runs
in .venv-kvpress, made by `make peers-kvpress`.
"""

import functools
import tempfile
from typing import Any

from tests.benchmarks import case, compare

SIZES = {**case.DECODE, "num_layers": 4, "max_length": 16_896}
BATCH, LENGTH, NEW = 2, 16_384, 64
PEER_NEW = 384  # its prefill time is subtracted; with 64 tokens, the noise of the prefill would dominate the result
CAPACITY, WINDOW, KERNEL = 2_048, 64, 5
SNAPKV = {"capacity": CAPACITY, "window": WINDOW, "kernel": KERNEL, "pooling": "average"}
LAYERS = 32
BYTES = 2**30


def run(*, rounds: int = 5) -> dict[str, Any]:
    """Alternates snapkv, the full cache and the peer's cache, then times compression alone.

    Raises:
      PeerError: kvpress is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = ("torch/llama_torch.py", "serve", folder)
        command = compare.peer(*script, target="peers-kvpress")
        case.write_decoding(folder, SIZES)
        with (
            compare.side(compare.ours("jax.decode_jax", folder)) as ours,
            compare.side(command) as peer,
        ):
            return {
                "case": {**SIZES, "batch": BATCH, "prompt": LENGTH, "new": NEW, "snapkv": SNAPKV},
                "peer_versions": peer.ask("versions"),
                **_decoding(ours, peer, rounds),
                "compression": _compression(ours, peer, rounds),
                "longest_prompt": _longest_prompts(ours),
            }


def _decoding(ours: compare.Side, peer: compare.Side, rounds: int) -> dict[str, Any]:
    sizes = {"batch": BATCH, "length": LENGTH}
    full = functools.partial(ours.ask, "generate", new=NEW, **sizes)
    snapkv = functools.partial(full, policy="snapkv", settings=SNAPKV)
    for ask in (full, snapkv):
        ask()  # compiles

    def peer_full() -> dict[str, float]:
        short, long = (peer.ask("generate", new=new, **sizes)["seconds"] for new in (1, PEER_NEW))
        return {"decode_seconds": (long - short) / (PEER_NEW - 1) * (NEW - 1)}

    calls = {"full": full, "snapkv": snapkv, "peer_full": peer_full}
    answers = compare.alternate(calls, rounds)
    token_ms = compare.each(answers, lambda answer: answer["decode_seconds"] / (NEW - 1) * 1e3)
    return {
        "ms_per_token": token_ms,
        "snapkv_speed_over_full": compare.ratio(token_ms["full"], token_ms["snapkv"]),
        "full_speed_over_peer": compare.ratio(token_ms["peer_full"], token_ms["full"]),
        "cache_bytes": {name: answers[name][-1]["cache_bytes"] for name in ("full", "snapkv")},
    }


def _compression(ours: compare.Side, peer: compare.Side, rounds: int) -> dict[str, Any]:
    sizes = {"batch": BATCH, "length": LENGTH}
    snapkv = {"new": NEW, "policy": "snapkv", "settings": SNAPKV, **sizes}
    kvpress = {"ratio": 1 - CAPACITY / LENGTH, "window": WINDOW, "kernel": KERNEL, **sizes}
    calls = {
        "ours": functools.partial(ours.ask, "compress", **snapkv),
        "peer": functools.partial(peer.ask, "compress", **kvpress),
    }
    answers = compare.alternate(calls, max(2, rounds // 2))
    seconds = compare.each(answers, "seconds")
    return {
        "time_over_kvpress": compare.ratio(seconds["ours"], seconds["peer"]),
        "seconds": seconds["ours"],
        "seconds_full_cache_copy": [answer["copy_seconds"] for answer in answers["ours"]],
        "kvpress_seconds": seconds["peer"],
    }


def _longest_prompts(ours: compare.Side) -> dict[str, Any]:
    """Returns for each policy the longest prompt of one row whose caches stay within BYTES in prefill and decoding.

    The bytes are calculated from the shapes of the states of LAYERS layers. For comparison, the result has the
    calculated and the measured bytes of a run.
    """
    report: dict[str, Any] = {"limit_bytes": BYTES, "layers": LAYERS}
    depth = LAYERS // SIZES["num_layers"]
    for name, settings in (("full", {}), ("snapkv", SNAPKV)):
        ask = functools.partial(ours.ask, "peak_bytes", new=NEW, policy=name, settings=settings)
        low, high = CAPACITY, 2**22
        while low + 1 < high:
            middle = (low + high) // 2
            fits = ask(length=middle, depth=depth)["bytes"] <= BYTES
            low, high = (middle, high) if fits else (low, middle)
        run = ours.ask("generate", batch=1, length=LENGTH, new=NEW, policy=name, settings=settings)
        report[name] = {
            "tokens": low,
            "bytes": ask(length=low, depth=depth)["bytes"],
            # The same calculation at the length of this benchmark, to compare with the buffers of a run.
            "calculated_decode_bytes": ask(length=LENGTH)["decode_bytes"],
            "measured_decode_bytes": run["cache_bytes"],
        }
    report["snapkv_over_full"] = report["snapkv"]["tokens"] / report["full"]["tokens"]
    return report
