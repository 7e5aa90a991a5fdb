"""Greedy generation against transformers: speed of the whole call, and of the prefill alone.

Both sides have the same weights and prompts and alternate in warm processes. The peer's time is that of its faster
cache. The result reports whether the tokens are the same.
"""

import tempfile
from typing import Any

from launch.benchmarks import decode_case, pairs

LENGTH = 128


def run(*, rounds: int = 12) -> dict[str, Any]:
    """Alternates both sides `rounds` times with 128 prompt and 128 new tokens, in batches of 1 and 8."""
    sizes = decode_case.SMALL
    with tempfile.TemporaryDirectory() as folder:
        decode_case.write(folder, sizes)
        with decode_case.side("ours", folder) as ours, decode_case.side("peer", folder) as peer:
            return {
                "case": {**sizes, "prompt": LENGTH, "new": LENGTH},
                "peer_versions": peer.ask("versions"),
                **{f"batch_{batch}": _compare(ours, peer, batch, rounds) for batch in (1, 8)},
            }


def _compare(ours: decode_case.Side, peer: decode_case.Side, batch: int, rounds: int) -> Any:
    sides = {
        "ours": lambda **options: ours.ask("generate", batch=batch, length=LENGTH, **options),
        "dynamic": lambda **options: peer.ask("generate", batch=batch, length=LENGTH, **options),
        "static": lambda **options: peer.ask(
            "generate", batch=batch, length=LENGTH, cache="static", **options
        ),
    }
    first = {name: ask(new=LENGTH, tokens=True)["tokens"] for name, ask in sides.items()}
    for ask in sides.values():  # warm
        ask(new=1)
    seconds: dict[str, dict[str, list[float]]] = {
        part: {name: [] for name in sides} for part in ("whole", "prefill")
    }
    for _ in range(rounds):
        for part, new in (("whole", LENGTH), ("prefill", 1)):
            for name, ask in sides.items():
                seconds[part][name].append(ask(new=new)["seconds"])
    best = {
        part: [min(both) for both in zip(by_side["dynamic"], by_side["static"], strict=True)]
        for part, by_side in seconds.items()
    }
    return {
        "speed_over_peer": pairs.ratio(best["whole"], seconds["whole"]["ours"]),
        "prefill_speed_over_peer": pairs.ratio(best["prefill"], seconds["prefill"]["ours"]),
        "tokens_per_second": {
            name: [round(batch * LENGTH / s, 1) for s in values]
            for name, values in seconds["whole"].items()
        },
        "prefill_seconds": seconds["prefill"],
        "same_tokens": first["ours"] == first["dynamic"] == first["static"],
    }
