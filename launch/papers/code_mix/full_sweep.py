"""'To Code, or Not To Code?' at full size: every arm of the paper at 470M, the recipes at 2.8B too.

The folder of data after a colon is DATA_ROOT, with the tokenizer in its `tokenizer` and the evaluation sets in
its `eval`. To see the runs and their commands, which a cluster runs in the order of their parents:

  python -m launch.sweep --sweep launch/papers/code_mix/full_sweep.py:/data --out /runs/code_mix --dry_run
"""

import ml_collections

from launch.papers.shared import configs

ARMS = "t5x_configs/experiments/code_mix/full/"
# Recipe -> (file, what it starts from).
RECIPES = {
    "text_only": ("text_only", None),
    "balanced_only": ("balanced_only", None),
    "balanced_to_text": ("text_continued", "share_50"),
    "code_to_text": ("text_continued", "code_markup"),
}


def get_config(data: str) -> ml_collections.ConfigDict:
    arms = {f"share_{share}": _arm(f"code_{share:03d}") for share in (0, 25, 50, 75, 90, 100)}
    arms |= {name: _arm(name) for name in ("code_markup", "code_adjacent", "code_synth")}
    arms["balanced_synth"] = _arm("balanced_synth")
    arms |= {name: _arm(*settings) for name, settings in RECIPES.items()}
    arms["balanced_synth_to_text"] = _arm("text_continued", "balanced_synth")
    arms |= {f"{recipe}_cooldown": _arm("cooldown", recipe) for recipe in RECIPES}
    arms["balanced_to_text_cooldown_without_code"] = _arm("cooldown_no_code", "balanced_to_text")
    both = {"share_50", "code_markup", *RECIPES}
    for name, arm in arms.items():
        arm["sizes"] = ("470m", "2p8b") if name in both else ("470m",)
    return configs.config(
        arms,
        bindings=configs.data_root(data, MBPP="/eval/mbpp.jsonl"),
        sizes={"470m": {}, "2p8b": {"gin_files": (f"{ARMS}size_2p8b.gin",)}},
        evaluations={
            "suite": _evaluate("harness", "--suite=code_mix", f"--data_dir={data}/eval"),
            "humaneval": _code("humaneval", "humaneval"),
            "mbpp": _code("mbpp", f"{data}/eval/mbpp.jsonl"),
        },
    )


def _arm(file: str, parent: str | None = None) -> dict:
    return configs.arm(f"{ARMS}{file}.gin", parent=parent)


def _code(name: str, problems: str) -> dict:
    return _evaluate("code", f"--problems={problems}", f"--output={{run}}/{name}.jsonl")


def _evaluate(*words: str) -> dict:
    command, *flags = words
    shown = ("--checkpoint={run}", "--json={json}", *flags)
    return {"command": ("{python}", "-m", "launch.evaluate", command, *shown)}
