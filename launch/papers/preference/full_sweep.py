"""Preferences followed too far (arXiv 2410.11677) at full size: its two models, both rates, and all of its arms.

The folder of data after a colon has the models as run directories (`launch.convert`), each with its `tokenizer`, and
ultrafeedback/{train,test}.jsonl. Its 7B model is not public, so Command R7B stands for it. The paper names its six strengths
and weights in legends of figures alone; these are the specification's. To see the runs and their commands, which a cluster runs:

  python -m launch.sweep --sweep launch/papers/preference/full_sweep.py:/data --out /runs/preference --dry_run
"""

import itertools

import ml_collections

from launch.papers.preference import sweep
from launch.papers.shared import sweeps

FULL = "t5x_configs/experiments/preference/full/"
METHOD = "t5x_configs/methods/preference/"
MODELS = {"7b": "command_r7b", "35b": "command_r_35b"}
RATES = {"low": 5e-6, "high": 1e-5}
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of beta, tau and alpha
BESIDE_NLL = (0.01, 0.1, 1.0)  # beta and tau beside an NLL term
WEIGHTS = (0.1, 0.3, 1.0)  # of it; 0 is the arm without


def get_config(data: str) -> ml_collections.ConfigDict:
    arms = {}
    for model, name in MODELS.items():
        files = (f"t5x_configs/models/{name}.gin",)
        start = (f"INITIAL_CHECKPOINT_PATH='{data}/{name}'", f"TOKENIZER='{data}/{name}/tokenizer'")
        reward = f"{model}_reward"
        arms[reward] = sweeps.arm(
            *files, f"{FULL}pairs.gin", f"{METHOD}reward_model.gin", bindings=start
        )
        for (rate, value), (arm, (method, bindings)) in itertools.product(
            RATES.items(), methods().items()
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


def methods() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns arm -> (file of methods/preference, bindings); without a file it is DPO."""
    out = {sweep.arm("dpo", beta): ("", (f"BETA={beta}",)) for beta in STRENGTHS}
    out |= {sweep.arm("ipo", tau): ("ipo", (f"TAU={tau}",)) for tau in STRENGTHS}
    out |= {sweep.arm("hinge", alpha): ("slic", (f"ALPHA={alpha}",)) for alpha in STRENGTHS}
    for strength, weight in itertools.product(BESIDE_NLL, WEIGHTS):
        beside = (f"NLL_WEIGHT={weight}",)
        out[sweep.arm("dpo", strength, weight)] = ("dpo_nll", (f"BETA={strength}", *beside))
        terms = ("LOSSES=[@direct.ipo, @terms.nll]", f"LOSS_WEIGHTS=[1.0, {weight}]")
        out[sweep.arm("ipo", strength, weight)] = ("ipo", (f"TAU={strength}", *terms))
    # The paper has neither.
    out["simpo"] = ("simpo", ())
    out["sft_better"] = ("reference_free", ("LOSSES=[@terms.nll]",))
    return out
