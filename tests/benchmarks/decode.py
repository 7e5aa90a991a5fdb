"""Greedy generation against transformers: speed of the whole call, and of the prefill alone.

Both sides have the same weights and prompts and alternate in warm processes. The peer's time is that of its faster
cache. The result reports whether the tokens are the same.
"""

import functools
import tempfile
from typing import Any

from tests.benchmarks import case, compare

LENGTH = 128


def run(*, rounds: int = 12) -> dict[str, Any]:
    """Alternates both sides `rounds` times with 128 prompt and 128 new tokens, in batches of 1 and 8."""
    sizes = case.DECODE
    with tempfile.TemporaryDirectory() as folder:
        case.write_decoding(folder, sizes)
        with (
            compare.side(compare.ours("jax.decode_jax", folder)) as ours,
            compare.side(compare.peer("torch/llama_torch.py", "serve", folder)) as peer,
        ):
            return {
                "case": {**sizes, "prompt": LENGTH, "new": LENGTH},
                "peer_versions": peer.ask("versions"),
                **{f"batch_{batch}": _compare(ours, peer, batch, rounds) for batch in (1, 8)},
            }


def _compare(ours: compare.Side, peer: compare.Side, batch: int, rounds: int) -> Any:
    sizes = {"batch": batch, "length": LENGTH}
    sides = {
        "ours": functools.partial(ours.ask, "generate", **sizes),
        "dynamic": functools.partial(peer.ask, "generate", **sizes),
        "static": functools.partial(peer.ask, "generate", cache="static", **sizes),
    }
    first = {name: ask(new=LENGTH, tokens=True)["tokens"] for name, ask in sides.items()}
    for ask in sides.values():  # warm
        ask(new=1)
    calls = {
        (part, name): functools.partial(ask, new=new)
        for part, new in (("whole", LENGTH), ("prefill", 1))
        for name, ask in sides.items()
    }
    timed = compare.each(compare.alternate(calls, rounds), "seconds")
    seconds = {part: {x: timed[part, x] for x in sides} for part in ("whole", "prefill")}
    best = {
        part: [min(both) for both in zip(by_side["dynamic"], by_side["static"], strict=True)]
        for part, by_side in seconds.items()
    }
    return {
        "speed_over_peer": compare.ratio(best["whole"], seconds["whole"]["ours"]),
        "prefill_speed_over_peer": compare.ratio(best["prefill"], seconds["prefill"]["ours"]),
        "tokens_per_second": {
            name: [round(batch * LENGTH / s, 1) for s in values]
            for name, values in seconds["whole"].items()
        },
        "prefill_seconds": seconds["prefill"],
        "same_tokens": first["ours"] == first["dynamic"] == first["static"],
    }
