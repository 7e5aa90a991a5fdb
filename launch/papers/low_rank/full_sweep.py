"""'Exploring Low Rank Training of Deep Neural Networks' (arXiv 2209.13569) at full size: its arms on text and on images.

GPT-2 on LM1B has three starts, three decays and two learning rates, beside dense models and warm starts; ResNet-50 has
two ranks, WRN-28-10 three. After a colon comes the folder in which TFDS has prepared all three data sets. To see the runs
and their commands, which a cluster runs in the order of their parents:

  python -m launch.sweep --sweep launch/papers/low_rank/full_sweep.py:/data/tfds --out /runs/low_rank --dry_run
"""

import itertools

import ml_collections

from launch.papers.low_rank.sweep import INITS
from launch.papers.shared import sweeps

ARMS = "t5x_configs/experiments/low_rank/full/"
DECAYS = ("none", "l2", "frobenius")
RATES = {"full": 1e-3, "half": 5e-4}
RANKS = {"resnet50": (0.3, 0.5), "wrn28_10": (0.1, 0.2, 0.3)}


def get_config(data: str) -> ml_collections.ConfigDict:
    text, images = (f"TFDS_DATA_DIR={data!r}",), (f"DATA_DIR={data!r}",)
    arms = {}
    for rate, value in RATES.items():
        of_rate = (*text, f"LEARNING_RATE={value}")
        arms[f"gpt2_dense_{rate}"] = _arm("gpt2_lm1b", *of_rate)
        for init, decay in itertools.product(INITS, DECAYS):
            factors = (f"FACTOR_INIT={init!r}", f"FACTOR_DECAY={decay!r}")
            arms[f"gpt2_{init}_{decay}_{rate}"] = _arm("gpt2_lm1b_low_rank", *of_rate, *factors)
    arms["gpt2_dense_start"] = _arm("gpt2_lm1b_dense_start", *text)
    for rate, value in RATES.items():
        scale = f"RATE_SCALE={value / RATES['full']}"
        arms[f"gpt2_warm_start_{rate}"] = _arm(
            "gpt2_lm1b_warm_start", *text, scale, parent="gpt2_dense_start"
        )
    for network, ranks in RANKS.items():
        arms[f"{network}_dense"] = _arm(f"{network}_dense", *images)
        for rank, init in itertools.product(ranks, INITS):
            arms[f"{network}_{init}_rank{round(100 * rank)}"] = _arm(
                network, *images, f"RANK={rank}", f"FACTOR_INIT={init!r}"
            )
    return sweeps.config(arms)


def _arm(file: str, *bindings: str, parent: str | None = None) -> dict:
    return sweeps.arm(f"{ARMS}{file}.gin", bindings=bindings, parent=parent)
