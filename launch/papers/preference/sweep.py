"""Preferences followed too far (arXiv 2410.11677) by a small model of a language in which quality is known.

A model is trained, sampled twice for each prompt, and learns from a noisy judge's preferences with DPO, IPO and SLiC's
hinge of several strengths, and with an NLL term beside DPO. Beside them it learns by SimPO, by the likelihood of the better
completions alone, and from the reward of its own samples with online DPO, RLOO, GRPO and PPO; online methods judge no claim
and have one seed. A run is about a minute on one core; the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/preference/sweep.py:5 --out runs/preference/language --workers 2
"""

import ml_collections

from launch.papers.shared import sweeps

CPU = "t5x_configs/experiments/preference/cpu/"
# Strength of each method, from the one that moves furthest -> weights of an NLL term beside it.
DPO = {0.01: (0.0,), 0.1: (0.0, 0.1, 1.0), 1.0: (0.0,), 5.0: (0.0,), 50.0: (0.0, 1.0)}
IPO = {0.01: (0.0,), 0.1: (0.0,)}
HINGE = {0.0: (0.0,), 1.0: (0.0,)}  # weights of its regulariser
# Method of one strength that learns from the same pairs -> (losses, settings).
OTHERS = {
    "simpo": ("@reference_free.simpo", ("reference_free.simpo.gamma=1.0",)),
    "sft_better": ("@terms.nll", ()),
}
# Online method -> bindings, by which each learns from 25,600 completions at the rate of the others.
ONLINE = {
    "online_dpo": ("LEARNING_RATE=1e-3", "PROMPTS=64"),
    "rloo": (),
    "grpo": ("SAMPLES=4", "BATCH_SIZE=128"),
    "ppo": ("SAMPLES=4", "BATCH_SIZE=128", "TRAIN_STEPS=800", "INDICATORS_PERIOD=80"),
}
# Strengths of DPO -> their rate: at 1e-3, Adam's first updates move the policy as far as those of a weaker penalty do.
RATES = {50.0: "3e-4"}
# Arms whose entropy is to turn early, and the updates after which they are read beside every twentieth.
EARLY = {"dpo": (0.01, 0.1)}
ALSO_AT = tuple(step for step in range(5, 60, 5) if step % 20)


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    pairs = ("{python}", "-m", "launch.papers.preference.pairs", "--checkpoint={sft}")
    arms = {
        "sft": {"gin_files": (f"{CPU}sft.gin",)},
        "pairs": {"made": (*pairs, "--to={run}", "--seed={SEED}")},
    }
    for method, strengths in {"dpo": DPO, "ipo": IPO, "hinge": HINGE}.items():
        for strength, weights in strengths.items():
            for weight in weights:
                arms[arm(method, strength, weight)] = _learned(method, strength, weight)
    for method, (loss, settings) in OTHERS.items():
        arms[method] = _from(f"{CPU}preference.gin", bindings=(f"LOSSES=[{loss}]", *settings))
    for method, bindings in ONLINE.items():
        files = f"{CPU}online.gin", f"t5x_configs/methods/preference/{method}.gin"
        arms[method] = _from(*files, bindings=bindings) | {"seeds": sweeps.seeds(1)}
    return sweeps.config(arms, seeds=seeds)


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
    if method == "dpo" and strength in RATES:
        settings = [*settings, f"LEARNING_RATE={RATES[strength]}"]
    if not nll and strength in EARLY.get(method, ()):
        settings = [*settings, f"INDICATORS_ALSO_AT={ALSO_AT}"]
    bindings = (f"LOSSES=[{', '.join(losses)}]", f"LOSS_WEIGHTS={weights}", *settings)
    return _from(f"{CPU}preference.gin", bindings=bindings)


def _from(*gin_files: str, bindings: tuple[str, ...] = ()) -> dict:
    """Returns an arm that starts from the model and reads its pairs."""
    pairs = ("PAIRS='{pairs}/pairs.jsonl'", "PAIRS_VALIDATION='{pairs}/held_out.jsonl'")
    return sweeps.arm(*gin_files, parent="sft", bindings=(*pairs, *bindings))
