"""Aya 23 (arXiv 2405.15032): small models on made languages, vocabularies, and programs of full size.

The sweep asks what more languages cost, and what a base is worth. Eighteen runs for each seed, of less than a minute on one core
each; the number of seeds after a colon:

  espalier sweep --sweep launch/papers/aya23/experiment.py:5 --out runs/aya23/toy --workers 2

Vocabularies are trained on languages of unequal amounts of text: as they are, and in equal shares.
"""

import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections

from espalier.launch.papers.aya23 import fertility
from espalier.launch.papers.shared import domains, results, sweeps
from espalier.launch.precompile.table_rows import Row, mesh, tokens

CPU = "t5x_configs/experiments/aya23/cpu/"
COUNTS = (4, 8, 16)  # languages
WIDTHS = {"narrow": (32, 96), "wide": (96, 288)}  # width, and hidden width of the FFN
KV_HEADS = (4, 1)  # the base has 2 of 4
STEPS = 800
TUNING_STEPS = 200
REQUESTS = 2048  # instructions of each kind and pair of languages in the full mixture
BASE = "base"  # eight languages, width 64
SECOND = "wide"  # the width at which a base and a new model are compared as well


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    arms = {
        breadth(count, width): _on_languages(count, width) for width in WIDTHS for count in COUNTS
    }
    # As much text of each of these languages as the mixture of most languages has of it.
    part = STEPS * COUNTS[0] // COUNTS[-1]
    arms |= {
        little(width): _on_languages(COUNTS[0], width, TRAIN_STEPS=part, EVAL_PERIOD=part)
        for width in WIDTHS
    }
    arms[BASE] = _arm()
    arms["sequential"] = _arm("transformer.Block.layout='sequential'")
    # As many parameters as three matrices of 192.
    arms["gelu"] = _arm("MLP=@mlp.Mlp", "mlp.Mlp.activation='gelu'", HIDDEN=288)
    arms |= {heads(count): _arm(KV_HEADS=count) for count in KV_HEADS}
    arms["scratch"] = _tuned(REQUESTS)
    arms["tuned"] = _tuned(REQUESTS // 4, parent=BASE)
    arms["tuned_full"] = _tuned(REQUESTS, parent=BASE)
    arms[f"scratch_{SECOND}"] = _tuned(REQUESTS, width=SECOND)
    arms[f"tuned_{SECOND}"] = _tuned(REQUESTS // 4, breadth(8, SECOND), SECOND)
    evaluations = {"answers": {"call": "espalier.launch.papers.aya23.answers:exact"}}
    return sweeps.config(arms, seeds=seeds, evaluations=evaluations)


def breadth(count: int, width: str) -> str:
    """Returns the name of the arm that trains on so many languages at a width of WIDTHS."""
    return f"languages{count}_{width}"


def little(width: str) -> str:
    """Returns the name of the arm that has the fewest languages, and as little text of each as with the most."""
    return f"languages{COUNTS[0]}_{width}_little"


def heads(count: int) -> str:
    """Returns the name of the arm with so many heads of keys and values."""
    return f"kv{count}"


def _arm(*bindings: str, **macros: object) -> dict:
    settings = tuple(f"{name}={value!r}" for name, value in macros.items())
    return sweeps.arm(f"{CPU}toy.gin", bindings=(*settings, *bindings), evaluations=())


def _on_languages(count: int, width: str, **macros: object) -> dict:
    return _arm(MIXTURE_OR_TASK_NAME=f"toy_mix_{count}", **_size(width), **macros)


def _size(width: str) -> dict[str, int]:
    return dict(zip(("WIDTH", "HIDDEN"), WIDTHS[width], strict=True))


def _tuned(requests: int, parent: str | None = None, width: str | None = None) -> dict:
    """Returns an arm that is tuned on a mixture of this size, always for as many updates."""
    sizes = _size(width) if width else {}
    return sweeps.arm(
        f"{CPU}toy_instruct.gin",
        bindings=(
            f"TRAIN_STEPS={TUNING_STEPS}",
            f"REQUESTS={requests}",
            *(f"{name}={value}" for name, value in sizes.items()),
        ),
        evaluations=("answers",),
        parent=parent,
    )


LOSS = "loss"
ANSWERS, PLAIN = "loss of the answers", "loss of the answers without turns"
RIGHT = "right answers"
SCORES = (ANSWERS, PLAIN, RIGHT)  # of tuned models, each the mean of its kinds
KINDS = {"copy": "copies", "translate": "translations"}
TUNED = ("scratch", "tuned", "tuned_full", f"scratch_{SECOND}", f"tuned_{SECOND}")
_LABELS = {
    "base": "base: parallel, SwiGLU, 2 heads",
    "sequential": "sequential blocks",
    "gelu": "GELU",
    "kv4": "4 heads of keys and values",
    "kv1": "1 head of keys and values",
    "scratch": "new model, full mixture",
    "tuned": "base, a quarter of the mixture",
    "tuned_full": "base, full mixture",
    f"scratch_{SECOND}": f"new model, {SECOND}, full mixture",
    f"tuned_{SECOND}": f"base, {SECOND}, a quarter of the mixture",
}
# A model that has only learned which symbols may come at a place guesses among the words of a language, at about 3.5 nats a
# symbol; a perfect one knows the answers.
_UNTRAINED, _KNOWN = 3.5, 0.02


def part_of(score: str, kind: str) -> str:
    """Returns the name of the part of a score that is of one kind of instruction."""
    return f"{score}, {KINDS[kind]}"


class Runs(results.Results):
    """Runs as `experiment.run` returns them."""

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        """Returns the mean loss of the common languages; of tuned models what their answers are worth instead."""
        losses = row["held_out"]
        if row["arm"] not in TUNED:
            return {LOSS: _mean(losses.values())}
        right = (row.get("evaluations") or {}).get("answers") or {}
        out: dict[str, float | None] = {}
        for kind in KINDS:
            for score, start in ((ANSWERS, f"toy_{kind}_"), (PLAIN, f"toy_plain_{kind}_")):
                some = [loss for task, loss in losses.items() if task.startswith(start)]
                out[part_of(score, kind)] = _mean(some)
            out[part_of(RIGHT, kind)] = right.get(kind)
        return {score: _mean(out[part] for part in self.parts(score)) for score in SCORES} | out

    def parts(self, score: str) -> tuple[str, ...]:
        return tuple(part_of(score, kind) for kind in KINDS) if score in SCORES else ()

    def lower_is_better(self, score: str) -> bool:
        return not score.startswith(RIGHT)

    def digits(self, score: str) -> int:
        del score
        return 3

    def limits(self, score: str) -> tuple[float, float] | None:
        return (0.05, 0.98) if score.startswith(RIGHT) else (_KNOWN, _UNTRAINED)

    def degenerate(self, row: Mapping[str, Any]) -> str:
        loss = self.row_scores(row).get(LOSS)
        return "it has not learned" if loss is not None and not loss < _UNTRAINED else ""

    def label(self, arm: str) -> str:
        if arm.startswith("languages"):
            count, width, *few = arm.removeprefix("languages").split("_")
            return f"{count} languages, {width}" + (", a quarter of the text" if few else "")
        return _LABELS[arm]


def _mean(values: Iterable[float | None]) -> float | None:
    """Returns the mean; None without values, or where one is missing."""
    listed = list(values)
    some = [value for value in listed if value is not None]
    return sum(some) / len(some) if some and len(some) == len(listed) else None


# The runs of full size.

_FULL = "t5x_configs/experiments/aya23/full/"
_DATA = ("INITIAL_CHECKPOINT_PATH=run", "TOKENIZER=tokenizer", "INSTRUCTIONS_DIR=data")
_35B = ("t5x_configs/models/aya23_35b.gin", "t5x_configs/runs/pretrain.gin")


def _decoding(name: str, weights: str, *flags: str, **stated: Any) -> Row:
    return Row(
        name=name,
        title=f"35B, decoding, 128 rows of 128 tokens and as many new ones, {weights} weights",
        files=(*_35B, "t5x_configs/partitioning/tp.gin"),
        topology="v5e:2x4",
        bindings=(*tokens(128, 128), "config.TransformerConfig.param_dtype='bfloat16'"),
        flags=("--program=decode", *flags),
        **stated,
    )


ROWS = (
    Row(
        name="aya23_8b",
        title="8B, instruction tuning, the paper's batch",
        files=(f"{_FULL}8b.gin",),
        topology="v5e:16x16",
        bindings=_DATA,
    ),
    Row(
        name="aya23_35b",
        title="35B, instruction tuning, the paper's batch",
        files=(f"{_FULL}35b.gin",),
        topology="v5e:16x16",
        bindings=_DATA,
    ),
    Row(
        name="aya23_35b_fsdp",
        title="35B, rows of 2,048, without a tensor axis",
        files=_35B,
        topology="v5e:16x16",
        bindings=tokens(256, 2048),
        note="Every chip receives all weights three times: its links are busy longer than its matrix units.",
        hbm_gb=6.23,
        bounds_from="5.929 GB in docs/scale/precompile_report.md, and 5 %",
    ),
    Row(
        name="aya23_35b_tensor4",
        title="35B, rows of 2,048, a tensor axis of 4",
        files=_35B,
        topology="v5e:16x16",
        bindings=(*tokens(256, 2048), *mesh("fsdp_tp_sp", fsdp=64, tensor=4)),
        note="Weights, vocabulary and the residual stream's length are split over `tensor`.",
        sent_gb=200,
        bounds_from="two thirds of what is sent without a tensor axis, 303 GB in docs/scale/precompile_report.md",
    ),
    Row(
        name="aya23_35b_tensor4_v5p",
        title="35B, rows of 2,048, a tensor axis of 4 on v5p",
        files=_35B,
        topology="v5p:4x4x4",
        bindings=(*tokens(64, 2048), *mesh("fsdp_tp_sp", fsdp=16, tensor=4)),
    ),
    Row(
        name="aya23_35b_two_slices",
        title="35B, rows of 2,048, two slices",
        files=_35B,
        topology="2xv5e:16x16",
        bindings=(*tokens(512, 2048), *mesh("fsdp_tp_sp", data=2, fsdp=64, tensor=4)),
        note="Slices are copies (`data`), which exchange only gradients.",
        hbm_gb=6.06,
        bounds_from="5.77 GB when first compiled, and 5 %; a whole table of tokens on every chip would add 14 GB",
    ),
    Row(
        name="aya23_35b_lora",
        title="35B, LoRA of rank 16, instruction tuning",
        files=(f"{_FULL}35b.gin", "t5x_configs/methods/adapters/lora.gin"),
        topology="v5e:8x8",
        bindings=(*_DATA, *mesh("fsdp_tp_sp", fsdp=16, tensor=4)),
    ),
    _decoding(
        "aya23_35b_decode",
        "bfloat16",
        note="8.75 GB of weights and 5.35 GB of caches leave too little memory for a step; int8 weights are 4.65 GB.",
        fits=False,
    ),
    _decoding(
        "aya23_35b_decode_int8",
        "int8",
        "--weights_dtype=int8",
        hbm_gb=16.5,
        bounds_from="15.68 GB when first compiled, and 5 %",
    ),
)


# What is measured of the runs.

TITLE = "Aya 23, 2405.15032"
SEEDS = (5, 8, 12)
EARLIER = (
    "seeds 10 to 14, 70 runs: right answers judged what a base is worth, two bounds judged heads of keys and values, and "
    "bytes of caches and answers without turns were claims",
)
PARTS = {"toy": "made languages", "fertility": "vocabularies of real languages"}
SWEEPS = {"toy": "aya23/experiment:{seeds}"}
_KEYS = ("run", "arm", "seed", "parents", "step", "tokens", "seconds", "evaluations", "digest")


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep and the parities of vocabularies by seed, by part.

    Args:
      model_dir: parent of the sweep's folder and of other measurements.
      seeds: number of seeds.
      parts: of PARTS.
      **options: `workers`, `minutes` and `further` of `sweeps.rows`.
    """
    measured: dict[str, Any] = {}
    if "toy" in parts:
        measured |= sweeps.parts(
            model_dir, {"toy": ("aya23/experiment", seeds)}, with_losses, **options
        )
    if "fertility" in parts:
        stages = sweeps.Stages(pathlib.Path(model_dir, "measured"))
        measured["fertility"] = {}
        for seed in sweeps.seeds(seeds):
            stage = stages.get(
                f"fertility_{seed}",
                {**fertility.SETTINGS, "seed": seed},
                functools.partial(fertility.measure, seed),
            )
            measured["fertility"][str(seed)] = {**stage["result"], "seconds": stage["seconds"]}
    return measured


def with_losses(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what the page needs of a row: with 'held_out', its losses by task, and 'curve', [(step, mean loss)]."""
    curve: dict[int, list[float]] = {}
    for line in sweeps.metrics(directory):
        for key, value in line.items():
            if key.startswith("eval/") and key.endswith("/loss"):
                curve.setdefault(line["step"], []).append(value)
    return {
        **{key: row.get(key) for key in _KEYS},
        "held_out": domains.held_out({**row, "evaluations": {}}),
        "curve": [(step, sum(some) / len(some)) for step, some in sorted(curve.items())],
    }
