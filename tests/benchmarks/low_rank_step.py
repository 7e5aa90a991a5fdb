"""A training step with low-rank factors (rank 1/8 of the width) against the dense step: time, state and FLOPs.

The model has blocks of width 1,024 and a small vocabulary, so that nearly all parameters are factorised.
"""

from typing import Any

from espalier.model.low_rank import factors
from tests.benchmarks import compare
from tests.benchmarks.step_side import StepSide, recipe_of

FILES = ("t5x_configs/models/bench_blocks.gin", "t5x_configs/runs/pretrain.gin")
LOW_RANK = "t5x_configs/methods/low_rank/low_rank.gin"
BINDINGS = ("BATCH_SIZE=4", "TASK_FEATURE_LENGTHS={'targets': 256}")
RANK = 0.125


def run(*, repeats: int = 12) -> dict[str, Any]:
    """Alternates `repeats` steps of both models, each with AdamW and the weight decay of its gin file."""
    sides = {
        "dense": StepSide(recipe_of(FILES, BINDINGS)),
        "low_rank": StepSide(recipe_of((*FILES, LOW_RANK), (*BINDINGS, f"RANK={RANK}"))),
    }
    steps = {name: side.step for name, side in sides.items()}
    times = compare.alternate(steps, repeats, warm_up=1)
    factorised = factors.find_factors(sides["low_rank"].params)
    return {
        "rank_fraction": RANK,
        "tokens": 4 * 256,
        "step_seconds": {name: sorted(times[name])[repeats // 2] for name in sides},
        "low_rank_over_dense": compare.ratio(times["low_rank"], times["dense"]),
        "parameters": {name: side.parameters for name, side in sides.items()},
        "state_megabytes": {name: side.megabytes for name, side in sides.items()},
        "factors_over_matrices": sum(x.factors for x in factorised)
        / sum(x.dense for x in factorised),
        "compiled_flops": {name: side.flops for name, side in sides.items()},
    }
