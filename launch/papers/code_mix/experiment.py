"""What code in pre-training does for text (arXiv 2408.10914): the runs, on generated text and at full size, and what is measured.

Recipes, proportions, kinds of code and cooldowns share the runs they start from. 18 runs for each seed, of a minute
on a core or less for each 2.4 million tokens; the number of seeds after a colon:

  espalier sweep --sweep launch/papers/code_mix/experiment.py:5 --out runs/code_mix/skills --workers 2

At full size every arm of the paper at 470M, the recipes at 2.8B too. After `full,` comes DATA_ROOT, a folder of data with the tokenizer
in its `tokenizer` and the evaluation sets in its `eval`, and after a comma the judge of win rates, as of launch.evaluate win_rate;
without one there are none. The prompts that it judges are 200 of Dolly's in `eval/dolly_200.jsonl`, rows {"prompt": "..."}. To see the
runs and their commands, which a cluster runs in the order of their parents:

  espalier sweep --out /runs/code_mix --dry_run \\
    --sweep 'launch/papers/code_mix/experiment.py:full,/data,openai:https://host/v1,model=NAME,key_env=KEY'
"""

import collections
import functools
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import pandas as pd

from espalier.data.code_mix.skills import RARE
from espalier.launch.evaluate.suites import scores as suite_scores
from espalier.launch.papers.code_mix.suite import SUITE
from espalier.launch.papers.shared import results, sweeps
from espalier.launch.precompile.table_rows import Row

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
# Arm -> the recipe before it. The last steps: the rate falls linearly from the last rate of the recipe.
COOLDOWNS = {
    "text_only_cooldown": "text_only",
    "balanced_to_text_cooldown": "balanced_to_text",
    "balanced_to_text_cooldown_without_code": "balanced_to_text",
}
_TEXT_WITH_CODE = {"skill_text": 0.9, "skill_web_code": 0.1}
_COOLDOWN_WITH_CODE = {"skill_text": 0.8, "skill_web_code": 0.1, "skill_synth": 0.1}
# Arm -> shares of the sources.
READ = {
    "share_0": {"skill_text": 1.0},
    "share_25": {"skill_text": 0.75, "skill_web_code": 0.25},
    "share_50": {"skill_text": 0.5, "skill_web_code": 0.5},
    "share_75": {"skill_text": 0.25, "skill_web_code": 0.75},
    "share_100": {"skill_web_code": 1.0},
    # Kinds of code beside or in place of web code: markup, questions with code, and verified traces.
    "code_markup": {"skill_web_code": 0.8, "skill_markup": 0.2},
    "code_adjacent": {"skill_web_code": 0.85, "skill_adjacent": 0.15},
    "code_synth": {"skill_web_code": 0.9, "skill_synth": 0.1},
    "synth": {"skill_synth": 1.0},
    "balanced_synth": {"skill_text": 0.5, "skill_web_code": 0.45, "skill_synth": 0.05},
    "text_only": {"skill_text": 1.0},
    "balanced_only": {"skill_text": 0.5, "skill_web_code": 0.5},
    "balanced_to_text": _TEXT_WITH_CODE,
    "code_to_text": _TEXT_WITH_CODE,
    "balanced_synth_to_text": {"skill_text": 0.9, "skill_web_code": 0.09, "skill_synth": 0.01},
    "text_only_cooldown": _COOLDOWN_WITH_CODE,
    "balanced_to_text_cooldown": _COOLDOWN_WITH_CODE,
    "balanced_to_text_cooldown_without_code": {"skill_text": 1.0},
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
    if data := sweeps.after("full", seeds):
        return _full_sweep(data)
    parents = {**dict.fromkeys(PHASES[0]), **RECIPES, "balanced_synth_to_text": "balanced_synth"}
    arms = {arm: _arm(arm, parent) for arm, parent in sorted((parents | COOLDOWNS).items())}
    evaluations = {
        "skills": {"call": "espalier.launch.code_mix.skills:evaluate"},
        ANSWERS: {"call": "espalier.launch.code_mix.skills:answers"},
    }
    return sweeps.config(arms, seeds=seeds, evaluations=evaluations)


def _arm(name: str, parent: str | None) -> dict:
    file = "cooldown" if name in COOLDOWNS else "continued" if parent else "base"
    both_phases = ("TRAIN_TOKENS=4.8e6",) if name in RECIPES and not parent else ()
    bindings = (*both_phases, f"stream.make_stream.phases=((0, {READ[name]!r}),)")
    evaluations = ("skills", ANSWERS) if name in JUDGED else ("skills",)
    return sweeps.arm(
        f"{ARMS}{file}.gin", bindings=bindings, parent=parent, evaluations=evaluations
    )


GROUPS = ("reasoning", "knowledge", "code")
PLAIN = "code without rare cases"
PLACES = {"skills": "generated text"}
_LEARNED = 0.02  # of exact match: a model without any skill above it has learned nothing


class Results(results.Results):
    """Runs of a part, as `experiment.run` returns them.

    A score is exact match of a group, bits per byte of a task, or the wins over another arm in judged answers.
    """

    @property
    def main(self) -> str | None:
        """The size at which arms are compared: the first."""
        return next(iter(self.sizes), None)

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        bits = {task: values.get("bits_per_byte") for task, values in row["held_out"].items()}
        judged = row.get("judged", {})
        won = {wins(arm): one["win"] - one["loss"] for arm, one in judged.items()}
        itself = {wins(row["arm"]): 0.0} if judged else {}
        return {**bits, **won, **itself, **_by_group(row["evaluations"])}

    def lower_is_better(self, score: str) -> bool:
        return score in self.domains

    def limits(self, score: str) -> tuple[float, float] | None:
        return (0.0, 1.0) if score in GROUPS else None

    def degenerate(self, row: Mapping[str, Any]) -> str:
        scores = [value for value in _by_group(row["evaluations"]).values() if value is not None]
        return "it has learned no skill" if scores and max(scores) <= _LEARNED else ""

    def digits(self, score: str) -> int:
        return 3

    def label(self, arm: str) -> str:
        return arm_name(arm)

    def scores(self, arm: str, score: str, size: str | None = None) -> pd.Series:
        """Returns a score by seed.

        Raises:
          ValueError: a run lacks a benchmark of the group.
        """
        scores = super().scores(arm, score, size)
        rows = self.find(arm, size) if score in GROUPS else {}
        if lacking := set(rows) - set(scores.index):
            run = rows[min(lacking)]["run"]
            raise ValueError(f"run {run} has no score of {score}: some benchmark of it is missing.")
        return scores

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """The groups of benchmarks that every run has a score of."""
        return tuple(group for group in GROUPS if self.rows and self.table[group].notna().all())

    @functools.cached_property
    def domains(self) -> tuple[str, ...]:
        """The held-out tasks that every run has the bits per byte of."""
        tasks = self.rows[0]["held_out"] if self.rows else ()
        return tuple(task for task in tasks if self.table[task].notna().all())

    @functools.cached_property
    def sizes(self) -> tuple[str, ...]:
        """In the order of the sweep."""
        return tuple(dict.fromkeys(row["size"] for row in self.rows if row["size"] is not None))


def _by_group(evaluations: Mapping[str, Any]) -> Mapping[str, float | None]:
    """Returns exact match of skills, or means of the groups' benchmarks; None where some are missing."""
    if "skills" in evaluations:
        scored = evaluations["skills"]
        plain = [exact for kind, exact in scored["code"]["by_kind"].items() if RARE not in kind]
        exact = {group: float(scored[group]["exact"]) for group in GROUPS}
        return {**exact, PLAIN: sum(plain) / len(plain)}
    scores: dict[str, float] = {}
    for values in (one for one in evaluations.values() if isinstance(one, Mapping)):
        scores |= {name: one["score"] for name, one in values.get("benchmarks", {}).items()}
        if "pass_at_k" in values:
            scores[values["problems"]] = values["pass_at_k"]["1"]
    return dict(suite_scores.means(SUITE, scores)[0])


def wins(arm: str) -> str:
    """Returns the score that is the share of judged prompts won against an arm, less the share lost."""
    return f"wins over {arm_name(arm)}"


def arm_name(name: str) -> str:
    """Returns the name of an arm in the report."""
    return name.replace("_to_", " → ").replace("_", " ")


def source_name(task: str) -> str:
    """Returns the name of a source in the report."""
    return task.removeprefix("skill_").replace("_", " ")


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
        bounds_from="2.760 GB in docs/precompile.md, and 5 %",
    ),
    Row(
        name="code_mix_2p8b",
        title="2.8B, pre-training, the paper's recipe",
        files=(f"{_FULL}text_only.gin", f"{_FULL}size_2p8b.gin"),
        topology="v5e:16x16",
        bindings=_DATA,
        hbm_gb=5.36,
        bounds_from="5.098 GB in docs/precompile.md, and 5 %",
    ),
)


# What is measured of the runs.

TITLE = "To Code, or Not To Code?, 2408.10914"
SEEDS = 5
WIN_RATES = "win_rates"  # the full-size sweep's arm with win rates
PARTS = {"skills": "generated text and code"}
_KEYS = (
    *("run", "arm", "size", "seed", "parents", "step", "tokens", "loss_tokens", "seconds"),
    *("epochs_total", "held_out", "evaluations", "digest"),
)


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep, by part.

    Args:
      model_dir: parent of the sweep's folder.
      seeds: of the sweep.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
    """
    files = {part: ("code_mix/experiment", seeds) for part in parts}
    measured = sweeps.parts(model_dir, files, with_data, **options)
    folder = pathlib.Path(model_dir, "judged")
    return {part: with_judgements(rows, folder) for part, rows in measured.items()}


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
                    row["judged"] = shares.get(row["arm"], {})
    return rows


def with_data(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what reports need of a row of results, with the data and the schedule of its run.

    Adds 'asked' and 'read', the shares of its tokens by source as configured and as read, and
    'learning_rates', [(step, rate)].
    """
    row = {key: row.get(key) for key in _KEYS} | {"epochs": row["epochs"]}
    data = json.loads((directory / "run.json").read_text())["data"]
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
    """Returns the rows with the number of their answers, and 'judged': other arm -> shares of won, tied and lost ones.

    Adds 'loss_tokens_total', which includes those of all `parents`.
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
    tokens = {row["run"]: row["loss_tokens"] or 0 for row in rows}
    out = []
    for row in rows:
        evaluations = dict(row["evaluations"])
        if ANSWERS in evaluations:
            evaluations[ANSWERS] = len(evaluations[ANSWERS])
        line = (row["run"], *row["parents"])
        out.append(
            {
                **row,
                "evaluations": evaluations,
                "judged": shares.get(row["seed"], {}).get(row["arm"], {}),
                "loss_tokens_total": sum(tokens[name] for name in line if name in tokens),
            }
        )
    return out
