"""'To Code, or Not To Code?' at full size: every arm of the paper at 470M, the recipes at 2.8B too.

The folder of data after a colon is DATA_ROOT, with the tokenizer in its `tokenizer` and the evaluation sets in
its `eval`. After a comma comes the judge of win rates, as of launch.evaluate win_rate; without one there are none. The
prompts that it judges are 200 of Dolly's in `eval/dolly_200.jsonl`, rows {"prompt": "..."}. To see the runs and their
commands, which a cluster runs in the order of their parents:

  python -m launch.sweep --out /runs/code_mix --dry_run \\
    --sweep 'launch/papers/code_mix/full_sweep.py:/data,openai:https://host/v1,model=NAME,key_env=KEY'
"""

import ml_collections

from launch.papers.code_mix.measure import WIN_RATES
from launch.papers.shared import sweeps

ARMS = "t5x_configs/experiments/code_mix/full/"
# Recipe -> (file, what it starts from).
RECIPES = {
    "text_only": ("text_only", None),
    "balanced_only": ("balanced_only", None),
    "balanced_to_text": ("text_continued", "share_50"),
    "code_to_text": ("text_continued", "code_markup"),
}
# Arms whose answers are judged: recipes before and after their cooldown, and the one without code.
JUDGED = (
    *RECIPES,
    *(f"{recipe}_cooldown" for recipe in RECIPES),
    "balanced_to_text_cooldown_without_code",
)


def get_config(text: str) -> ml_collections.ConfigDict:
    data, _, judge = text.partition(",")
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
    if judge:
        arms |= _judged(data, judge)
    return sweeps.config(
        arms,
        bindings=sweeps.data_root(data, MBPP="/eval/mbpp.jsonl"),
        sizes={"470m": {}, "2p8b": {"gin_files": (f"{ARMS}size_2p8b.gin",)}},
        evaluations={
            "suite": _evaluate("harness", "--suite=code_mix", f"--data_dir={data}/eval"),
            "humaneval": _code("humaneval", "humaneval"),
            "mbpp": _code("mbpp", f"{data}/eval/mbpp.jsonl"),
        },
    )


def _arm(file: str, parent: str | None = None) -> dict:
    return sweeps.arm(f"{ARMS}{file}.gin", parent=parent)


def _judged(data: str, judge: str) -> dict[str, dict]:
    """Returns the arms that generate answers, and the one that judges them, at 470M."""
    prompts = (f"--inputs={data}/eval/dolly_200.jsonl", "--output={run}", "--max_new_tokens=256")
    answers = {
        f"answers_{arm}": ("launch.generate", f"--checkpoint={{{arm}}}", *prompts) for arm in JUDGED
    }
    systems = [f"{arm}={{answers_{arm}}}" for arm in JUDGED]
    judging = ("launch.evaluate", "win_rate", f"--judge={judge}", "--out={run}", "--systems")
    made = {**answers, WIN_RATES: (*judging, *systems)}
    return {name: {**sweeps.made(*words), "sizes": ("470m",)} for name, words in made.items()}


def _code(name: str, problems: str) -> dict:
    return _evaluate("code", f"--problems={problems}", f"--output={{run}}/{name}.jsonl")


def _evaluate(*words: str) -> dict:
    command, *flags = words
    shown = ("--checkpoint={run}", "--json={json}", *flags)
    return {"command": ("{python}", "-m", "launch.evaluate", command, *shown)}
