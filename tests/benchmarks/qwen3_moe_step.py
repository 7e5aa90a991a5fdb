"""`moe_step` with a small Qwen3-MoE: 128 experts of width 96, top-8 routing, norms over each head of queries and keys."""

from typing import Any

from tests.benchmarks import moe_step


def run(*, rounds: int = 3, steps: int = 4) -> dict[str, Any]:
    """Alternates both sides `rounds` times with each routing, `steps` timed steps in each."""
    return moe_step.run(rounds=rounds, steps=steps, names=("qwen3_moe",))
