"""Training steps of light experts against plain adapters, of MoLORA against a loop over experts, and of LoRA against peft.

The model is that of `train_step`: MoV against (IA)3, and MoLORA, whose experts have rank 4, against LoRA at the same
sites, in one process. The loop is MoLORA written expert by expert, with the same parameters. LoRA against peft is
`train_step` with a frozen model and LoRA of rank 16 at all projections, in fresh processes.
"""

import pathlib
import tempfile
from typing import Any

import flax.linen as nn
import jax

from espalier.model.adapters.adapter import Adapted
from espalier.model.kernels import matmul
from espalier.model.mov.molora import MoLora
from tests.benchmarks import case, compare, train_step
from tests.benchmarks.step_side import StepSide, recipe_of

EXPERTS, RANK, PEER_RANK = 10, 4, 16
_FILES = ("t5x_configs/models/bench_llama.gin", "t5x_configs/runs/pretrain.gin")
_SIZES = (
    f"BATCH_SIZE={case.CASE['batch_size']}",
    f"TASK_FEATURE_LENGTHS={{'targets': {case.CASE['length']}}}",
)
_METHODS = "t5x_configs/methods/"
_LORA_SITES = "LORA_LAYERS=['(.*/)?attention/(query|key|value|out)', '(.*/)?mlp/(gate|down)']"
_LOOP = """from __gin__ import dynamic_registration

from tests.benchmarks import adapters
from espalier.model.adapters import adapter

include 't5x_configs/methods/mov/molora.gin'

adapter.named.molora = @adapters.LoopedMoLora
adapters.LoopedMoLora.num_experts = %ADAPTER_EXPERTS
adapters.LoopedMoLora.rank = %MOLORA_RANK
"""


class LoopedMoLora(MoLora):
    """MoLORA as a loop: the whole output of each expert, times its weight."""

    @nn.compact
    def __call__(self, site: Adapted, x: jax.Array, *sizes: jax.Array) -> jax.Array:
        y = site.base(x)
        a_NXR, b_NRY = self.factors(site, x.shape[-1], y.shape[-1], self.num_experts)
        weights = self.weights(site, x, site.axes[0]).astype(y.dtype)
        for n in range(self.num_experts):
            inner = matmul.matmul(x, a_NXR[n].astype(x.dtype)) * self.scale(a_NXR.shape[-1])
            y = y + weights[..., n : n + 1] * matmul.matmul(inner, b_NRY[n].astype(y.dtype))
        return y


def run(*, repeats: int = 12, rounds: int = 5, steps: int = 10) -> dict[str, Any]:
    """Alternates `repeats` steps of this project's adapters, and `rounds` processes of LoRA and peft."""
    # First, since Linux counts the largest memory of a process from that of its parent on.
    peft = _peft(rounds, steps)
    return {**_steps(repeats), **peft}


def _steps(repeats: int) -> dict[str, Any]:
    sides = _sides()
    times = compare.alternate({name: side.step for name, side in sides.items()}, repeats, warm_up=1)
    return {
        "mov_over_ia3": compare.ratio(times["mov"], times["ia3"]),
        "molora_over_lora": compare.ratio(times["molora"], times["lora"]),
        "loop_over_molora": compare.ratio(times["loop"], times["molora"]),
        "step_seconds": {name: sorted(times[name])[repeats // 2] for name in sides},
        "trained_parameters": {name: side.trained for name, side in sides.items()},
    }


def _sides() -> dict[str, StepSide]:
    experts = f"ADAPTER_EXPERTS={EXPERTS}"
    molora = (experts, f"MOLORA_RANK={RANK}")
    methods = {
        "ia3": ("adapters/ia3", ()),
        "mov": ("mov/mov", (experts,)),
        "lora": ("adapters/lora", (f"LORA_RANK={RANK}", _LORA_SITES)),
        "molora": ("mov/molora", molora),
    }
    sides = {
        name: StepSide(recipe_of((*_FILES, f"{_METHODS}{file}.gin"), (*_SIZES, *bindings)))
        for name, (file, bindings) in methods.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        loop = pathlib.Path(folder, "loop.gin")
        loop.write_text(_LOOP)
        recipe = recipe_of((*_FILES, str(loop)), (*_SIZES, *molora))
        return {**sides, "loop": StepSide(recipe)}


def _peft(rounds: int, steps: int) -> dict[str, Any]:
    count = train_step.WARM_UP + steps
    with tempfile.TemporaryDirectory() as folder:
        commands = {side: train_step.command(side, folder, count) for side in train_step.SIDES}
        case.write_training(folder, steps=count, lora_rank=PEER_RANK)
        reports = compare.alternate_processes(commands, rounds)
    seconds = train_step.medians(reports, "seconds", train_step.WARM_UP)
    memory = compare.each(reports, "peak_memory_mb")
    return {
        "speed_over_peft": compare.ratio(train_step.least(seconds), seconds["ours"]),
        "peak_memory_of_pefts": compare.ratio(memory["ours"], train_step.least(memory)),
        **train_step.facts(reports, seconds, case.CASE["batch_size"] * case.CASE["length"]),
        "other_load_cores": compare.each(reports, "other_load"),
    }
