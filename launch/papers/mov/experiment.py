"""Light experts (arXiv 2309.05444) on small T5s and at full size: the runs, and what is measured of them.

A T5 is pre-trained by span corruption, then on all compositions of two operations in one set of words, and on single operations in
another. It is frozen, and each arm is tuned on 96 compositions in the other words; those and the 32 that are left are judged by ranking
answer choices. (IA)3, MoV-10 and full tuning are run at two widths. A tuned arm takes about a minute on one core, the frozen model about six;
the number of seeds after a colon:

  espalier sweep --sweep launch/papers/mov/experiment.py:5 --out runs/mov/operations --workers 2

At full size (`full` and a folder of data) all methods tune T5 1.1 of 770M, 3B and 11B, with the ablations of 3B. The folder has P3's
rows and templates in `p3` (docs/use/instructions.md), T5's tokenizer in `tokenizer`, and T5 1.1 adapted to language modelling, as
espalier convert imports it, in `t5_lm_770m`, `t5_lm_3b` and `t5_lm_11b`. The paper has one seed. To see the runs and their commands:

  espalier sweep --sweep launch/papers/mov/experiment.py:full,/data --out /runs/mov --dry_run
"""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from espalier.launch.papers.mov import rows
from espalier.launch.papers.mov.runs import (
    BASE,
    FULL,
    IA3,
    LORA,
    LORA_RANKS,
    LOSS,
    MAIN,
    MOLORA,
    MOLORA_EXPERTS,
    MOV,
    MOV_EXPERTS,
    NARROW,
    PARAMETERS,
    WIDTHS,
)
from espalier.launch.papers.shared import sweeps
from espalier.launch.precompile.table_rows import Row

CPU = "t5x_configs/experiments/mov/cpu/"
ADAPTERS = "t5x_configs/methods/adapters/"
METHODS = "t5x_configs/methods/mov/"
# Of the frozen model, on single operations and then on compositions: on all at once it takes twice as long.
SINGLE_STEPS, BASE_STEPS = 800, 2500
STEPS = 600  # of each tuned arm
_FIRST_SEED = 25  # 20 to 24 have run in an earlier design
RANK = 4  # of MoLORA's experts
WARMUP_STEPS = 100  # of the frozen model
# Learning rates: vectors need a larger one than matrices. In these updates a frozen model of width 128 hardly learns at 1e-3 and more, a
# narrow one at less than 8e-4.
BASE_RATE, NARROW_RATE, FULL_RATE = 5e-4, 8.7e-4, 1e-3
LORA_RATE, VECTOR_RATE = 3e-3, 3e-2
# LoRA at the sites of MoLORA: of a gated MLP, the branch with the activation and the last projection.
LORA_SITES = "LORA_LAYERS=['(.*/)?\\\\w*attention/(query|key|value|out)', '(.*/)?mlp/(gate|down)']"
RAW = "ADAPTER_RENORMALISE=False"  # as the paper's code has it
BALANCE = 0.1  # weight of the balance loss, without which a router of one expert often collapses
# Variant of MoV-10 -> bindings.
VARIANT_BINDINGS = {
    "top1": ("ADAPTER_TOP_K=1", RAW, f"ADAPTER_BALANCE_LOSS={BALANCE}"),
    "sentence": ("ADAPTER_ROUTER_INPUT='sentence'",),
}


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    if data := sweeps.after("full", seeds):
        return _full_sweep(data)
    write = ("espalier.launch.papers.mov.rows", "--to={run}", "--seed={SEED}")
    arms = {
        "rows": sweeps.made(*write),
        "pretrained": sweeps.arm(f"{CPU}denoise.gin", evaluations=()),
        "single": _first("single", rows.SINGLE, SINGLE_STEPS, parent="pretrained"),
        BASE: _first("known", rows.KNOWN, BASE_STEPS, parent="single", evaluations=("ranks",)),
        FULL: _tuned(_rate(FULL_RATE), evaluations=("ranks",)),
        IA3: _tuned(_rate(VECTOR_RATE), method=f"{ADAPTERS}ia3.gin", evaluations=("ranks",)),
        MOV[0]: _mov(MOV_EXPERTS[0]),
        MOV[1]: _only_main(_mov(MOV_EXPERTS[1])),
    }
    for rank, arm in zip(LORA_RANKS, LORA, strict=True):
        arms[arm] = _only_main(
            _tuned(
                _rate(LORA_RATE),
                LORA_SITES,
                f"LORA_RANK={rank}",
                method=f"{ADAPTERS}lora.gin",
                evaluations=("ranks",),
            )
        )
    experts = (f"ADAPTER_EXPERTS={MOLORA_EXPERTS}", f"MOLORA_RANK={RANK}")
    arms[MOLORA] = _only_main(_tuned(_rate(LORA_RATE), *experts, method=f"{METHODS}molora.gin"))
    for name, bindings in VARIANT_BINDINGS.items():
        arms[f"{MOV[0]}_{name}"] = _only_main(_mov(MOV_EXPERTS[0], *bindings))
    evaluations = {
        name: {"call": f"espalier.launch.papers.mov.evaluations:{name}"}
        for name in ("ranks", "routing")
    }
    sizes = {name: {"bindings": _width(width)} for name, width in WIDTHS.items()}
    some = sweeps.seeds(seeds, first=_FIRST_SEED)
    return sweeps.config(arms, sizes=sizes, seeds=some, evaluations=evaluations)


def _width(width: int) -> tuple[str, ...]:
    """Returns bindings of a model of this width, with four heads."""
    head = width // 4
    sizes = {"embed_dim": width, "head_dim": head, "mlp_dim": 2 * width}
    return (
        *(f"config.TransformerConfig.{name}={value}" for name, value in sizes.items()),
        f"query/jax.nn.initializers.variance_scaling.scale={1 / head}",
    )


def _only_main(arm: dict) -> dict:
    return {**arm, "sizes": (MAIN,)}


def _rate(value: float) -> str:
    return f"LEARNING_RATE={value}"


def _first(name: str, rows_of: str, steps: int, **settings: object) -> dict:
    """Returns an arm that learns in the first words."""
    sets = f"TRAIN_SETS={{{name!r}: {[rows_of]!r}}}"
    schedule = (_rate(BASE_RATE), f"TRAIN_STEPS={steps}", f"WARMUP_STEPS={WARMUP_STEPS}")
    sizes = {NARROW: {"bindings": (_rate(NARROW_RATE),)}, MAIN: {}}
    return _tuned(*schedule, sets, **{"evaluations": (), "sizes": sizes, **settings})


def _mov(experts: int, *bindings: str) -> dict:
    settings = (_rate(VECTOR_RATE), f"ADAPTER_EXPERTS={experts}", *bindings)
    return _tuned(*settings, method=f"{METHODS}mov.gin")


def _tuned(*bindings: str, method: str = "", parent: str = "base", **settings: object) -> dict:
    """Returns an arm that learns operations; `method` is a file of adapters."""
    files = (f"{CPU}operations.gin", *([method] if method else []))
    data = (
        "TOKENIZER='{pretrained}/vocabulary.model'",
        "INSTRUCTIONS_DIR='{rows}'",
        f"TRAIN_STEPS={STEPS}",
    )
    return sweeps.arm(*files, bindings=(*data, *bindings), parent=parent, **settings)


# The runs of full size.

_FULL = "t5x_configs/experiments/mov/full/"
FULL_MODELS = {"770m": "t5_1_1_large", "3b": "t5_1_1_xl", "11b": "t5_1_1_xxl"}
FULL_LORA_RANKS = (4, 8, 16)
FULL_MOV_EXPERTS = {"770m": (10, 20, 30), "3b": (10, 30, 60), "11b": (10, 30, 60)}
FULL_MOLORA_EXPERTS = (10, 15)  # of rank 4
ABLATED = "3b"
# Ablation of MoV-10 -> bindings. The weight of the balance loss is not published.
ABLATIONS = {
    "top1": ("ADAPTER_TOP_K=1", RAW),
    "top2": ("ADAPTER_TOP_K=2", RAW),
    "top2_balanced": ("ADAPTER_TOP_K=2", RAW, "ADAPTER_BALANCE_LOSS=0.01"),
    "sentence": ("ADAPTER_ROUTER_INPUT='sentence'",),
    "large_batch": ("BATCH_SIZE=2048", "TRAIN_STEPS=5000"),
}


def _full_sweep(data: str) -> ml_collections.ConfigDict:
    arms = {}
    for size in FULL_MODELS:
        for name, (file, *bindings) in _full_methods(size).items():
            arms[f"{name}_{size}"] = _full_arm(data, size, file, *bindings)
        arms[f"full_{size}"] = _full_arm(data, size, "")
    ranks = (
        "espalier.launch.evaluate",
        "ranks",
        "--checkpoint={run}",
        "--trust_config",
        "--json={json}",
    )
    bindings = (f"TOKENIZER={data + '/tokenizer'!r}", f"INSTRUCTIONS_DIR={data + '/p3'!r}")
    return sweeps.config(
        arms,
        bindings=bindings,
        evaluations={"ranks": {"command": ("{python}", "-m", *ranks)}},
    )


def _full_methods(size: str) -> dict[str, tuple[str, ...]]:
    """Returns arm -> its file of adapters, then bindings."""
    out: dict[str, tuple[str, ...]] = {"ia3": (f"{ADAPTERS}ia3.gin",)}
    for rank in FULL_LORA_RANKS:
        out[f"lora{rank}"] = (f"{ADAPTERS}lora.gin", LORA_SITES, f"LORA_RANK={rank}")
    for experts in FULL_MOV_EXPERTS[size]:
        out[f"mov{experts}"] = (f"{METHODS}mov.gin", f"ADAPTER_EXPERTS={experts}")
    for experts in FULL_MOLORA_EXPERTS:
        out[f"molora{experts}"] = (f"{METHODS}molora.gin", f"ADAPTER_EXPERTS={experts}")
    for name, bindings in ABLATIONS.items() if size == ABLATED else ():
        out[f"mov10_{name}"] = (f"{METHODS}mov.gin", "ADAPTER_EXPERTS=10", *bindings)
    return out


def _full_arm(data: str, size: str, method: str, *bindings: str) -> dict:
    """Returns an arm of a size; without a file of adapters, full tuning."""
    tuning = "tuning" if method else "full_tuning"
    model, start = f"t5x_configs/models/{FULL_MODELS[size]}.gin", f"{data}/t5_lm_{size}"
    return sweeps.arm(
        *(model, f"{_FULL}{tuning}.gin", *([method] if method else [])),
        bindings=(f"INITIAL_CHECKPOINT_PATH={start!r}", *bindings),
    )


_DATA = ("TOKENIZER=tokenizer", "INSTRUCTIONS_DIR=p3", "INITIAL_CHECKPOINT_PATH=run")


def _adapted(model: str, method: str) -> tuple[str, ...]:
    """Returns the gin files of a model with adapters."""
    return (
        f"t5x_configs/models/t5_1_1_{model}.gin",
        f"{_FULL}tuning.gin",
        f"t5x_configs/methods/mov/{method}.gin",
    )


ROWS = (
    Row(
        name="t5_11b_mov30",
        title="T5 1.1 of 11B with MoV-30, instruction tuning",
        files=_adapted("xxl", "mov"),
        topology="v5e:4x4",
        bindings=("ADAPTER_EXPERTS=30", *_DATA),
    ),
    Row(
        name="t5_11b_mov30_v5p",
        title="T5 1.1 of 11B with MoV-30 on v5p",
        files=_adapted("xxl", "mov"),
        topology="v5p:2x2x4",
        bindings=("ADAPTER_EXPERTS=30", *_DATA),
    ),
    Row(
        name="t5_3b_mov30",
        title="T5 1.1 of 3B with MoV-30",
        files=_adapted("xl", "mov"),
        topology="v5e:4x4",
        bindings=("ADAPTER_EXPERTS=30", *_DATA),
    ),
    Row(
        name="t5_3b_molora10",
        title="T5 1.1 of 3B with MoLORA-10 of rank 4",
        files=_adapted("xl", "molora"),
        topology="v5e:4x4",
        bindings=("ADAPTER_EXPERTS=10", *_DATA),
    ),
    Row(
        name="t5_770m_full",
        title="T5 1.1 of 770M, all parameters",
        files=("t5x_configs/models/t5_1_1_large.gin", f"{_FULL}full_tuning.gin"),
        topology="v5e:4x4",
        bindings=_DATA,
    ),
)


# What is measured of the runs.

TITLE = "MoV and MoLORA, 2309.05444"
SEEDS = (5, 8, 12)
EARLIER = (
    "seeds 10 to 14, 85 runs: 36 compositions, accuracies; they chose longer training of the frozen model and a balance loss for routers "
    "that choose one expert",
    "seeds 15 to 19, 90 runs: 36 compositions, 12 held out, several effects judged a claim by accuracy; the five claims that had to hold "
    "were undecided",
    "seeds 20 to 24, 100 runs, whose results are not kept: no frozen model of width 128 learned its compositions (losses of 0.42 to 0.65 on "
    "other strings, where 0.4 was asked), so that nothing was measured; those of width 64 did",
)
PARTS = {"operations": "compositions of operations"}
SWEEPS = {"operations": "mov/experiment:{seeds}"}
_KEYS = ("run", "arm", "size", "seed", "step", "tokens", "seconds", "evaluations", "digest")
_PARAMS = "params/"


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep by part; `model_dir` is the parent of its folder, `options` are for `sweeps.rows`."""
    files = {part: ("mov/experiment", seeds) for part in parts}
    return sweeps.parts(model_dir, files, completed, **options)


def completed(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what the page needs of a row of results.

    Adds 'parameters' and 'trained_parameters', None for rows that are no model, and 'trained_loss', the loss on held-out
    strings of the compositions that are trained.
    """
    losses = [values["loss"] for values in row["held_out"].values()]
    return {
        **{key: row.get(key) for key in _KEYS},
        **(_parameters(directory) if row["step"] else {}),
        LOSS: float(np.mean(losses)) if losses else None,
    }


def _parameters(directory: pathlib.Path) -> dict[str, int]:
    from espalier.model.adapters import adapter
    from espalier.trainers.checkpoints import step_dir

    arrays = step_dir.read_manifest(step_dir.resolve(directory)).arrays
    sizes = {
        name.removeprefix(_PARAMS): math.prod(entry.shape)
        for name, entry in arrays.items()
        if name.startswith(_PARAMS)
    }
    own = sum(size for name, size in sizes.items() if re.fullmatch(adapter.LEAVES, name))
    total = sum(sizes.values())
    return {"parameters": total - own, PARAMETERS: own or total}
