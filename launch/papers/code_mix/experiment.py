"""What code in pre-training does for text (arXiv 2408.10914): the runs, on generated text and at full size, and what is measured.

Recipes, proportions and cooldowns share the runs they start from. 21 runs for each seed, of about a minute on a core for each
2.4 million tokens; the number of seeds after a colon, after `narrow,` that of the recipes at a quarter of the parameters, and after
`kinds,` that of five runs of text and kinds of code:

  espalier sweep --sweep launch/papers/code_mix/experiment.py:5 --out runs/code_mix/skills --workers 2
  espalier sweep --sweep launch/papers/code_mix/experiment.py:narrow,5 --out runs/code_mix/narrow --workers 2
  espalier sweep --sweep launch/papers/code_mix/experiment.py:kinds,5 --out runs/code_mix/kinds --workers 2

At full size every arm of the paper at 470M, the recipes at 2.8B too. After `full,` comes DATA_ROOT, a folder of data with the tokenizer
in its `tokenizer` and the evaluation sets in its `eval`, and after a comma the judge of win rates, as of espalier evaluate win_rate;
without one there are none. The prompts that it judges are 200 of Dolly's in `eval/dolly_200.jsonl`, rows {"prompt": "..."}. To see the
runs and their commands, which a cluster runs in the order of their parents:

  espalier sweep --out /runs/code_mix --dry_run \\
    --sweep 'launch/papers/code_mix/experiment.py:full,/data,openai:https://host/v1,model=NAME,key_env=KEY'
"""

import collections
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from espalier.launch.papers.shared import sweeps
from espalier.launch.precompile.table_rows import Row

ARMS = "t5x_configs/experiments/code_mix/cpu/"
SHARES = (0, 25, 50, 75, 100)
# Recipe -> what it starts from.
RECIPES = {
    "text_only": None,
    "balanced_only": None,
    "balanced_to_text": "share_50",
    "code_to_text": "code_markup",
}
STARTS = ("code_markup", "balanced_synth")  # with those of SHARES, whose runs they are
# Kinds of code, compared by runs of a quarter of a phase: after a whole one, four fifths of the code teach what all of it does.
KINDS = ("few_code", "few_markup", "few_adjacent", "few_synth")
# Kinds of code beside text: a model of code alone has read no problem in words. One half of the tokens is text, the other has the
# shares of KINDS. Text alone and text with web code are arms of SHARES, text with verified code is one of STARTS.
BESIDE_TEXT = ("share_0", "share_50", "balanced_markup", "balanced_adjacent", "balanced_synth")
# Seeds 20 to 24 of SHARES and STARTS had been seen when these were chosen, and 25 to 31 may run for claims of recipes.
BESIDE_TEXT_FIRST_SEED = 40
# Arm -> the recipe before it. The last steps: the rate falls linearly from the last rate of the recipe.
COOLDOWNS = {
    "text_only_cooldown": "text_only",
    "balanced_to_text_cooldown": "balanced_to_text",
    "balanced_to_text_cooldown_without_code": "balanced_to_text",
    # Half of the code is verified, a format that one of the two recipes has read.
    "balanced_to_text_cooldown_synth": "balanced_to_text",
    "balanced_synth_to_text_cooldown_synth": "balanced_synth_to_text",
}
_TEXT_WITH_CODE = {"skill_text": 0.9, "skill_web_code": 0.1}
_COOLDOWN_WITH_CODE = {"skill_text": 0.8, "skill_web_code": 0.2}
_COOLDOWN_WITH_SYNTH = {"skill_text": 0.8, "skill_web_code": 0.1, "skill_synth": 0.1}
_CODE_WITH_MARKUP = {"skill_web_code": 0.8, "skill_markup": 0.2}
# Arm -> shares of the sources.
READ = {
    "share_0": {"skill_text": 1.0},
    "share_25": {"skill_text": 0.75, "skill_web_code": 0.25},
    "share_50": {"skill_text": 0.5, "skill_web_code": 0.5},
    "share_75": {"skill_text": 0.25, "skill_web_code": 0.75},
    "share_100": {"skill_web_code": 1.0},
    "code_markup": _CODE_WITH_MARKUP,
    "balanced_synth": {"skill_text": 0.5, "skill_web_code": 0.45, "skill_synth": 0.05},
    "balanced_markup": {"skill_text": 0.5, "skill_web_code": 0.4, "skill_markup": 0.1},
    "balanced_adjacent": {"skill_text": 0.5, "skill_web_code": 0.425, "skill_adjacent": 0.075},
    # Web code alone; markup, questions with code, or verified traces in place of some of it.
    "few_code": {"skill_web_code": 1.0},
    "few_markup": _CODE_WITH_MARKUP,
    "few_adjacent": {"skill_web_code": 0.85, "skill_adjacent": 0.15},
    "few_synth": {"skill_web_code": 0.9, "skill_synth": 0.1},
    "text_only": {"skill_text": 1.0},
    "balanced_only": {"skill_text": 0.5, "skill_web_code": 0.5},
    "balanced_to_text": _TEXT_WITH_CODE,
    "code_to_text": _TEXT_WITH_CODE,
    "balanced_synth_to_text": {"skill_text": 0.9, "skill_web_code": 0.09, "skill_synth": 0.01},
    "text_only_cooldown": _COOLDOWN_WITH_CODE,
    "balanced_to_text_cooldown": _COOLDOWN_WITH_CODE,
    "balanced_to_text_cooldown_without_code": {"skill_text": 1.0},
    "balanced_to_text_cooldown_synth": _COOLDOWN_WITH_SYNTH,
    "balanced_synth_to_text_cooldown_synth": _COOLDOWN_WITH_SYNTH,
}
# Arms that read as many tokens, earlier phases included, and are compared.
PHASES = (
    (*(f"share_{share}" for share in SHARES), *STARTS),
    (*RECIPES, "balanced_synth_to_text"),
    tuple(COOLDOWNS),
    KINDS,
)
ANSWERS = "answers"  # the evaluation with the answers that are judged
JUDGED = (*PHASES[1], *PHASES[2])
# The second size: a quarter of the parameters, and the arms with which the paper compares its sizes.
NARROW = ("text_only", "balanced_only", "share_50", "balanced_to_text")
SIZES = {"w32": {"bindings": ("WIDTH=32", "MLP_WIDTH=96")}}


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    if data := sweeps.after("full", seeds):
        return _full_sweep(data)
    skills = {"skills": {"call": "espalier.launch.code_mix.skills:evaluate"}}
    if number := sweeps.after("narrow", seeds):
        arms = {arm: _arm(arm, RECIPES.get(arm), ("skills",)) for arm in NARROW}
        return sweeps.config(arms, seeds=number, sizes=SIZES, evaluations=skills)
    if number := sweeps.after("kinds", seeds):
        arms = {arm: _arm(arm, None, ("skills",)) for arm in BESIDE_TEXT}
        some = sweeps.seeds(number, first=BESIDE_TEXT_FIRST_SEED)
        return sweeps.config(arms, seeds=some, evaluations=skills)
    parents = {**RECIPES, "balanced_synth_to_text": "balanced_synth", **COOLDOWNS}
    arms = {
        arm: _arm(arm, parents.get(arm), ("skills", *([ANSWERS] if arm in JUDGED else [])))
        for arm in sorted({arm for arms in PHASES for arm in arms})
    }
    evaluations = {**skills, ANSWERS: {"call": "espalier.launch.code_mix.skills:answers"}}
    return sweeps.config(arms, seeds=seeds, evaluations=evaluations)


def _arm(name: str, parent: str | None, evaluations: tuple[str, ...]) -> dict:
    file = "cooldown" if name in COOLDOWNS else "continued" if parent else "base"
    tokens = "4.8e6" if name in RECIPES and not parent else "0.6e6" if name in KINDS else None
    budget = (f"TRAIN_TOKENS={tokens}",) if tokens else ()
    bindings = (*budget, f"stream.make_stream.phases=((0, {READ[name]!r}),)")
    return sweeps.arm(
        f"{ARMS}{file}.gin", bindings=bindings, parent=parent, evaluations=evaluations
    )


# The runs of full size.

_FULL = "t5x_configs/experiments/code_mix/full/"
FULL_RECIPES = ("text_only", "balanced_only", "balanced_to_text", "code_to_text")
# Arm of the studies of proportion and quality, 200B tokens -> shares of the sources.
FULL_READ = {
    **{
        f"share_{code}": {"text": round(1 - code / 100, 2), "web_code": code / 100}
        for code in (0, 25, 50, 75, 90, 100)
    },
    "code_markup": {"web_code": 0.8, "markup": 0.2, "text": 0.0},
    # Code-adjacent text of three kinds.
    "code_adjacent": {
        **{"web_code": 0.85, "commits": 0.05, "notebooks": 0.05},
        **{"stackexchange": 0.05, "text": 0.0},
    },
    # Verified synthetic code. The paper's set has 3.2B tokens, which 20B of them read 6.3 times: see epochs/synth in the metrics.
    "code_synth": {"web_code": 0.9, "synth": 0.1, "text": 0.0},
    "balanced_synth": {"text": 0.5, "web_code": 0.45, "synth": 0.05},
}
# The share of code is distributed over the other sources in proportion.
COOLDOWN_WITHOUT_CODE = {
    **{"hq_text": 0.5, "math": 0.25, "instruct": 0.25},
    **{"text": 0.0, "web_code": 0.0},
}
# Arms whose answers are judged: recipes before and after their cooldown, and the one without code.
FULL_JUDGED = (
    *FULL_RECIPES,
    *(f"{recipe}_cooldown" for recipe in FULL_RECIPES),
    "balanced_to_text_cooldown_without_code",
)


def _full_sweep(text: str) -> ml_collections.ConfigDict:
    data, _, judge = text.partition(",")
    arms = {name: _full_arm("base", shares=shares) for name, shares in FULL_READ.items()}
    arms["text_only"] = _full_arm("text_only")
    arms["balanced_only"] = _full_arm("text_only", shares=FULL_READ["share_50"])
    arms["balanced_to_text"] = _full_arm("text_continued", "share_50")
    arms["code_to_text"] = _full_arm("text_continued", "code_markup")
    arms["balanced_synth_to_text"] = _full_arm("text_continued", "balanced_synth")
    arms |= {f"{recipe}_cooldown": _full_arm("cooldown", recipe) for recipe in FULL_RECIPES}
    arms["balanced_to_text_cooldown_without_code"] = _full_arm(
        "cooldown", "balanced_to_text", COOLDOWN_WITHOUT_CODE
    )
    both = {"share_50", "code_markup", *FULL_RECIPES}
    for name, arm in arms.items():
        arm["sizes"] = ("470m", "2p8b") if name in both else ("470m",)
    if judge:
        arms |= _judged(data, judge)
    return sweeps.config(
        arms,
        bindings=sweeps.data_root(data, MBPP="/eval/mbpp.jsonl"),
        sizes={"470m": {}, "2p8b": {"gin_files": (f"{_FULL}size_2p8b.gin",)}},
        evaluations={
            "suite": _evaluate("harness", "--suite=code_mix", f"--data_dir={data}/eval"),
            "humaneval": _code("humaneval", "humaneval"),
            "mbpp": _code("mbpp", f"{data}/eval/mbpp.jsonl"),
        },
    )


def _full_arm(
    file: str, parent: str | None = None, shares: Mapping[str, float] | None = None
) -> dict:
    bindings = None if shares is None else (f"SHARES={shares!r}",)
    return sweeps.arm(f"{_FULL}{file}.gin", parent=parent, bindings=bindings)


def _judged(data: str, judge: str) -> dict[str, dict]:
    """Returns the arms that generate answers, and the one that judges them, at 470M."""
    prompts = (f"--inputs={data}/eval/dolly_200.jsonl", "--output={run}", "--max_new_tokens=256")
    answers = {
        f"answers_{arm}": ("espalier.launch.generate", f"--checkpoint={{{arm}}}", *prompts)
        for arm in FULL_JUDGED
    }
    systems = [f"{arm}={{answers_{arm}}}" for arm in FULL_JUDGED]
    judging = (
        "espalier.launch.evaluate",
        "win_rate",
        f"--judge={judge}",
        "--out={run}",
        "--systems",
    )
    made = {**answers, WIN_RATES: (*judging, *systems)}
    return {name: {**sweeps.made(*words), "sizes": ("470m",)} for name, words in made.items()}


def _code(name: str, problems: str) -> dict:
    return _evaluate("code", f"--problems={problems}", f"--output={{run}}/{name}.jsonl")


def _evaluate(*words: str) -> dict:
    command, *flags = words
    shown = ("--checkpoint={run}", "--json={json}", *flags)
    return {"command": ("{python}", "-m", "espalier.launch.evaluate", command, *shown)}


_DATA = ("DATA_ROOT=data", "TOKENIZER=tokenizer", "MBPP=mbpp.jsonl")

ROWS = (
    Row(
        name="code_mix_470m",
        title="470M, pre-training, the paper's recipe",
        files=(f"{_FULL}text_only.gin",),
        topology="v5e:16x16",
        bindings=_DATA,
        hbm_gb=2.90,
        bounds_from="2.760 GB in docs/scale/precompile_report.md, and 5 %",
    ),
    Row(
        name="code_mix_2p8b",
        title="2.8B, pre-training, the paper's recipe",
        files=(f"{_FULL}text_only.gin", f"{_FULL}size_2p8b.gin"),
        topology="v5e:16x16",
        bindings=_DATA,
        hbm_gb=5.36,
        bounds_from="5.098 GB in docs/scale/precompile_report.md, and 5 %",
    ),
)


# What is measured of the runs.

TITLE = "To Code, or Not To Code?, 2408.10914"
SEEDS = (5, 8, 12)
EARLIER = (
    "seeds 10 to 14: code was judged by exact match, which was at its ceiling in all arms with code, kinds of code by whole phases, "
    "answers by the words of their steps, and half of the code of a cooldown was in a format that its recipe had not read",
)
WIN_RATES, PROMPTS = (
    "win_rates",
    "prompts",
)  # the full-size sweep's arm with win rates, and what it is asked
PARTS = {
    "skills": "generated text and code",
    "narrow": "the same at a quarter of the parameters",
    "kinds": "kinds of code beside text",
}
SWEEPS = {
    "skills": "code_mix/experiment:{seeds}",
    "narrow": "code_mix/experiment:narrow,{seeds}",
    "kinds": "code_mix/experiment:kinds,{seeds}",
}
_KEYS = (
    *("run", "arm", "size", "seed", "parents", "step", "tokens", "loss_tokens", "seconds"),
    *("epochs_total", "held_out", "evaluations", "digest"),
)


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweeps, by part.

    Args:
      model_dir: parent of the sweeps' folders.
      seeds: of the sweeps.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
    """
    named = {part: SWEEPS[part].format(seeds=seeds).partition(":") for part in parts}
    files = {part: (name, argument) for part, (name, _, argument) in named.items()}
    measured = sweeps.parts(model_dir, files, with_data, **options)
    folder = pathlib.Path(model_dir, "judged")
    return {part: with_judgements(rows, folder / part) for part, rows in measured.items()}


def read(sweep: str, judged: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the rows of any sweep with the paper's arms.

    Args:
      sweep: its folder.
      judged: folder of the judgements of answers to `data.code_mix.skills.instructions`. At full size the arm
        `win_rates` has judged.
    """
    from espalier.launch.papers.code_mix.judged import by_arm
    from espalier.launch.sweep.folder import read_results

    places = [(row, pathlib.Path(sweep, row["directory"])) for row in read_results(sweep)]
    rows = [with_data(row, place) for row, place in places if not row["made"]]
    rows = with_judgements(rows, judged)
    for made, place in places:
        if made["arm"] == WIN_RATES:
            shares = by_arm(json.loads((place / "summary.json").read_bytes()))
            for row in rows:
                if (row["seed"], row["size"]) == (made["seed"], made["size"]):
                    others = shares.get(row["arm"], {}).items()
                    row["judged"] = {other: {PROMPTS: one} for other, one in others}
    return rows


def with_data(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what reports need of a row of results, with the data and the schedule of its run.

    Adds 'parameters', their number, 'asked' and 'read', the shares of its tokens by source as configured and as read, and
    'learning_rates', [(step, rate)].
    """
    row = {key: row.get(key) for key in _KEYS} | {"epochs": row["epochs"]}
    said = json.loads((directory / "run.json").read_text())
    data = said["data"]
    starts = [phase["first_step"] for phase in data["phases"]] + [row["step"]]
    asked: dict[str, float] = collections.Counter()
    for phase, (first, last) in zip(data["phases"], itertools.pairwise(starts), strict=True):
        for source, share in phase["token_shares"].items():
            asked[source] += (last - first) * phase["tokens_per_step"] * share
    sources = data["sources"]
    read = {source: epochs * sources[source]["tokens"] for source, epochs in row["epochs"].items()}
    lines = (line for line in sweeps.metrics(directory) if "learning_rate" in line)
    return {
        **row,
        "parameters": said["parameters"],
        "asked": _shares(asked),
        "read": _shares(read),
        "learning_rates": [(line["step"], line["learning_rate"]) for line in lines],
    }


def _shares(tokens: Mapping[str, float]) -> dict[str, float]:
    total = sum(tokens.values())
    return {source: value / total for source, value in tokens.items()}


def with_judgements(
    rows: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> list[dict[str, Any]]:
    """Returns the rows with the number of their answers.

    Adds 'right': what is asked for -> the share of right answers, and 'judged': other arm -> what is asked for -> the
    shares won, tied and lost.
    """
    from espalier.launch.papers.code_mix import judged

    answers: dict[int, dict[str, Sequence[str]]] = collections.defaultdict(dict)
    for row in rows:
        if ANSWERS in row["evaluations"]:
            answers[row["seed"]][row["arm"]] = row["evaluations"][ANSWERS]
    shares = {
        seed: judged.compared(by_arm, folder / f"seed{seed}")
        for seed, by_arm in answers.items()
        if len(by_arm) > 1
    }
    out = []
    for row in rows:
        evaluations, right = dict(row["evaluations"]), {}
        if ANSWERS in evaluations:
            right = judged.right(evaluations[ANSWERS])
            evaluations[ANSWERS] = len(evaluations[ANSWERS])
        wins = shares.get(row["seed"], {}).get(row["arm"], {})
        out.append({**row, "evaluations": evaluations, "right": right, "judged": wins})
    return out
