"""Light experts (arXiv 2309.05444) on a small T5: all claims, on compositions of operations in words that it has not read together.

A T5 is pre-trained by span corruption, then on all compositions of two operations in one set of words, and on single operations in
another. It is frozen, and each arm is tuned on 36 compositions in the other words; the 12 that are left are judged by ranking answer
choices. A tuned arm is about two minutes on one core, the frozen model about eight; the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/mov/sweep.py:5 --out runs/mov/operations --workers 2
"""

import ml_collections

from launch.papers.mov import rows
from launch.papers.shared import sweeps

CPU = "t5x_configs/experiments/mov/cpu/"
ADAPTERS = "t5x_configs/methods/adapters/"
MOV = "t5x_configs/methods/mov/"
# Of the frozen model, on single operations and then on compositions: on all at once it takes twice as long.
SINGLE_STEPS, BASE_STEPS = 800, 1400
STEPS = 600  # of each tuned arm
RANK = 4  # of MoLORA's experts
# Learning rates: vectors need a larger one than matrices.
BASE_RATE = FULL_RATE = 1e-3
LORA_RATE, VECTOR_RATE = 3e-3, 3e-2
MOV_EXPERTS = (10, 30, 60)
MOLORA_EXPERTS = (10, 15)
LORA_RANKS = (4, 16)
# LoRA at the sites of MoLORA: of a gated MLP, the branch with the activation and the last projection.
LORA_SITES = "LORA_LAYERS=['(.*/)?\\\\w*attention/(query|key|value|out)', '(.*/)?mlp/(gate|down)']"
_CHOSE = 5  # seeds of an earlier round, which chose BASE_STEPS and the balance of routers, and judge nothing
RAW = "ADAPTER_RENORMALISE=False"  # as the paper's code has it
BALANCE = 0.1  # weight of the balance loss, without which a router of one expert often collapses
_CHOOSING = f"ADAPTER_BALANCE_LOSS={BALANCE}"
# Variant of MoV-10 -> bindings.
VARIANTS = {
    "top1": ("ADAPTER_TOP_K=1", RAW, _CHOOSING),
    "top1_renormalised": ("ADAPTER_TOP_K=1", _CHOOSING),
    "top2": ("ADAPTER_TOP_K=2", RAW, _CHOOSING),
    "layer_input": ("ADAPTER_ROUTER_INPUT='layer_input'",),
    "sentence": ("ADAPTER_ROUTER_INPUT='sentence'",),
}


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    write = ("launch.papers.mov.rows", "--to={run}", "--seed={SEED}")
    arms = {
        "rows": sweeps.made(*write),
        "pretrained": sweeps.arm(f"{CPU}denoise.gin", evaluations=()),
        "single": _first("single", rows.SINGLE, SINGLE_STEPS, parent="pretrained"),
        "base": _first("known", rows.KNOWN, BASE_STEPS, parent="single", evaluations=("ranks",)),
        "full": _tuned(_rate(FULL_RATE), evaluations=("ranks",)),
        "ia3": _tuned(_rate(VECTOR_RATE), method=f"{ADAPTERS}ia3.gin", evaluations=("ranks",)),
    }
    for rank in LORA_RANKS:
        arms[f"lora{rank}"] = _tuned(
            _rate(LORA_RATE),
            LORA_SITES,
            f"LORA_RANK={rank}",
            method=f"{ADAPTERS}lora.gin",
            evaluations=("ranks",),
        )
    for experts in MOV_EXPERTS:
        arms[f"mov{experts}"] = _mov(experts)
    for experts in MOLORA_EXPERTS:
        bindings = (f"ADAPTER_EXPERTS={experts}", f"MOLORA_RANK={RANK}")
        arms[f"molora{experts}"] = _tuned(_rate(LORA_RATE), *bindings, method=f"{MOV}molora.gin")
    for name, bindings in VARIANTS.items():
        arms[f"mov10_{name}"] = _mov(10, *bindings)
    evaluations = {
        name: {"call": f"launch.papers.mov.evaluations:{name}"} for name in ("ranks", "routing")
    }
    judging = sweeps.seeds(seeds, after=_CHOSE)
    return sweeps.config(arms, seeds=judging, evaluations=evaluations)


def _rate(value: float) -> str:
    return f"LEARNING_RATE={value}"


def _first(name: str, rows_of: str, steps: int, **settings: object) -> dict:
    """Returns an arm that learns in the first words."""
    sets = f"TRAIN_SETS={{{name!r}: {[rows_of]!r}}}"
    return _tuned(_rate(BASE_RATE), f"TRAIN_STEPS={steps}", sets, **{"evaluations": (), **settings})


def _mov(experts: int, *bindings: str) -> dict:
    settings = (_rate(VECTOR_RATE), f"ADAPTER_EXPERTS={experts}", *bindings)
    return _tuned(*settings, method=f"{MOV}mov.gin")


def _tuned(*bindings: str, method: str = "", parent: str = "base", **settings: object) -> dict:
    """Returns an arm that learns operations; `method` is a file of adapters."""
    files = (f"{CPU}operations.gin", *([method] if method else []))
    data = (
        "TOKENIZER='{pretrained}/vocabulary.model'",
        "INSTRUCTIONS_DIR='{rows}'",
        f"HELD_OUT={rows.held_out()!r}",
        f"TRAIN_STEPS={STEPS}",
    )
    return sweeps.arm(*files, bindings=(*data, *bindings), parent=parent, **settings)
