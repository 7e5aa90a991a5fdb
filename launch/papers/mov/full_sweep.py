"""MoV and MoLORA (arXiv 2309.05444) at full size: all methods on T5 1.1 of 770M, 3B and 11B, and the ablations of 3B.

The folder of data after a colon has P3's rows and templates in `p3` (docs/instructions.md), T5's tokenizer in `tokenizer`,
and T5 1.1 adapted to language modelling, as launch.convert imports it, in `t5_lm_770m`, `t5_lm_3b` and `t5_lm_11b`. The paper
has one seed. To see the runs and their commands:

  python -m launch.sweep --sweep launch/papers/mov/full_sweep.py:/data --out /runs/mov --dry_run
"""

import ml_collections

from launch.papers.mov.sweep import ADAPTERS, LORA_SITES, MOV, RAW
from launch.papers.shared import sweeps

FULL = "t5x_configs/experiments/mov/full/"
MODELS = {"770m": "t5_1_1_large", "3b": "t5_1_1_xl", "11b": "t5_1_1_xxl"}
LORA_RANKS = (4, 8, 16)
MOV_EXPERTS = {"770m": (10, 20, 30), "3b": (10, 30, 60), "11b": (10, 30, 60)}
MOLORA_EXPERTS = (10, 15)  # of rank 4
ABLATED = "3b"
# Ablation of MoV-10 -> bindings. The weight of the balance loss is not published.
ABLATIONS = {
    "top1": ("ADAPTER_TOP_K=1", RAW),
    "top2": ("ADAPTER_TOP_K=2", RAW),
    "top2_balanced": ("ADAPTER_TOP_K=2", RAW, "ADAPTER_BALANCE_LOSS=0.01"),
    "sentence": ("ADAPTER_ROUTER_INPUT='sentence'",),
    "large_batch": ("BATCH_SIZE=2048", "TRAIN_STEPS=5000"),
}


def get_config(data: str) -> ml_collections.ConfigDict:
    arms = {}
    for size in MODELS:
        for name, (file, *bindings) in _methods(size).items():
            arms[f"{name}_{size}"] = _arm(data, size, file, *bindings)
        arms[f"full_{size}"] = _arm(data, size, "")
    ranks = ("launch.evaluate", "ranks", "--checkpoint={run}", "--trust_config", "--json={json}")
    bindings = (f"TOKENIZER={data + '/tokenizer'!r}", f"INSTRUCTIONS_DIR={data + '/p3'!r}")
    return sweeps.config(
        arms,
        bindings=bindings,
        evaluations={"ranks": {"command": ("{python}", "-m", *ranks)}},
    )


def _methods(size: str) -> dict[str, tuple[str, ...]]:
    """Returns arm -> its file of adapters, then bindings."""
    out: dict[str, tuple[str, ...]] = {"ia3": (f"{ADAPTERS}ia3.gin",)}
    for rank in LORA_RANKS:
        out[f"lora{rank}"] = (f"{ADAPTERS}lora.gin", LORA_SITES, f"LORA_RANK={rank}")
    for experts in MOV_EXPERTS[size]:
        out[f"mov{experts}"] = (f"{MOV}mov.gin", f"ADAPTER_EXPERTS={experts}")
    for experts in MOLORA_EXPERTS:
        out[f"molora{experts}"] = (f"{MOV}molora.gin", f"ADAPTER_EXPERTS={experts}")
    for name, bindings in ABLATIONS.items() if size == ABLATED else ():
        out[f"mov10_{name}"] = (f"{MOV}mov.gin", "ADAPTER_EXPERTS=10", *bindings)
    return out


def _arm(data: str, size: str, method: str, *bindings: str) -> dict:
    """Returns an arm of a size; without a file of adapters, full tuning."""
    tuning = "tuning" if method else "full_tuning"
    model, start = f"t5x_configs/models/{MODELS[size]}.gin", f"{data}/t5_lm_{size}"
    return sweeps.arm(
        *(model, f"{FULL}{tuning}.gin", *([method] if method else [])),
        bindings=(f"INITIAL_CHECKPOINT_PATH={start!r}", *bindings),
    )
