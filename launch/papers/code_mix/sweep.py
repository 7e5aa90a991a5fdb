"""What code in pre-training does for text, on generated text and code: all claims of code_mix.

Recipes, proportions, kinds of code and cooldowns share the runs they start from. 18 runs for each seed, of a minute
on a core or less for each 2.4 million tokens; the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/code_mix/sweep.py:5 --out runs/code_mix/skills --workers 2
"""

import ml_collections

from launch.papers.shared import sweeps

ARMS = "t5x_configs/experiments/code_mix/cpu/"
SHARES = (0, 25, 50, 75, 100)
KINDS = ("code_markup", "code_adjacent", "code_synth", "synth", "balanced_synth")
# Recipe -> what it starts from.
RECIPES = {
    "text_only": None,
    "balanced_only": None,
    "balanced_to_text": "share_50",
    "code_to_text": "code_markup",
}
# Arm -> (recipe, cooldown).
COOLDOWNS = {
    "text_only_cooldown": ("text_only", "with"),
    "balanced_to_text_cooldown": ("balanced_to_text", "with"),
    "balanced_to_text_cooldown_without_code": ("balanced_to_text", "without"),
}
# Arms that read as many tokens, earlier phases included, and are compared.
PHASES = (
    (*(f"share_{share}" for share in SHARES), *KINDS),
    (*RECIPES, "balanced_synth_to_text"),
    tuple(COOLDOWNS),
)
ANSWERS = "answers"  # the evaluation with the answers that are judged
JUDGED = (*PHASES[1], *PHASES[2])


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    parents = {**dict.fromkeys(PHASES[0]), **RECIPES, "balanced_synth_to_text": "balanced_synth"}
    files = {arm: (arm, parent) for arm, parent in parents.items()}
    files |= {arm: (f"cooldown_{code}_code", of) for arm, (of, code) in COOLDOWNS.items()}
    arms = {
        arm: sweeps.arm(f"{ARMS}{file}.gin", parent=parent, evaluations=_evaluations(arm))
        for arm, (file, parent) in sorted(files.items())
    }
    evaluations = {
        "skills": {"call": "launch.code_mix.skills:evaluate"},
        ANSWERS: {"call": "launch.code_mix.skills:answers"},
    }
    return sweeps.config(arms, seeds=seeds, evaluations=evaluations)


def _evaluations(arm: str) -> tuple[str, ...]:
    return ("skills", ANSWERS) if arm in JUDGED else ("skills",)
