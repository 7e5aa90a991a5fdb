"""What code in pre-training does for text, on generated text and code: all claims of code_mix.

Recipes, proportions, kinds of code and cooldowns share the runs they start from; three arms are of other
widths too. 27 runs for each seed, the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/code_mix/sweep.py:3 --out runs/code_mix/skills --workers 2
"""

import ml_collections

from launch.papers.shared import configs

ARMS = "t5x_configs/experiments/code_mix/cpu/"
SHARES = (0, 25, 50, 75, 90, 100)
# Recipe -> what it starts from.
RECIPES = {
    "text_only": None,
    "balanced_only": None,
    "balanced_to_text": "share_50",
    "code_to_text": "code_markup",
}
WIDTHS = (48, 64, 96)


def get_config(seeds: str = "3") -> ml_collections.ConfigDict:
    arms = {f"share_{share}": {} for share in SHARES}
    arms |= {name: {} for name in ("code_markup", "code_adjacent", "code_synth", "synth")}
    arms["balanced_synth"] = {}
    arms |= {name: {"parent": parent} for name, parent in RECIPES.items() if parent}
    arms |= {name: {} for name, parent in RECIPES.items() if not parent}
    arms["balanced_synth_to_text"] = {"parent": "balanced_synth"}
    for arm, settings in arms.items():
        settings["gin_files"] = (f"{ARMS}{arm}.gin",)
    for recipe in RECIPES:
        arms[f"{recipe}_cooldown"] = _cooldown(recipe, "with")
    arms["balanced_to_text_cooldown_without_code"] = _cooldown("balanced_to_text", "without")
    scaled = ("share_50", "balanced_only", "balanced_to_text")
    for arm, settings in arms.items():
        settings["sizes"] = tuple(f"width{w}" for w in WIDTHS if w == 64 or arm in scaled)
    sizes = {f"width{w}": {"bindings": (f"WIDTH={w}", f"MLP_WIDTH={3 * w}")} for w in WIDTHS}
    skills = {"call": "launch.evaluation.skills:evaluate"}
    arms = dict(sorted(arms.items()))
    return configs.config(arms, seeds=seeds, sizes=sizes, evaluations={"skills": skills})


def _cooldown(parent: str, code: str) -> dict:
    return {"parent": parent, "gin_files": (f"{ARMS}cooldown_{code}_code.gin",)}
