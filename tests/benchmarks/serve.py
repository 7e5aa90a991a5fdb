"""Requests of unequal length, all waiting at once: a running batch, batches that end together, and transformers' continuous batching.

All sides have the same weights and requests, and the same most rows at a time, and alternate in warm processes; choices are
greedy, and requests end at their own length. Batches that end together are filled in the order of arrival. The result
reports whether the tokens are the same.
"""

import functools
import tempfile
from typing import Any

import numpy as np

from tests.benchmarks import case, compare

REQUESTS, ROWS = 64, 8
LENGTHS, NEW = (16, 128), (4, 128)  # of prompts and of new tokens
SYSTEM = 96  # tokens that prompts share in the second workload, which have 4 to 32 of their own


def workloads(vocab_size: int, requests: int) -> dict[str, list[tuple[list[int], int]]]:
    """Returns (prompt, number of new tokens) of requests, by workload."""
    rng = np.random.default_rng(2)

    def ids(length: int) -> list[int]:
        return rng.integers(3, vocab_size, length).tolist()

    def new() -> int:  # as many in each doubling: most answers are short
        low, high = np.log2(NEW)
        return int(2 ** rng.uniform(low, high))

    unequal = [(ids(rng.integers(LENGTHS[0], LENGTHS[1] + 1)), new()) for _ in range(requests)]
    system = ids(SYSTEM)
    shared = [(system + ids(rng.integers(4, 33)), new()) for _ in range(requests)]
    return {"unequal": unequal, "shared_beginning": shared}


def run(*, rounds: int = 5, prompts: int = REQUESTS) -> dict[str, Any]:
    """Alternates the sides `rounds` times with as many requests as `prompts`."""
    sizes = case.DECODE
    with tempfile.TemporaryDirectory() as folder:
        case.write_decoding(folder, sizes)
        with (
            compare.side(compare.ours("jax.serve_jax", folder)) as ours,
            compare.side(compare.peer("torch/llama_torch.py", "serve", folder)) as peer,
        ):
            figures = {
                name: _compare(ours, peer, requests, rounds)
                for name, requests in workloads(sizes["vocab_size"], prompts).items()
            }
            return {
                "case": {**sizes, "requests": prompts, "rows": ROWS},
                "peer_versions": peer.ask("versions"),
                **figures,
            }


def _compare(ours: compare.Side, peer: compare.Side, requests: list, rounds: int) -> Any:
    asked = {"requests": requests, "rows": ROWS}
    sides = {
        "running": functools.partial(ours.ask, "running", **asked),
        "running_without_prefixes": functools.partial(ours.ask, "running", prefixes=False, **asked),
        "batches": functools.partial(ours.ask, "batches", **asked),
        "continuous_batching": functools.partial(peer.ask, "continuous_batching", **asked),
    }
    answers = compare.alternate(sides, rounds, warm_up=1)
    seconds, cpu = (compare.each(answers, key) for key in ("seconds", "cpu_seconds"))
    tokens = [answers[name][0]["tokens"] for name in sides]
    over = {
        "over_batches": "batches",
        "over_continuous_batching": "continuous_batching",
        "of_prefixes": "running_without_prefixes",
    }
    return {
        **{f"speed_{x}": compare.ratio(seconds[y], seconds["running"]) for x, y in over.items()},
        # Of the processor's time, which other programs on the machine change less.
        **{f"cpu_{x}": compare.ratio(cpu[y], cpu["running"]) for x, y in over.items()},
        "tokens_per_second": {
            name: [round(sum(new for _, new in requests) / s, 1) for s in of_side]
            for name, of_side in seconds.items()
        },
        "prompt_tokens": sum(len(prompt) for prompt, _ in requests),
        "prompt_tokens_read": answers["running"][-1]["prompt_tokens_read"],
        "compiled_after_warm_up": answers["running"][-1]["compiled"],
        "same_tokens": sum(
            one == tokens[0][i] for of_side in tokens[1:] for i, one in enumerate(of_side)
        )
        / (len(tokens) - 1)
        / len(requests),
    }
