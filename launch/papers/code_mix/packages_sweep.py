"""The recipes of code_mix on the text and code of installed packages; the number of seeds after a colon.

python -m launch.sweep --sweep launch/papers/code_mix/packages_sweep.py:3 --out runs/code_mix/packages --workers 2
"""

import ml_collections

from launch.papers.shared import configs

ARMS = "t5x_configs/experiments/code_mix/"
RECIPES = {
    "text_only": "quickstart_text",
    "balanced_only": "quickstart_balanced",
    "balanced_to_text": "cpu/packages_balanced_to_text",
    "code_to_text": "cpu/packages_code_to_text",
}


def get_config(seeds: str = "3") -> ml_collections.ConfigDict:
    files = sorted(RECIPES.items())
    arms = {arm: configs.arm(f"{ARMS}{file}.gin") for arm, file in files}
    return configs.config(arms, seeds=seeds)
