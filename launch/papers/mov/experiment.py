"""Light experts (arXiv 2309.05444) on a small T5 and at full size: the runs, and what is measured of them.

A T5 is pre-trained by span corruption, then on all compositions of two operations in one set of words, and on single operations in
another. It is frozen, and each arm is tuned on 36 compositions in the other words; the 12 that are left are judged by ranking answer
choices. A tuned arm is about two minutes on one core, the frozen model about eight; the number of seeds after a colon:

  espalier sweep --sweep launch/papers/mov/experiment.py:5 --out runs/mov/operations --workers 2

At full size (`full` and a folder of data) all methods tune T5 1.1 of 770M, 3B and 11B, with the ablations of 3B. The folder has P3's
rows and templates in `p3` (docs/instructions.md), T5's tokenizer in `tokenizer`, and T5 1.1 adapted to language modelling, as
launch.convert imports it, in `t5_lm_770m`, `t5_lm_3b` and `t5_lm_11b`. The paper has one seed. To see the runs and their commands:

  espalier sweep --sweep launch/papers/mov/experiment.py:full,/data --out /runs/mov --dry_run
"""

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from espalier.launch.papers.mov import evaluations, rows
from espalier.launch.papers.shared import domains, results, sweeps
from espalier.launch.precompile.table_rows import Row

CPU = "t5x_configs/experiments/mov/cpu/"
ADAPTERS = "t5x_configs/methods/adapters/"
METHODS = "t5x_configs/methods/mov/"
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
VARIANT_BINDINGS = {
    "top1": ("ADAPTER_TOP_K=1", RAW, _CHOOSING),
    "top1_renormalised": ("ADAPTER_TOP_K=1", _CHOOSING),
    "top2": ("ADAPTER_TOP_K=2", RAW, _CHOOSING),
    "layer_input": ("ADAPTER_ROUTER_INPUT='layer_input'",),
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
        arms[f"molora{experts}"] = _tuned(
            _rate(LORA_RATE), *bindings, method=f"{METHODS}molora.gin"
        )
    for name, bindings in VARIANT_BINDINGS.items():
        arms[f"mov10_{name}"] = _mov(10, *bindings)
    evaluations = {
        name: {"call": f"espalier.launch.papers.mov.evaluations:{name}"}
        for name in ("ranks", "routing")
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
    return _tuned(*settings, method=f"{METHODS}mov.gin")


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


ACCURACY = "accuracy"
BASE, FULL, IA3 = "base", "full", "ia3"
LORA = tuple(f"lora{rank}" for rank in LORA_RANKS)
MOV = tuple(f"mov{n}" for n in MOV_EXPERTS)
MOLORA = tuple(f"molora{n}" for n in MOLORA_EXPERTS)
VARIANTS = tuple(f"{MOV[0]}_{name}" for name in VARIANT_BINDINGS)
TUNED = (FULL, IA3, *LORA, *MOV, *MOLORA, *VARIANTS)
ROUTED = (*MOV, *MOLORA, *VARIANTS)
_LABELS = {
    BASE: "frozen model, not tuned",
    FULL: "full tuning",
    IA3: "(IA)3",
    **{arm: f"LoRA, rank {rank}" for arm, rank in zip(LORA, LORA_RANKS, strict=True)},
    **{arm: f"MoV-{n}" for arm, n in zip(MOV, MOV_EXPERTS, strict=True)},
    **{arm: f"MoLORA-{n}" for arm, n in zip(MOLORA, MOLORA_EXPERTS, strict=True)},
    "mov10_top1": "MoV-10, top-1",
    "mov10_top1_renormalised": "MoV-10, top-1, renormalised",
    "mov10_top2": "MoV-10, top-2",
    "mov10_layer_input": "MoV-10, routed by layers' inputs",
    "mov10_sentence": "MoV-10, routed by sentences",
}
CHANCE = 1 / 4
# Nats for each token of an answer. A model that knows the letters but not their order has 0.9.
LEARNED = 0.2


@dataclasses.dataclass(frozen=True)
class Runs(results.Results):
    """Runs of the sweep, as `experiment.run` returns them.

    Attributes:
      unlearned: the loss on other strings of the frozen models that have not learned the compositions, by seed. Their
        seeds' runs are left out.
    """

    unlearned: Mapping[int, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def judging(cls, rows: Sequence[Mapping[str, Any]]) -> "Runs":
        """Returns the runs of the seeds whose frozen model has learned the compositions."""
        losses = {row["seed"]: row["trained_loss"] for row in rows if row["arm"] == BASE}
        unlearned = {seed: loss for seed, loss in losses.items() if loss > LEARNED}
        return cls([row for row in rows if row["seed"] not in unlearned], unlearned)

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns the accuracy on held-out compositions, the loss on those that are trained, and parameters."""
        measured = row["evaluations"].get("ranks") or {}
        return {
            ACCURACY: measured.get(ACCURACY),
            "trained_loss": row.get("trained_loss"),
            "trained_parameters": row.get("trained_parameters"),
        }

    def lower_is_better(self, score: str) -> bool:
        return score != ACCURACY

    def degenerate(self, row: Mapping[str, Any]) -> str:
        return domains.collapsed(row, self.top_1(row["arm"]))

    def limits(self, score: str) -> tuple[float, float] | None:
        return (CHANCE, 1.0) if score == ACCURACY else None

    def digits(self, score: str) -> int:
        return 0 if score == "trained_parameters" else 3

    def label(self, arm: str) -> str:
        return _LABELS.get(arm, arm)

    def top_1(self, arm: str) -> tuple[str, ...]:
        """Returns the kinds of routers of an arm, of `loads.ROUTERS`, that choose one expert for each token."""
        return ("mlp", "attention") if "top1" in arm else ()

    def choices(self, arm: str, kind: str) -> dict[int, np.ndarray]:
        """Returns by seed the share of each composition's tokens whose first choice an expert is: [layer, task, expert]."""
        out = {}
        for seed, row in self.find(arm).items():
            chosen = (row["evaluations"].get("routing") or {}).get("chosen", {})
            if chosen and all(kind in tables for tables in chosen.values()):
                out[seed] = np.array([tables[kind] for tables in chosen.values()]).swapaxes(0, 1)
        return out

    def tasks(self) -> list[str]:
        """Returns the names of the held-out compositions."""
        measured = (row["evaluations"].get("ranks") for row in self.rows)
        return next((list(one["tasks"]) for one in measured if one), [])

    def by_task(self, arm: str) -> dict[int, np.ndarray]:
        """Returns by seed the accuracy on each held-out composition."""
        return {
            seed: np.array([one[ACCURACY] for one in measured["tasks"].values()])
            for seed, row in self.find(arm).items()
            if (measured := row["evaluations"].get("ranks"))
        }

    def specialisation(self, arm: str, kind: str, than: str = "rows") -> dict[int, np.ndarray]:
        """Returns by seed and layer how much further apart two compositions route than `than`: [layer].

        `than` is 'rows', the halves of one composition's rows, or 'wordings', two templates of one composition. Distances
        are total variations of mean probabilities (`evaluations.routing`); `kind` is of `evaluations.KINDS`.
        """
        assert kind in evaluations.KINDS
        out = {}
        for seed, row in self.find(arm).items():
            by_kind = (row["evaluations"].get("routing") or {}).get("distances", {})
            if layers := by_kind.get(kind):
                out[seed] = np.array([x["tasks"] - x[than] for x in layers])
        return out


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
SEEDS = 5
PARTS = {"operations": "compositions of operations"}
_KEYS = ("run", "arm", "seed", "step", "tokens", "seconds", "evaluations", "digest")
_PARAMS = "params/"


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep by part; `model_dir` is the parent of its folder, options are as of `sweeps.rows`."""
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
        "trained_loss": float(np.mean(losses)) if losses else None,
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
    return {"parameters": total - own, "trained_parameters": own or total}
