"""The whole of Aya Expanse (arXiv 2412.04261) in small, and programs of full size: the runs, and what is measured of them.

Seven languages in three clusters, on words of installed packages. A base; a teacher of each cluster; students of what each routing
keeps of their answers; experts of the clusters, which part from the joint model halfway, merged; leaving models out of a merge of
six, one of them harmful; polish; offline and online preference training. The number of seeds after a colon:

  espalier sweep --sweep launch/papers/aya_expanse/experiment.py:5 --out runs/aya_expanse/small --workers 2
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from espalier.launch.papers.aya_expanse import lexicon, small_pool, small_stage
from espalier.launch.papers.aya_expanse.small_pool import PAIR_LANGUAGES
from espalier.launch.papers.shared import sweeps
from espalier.launch.precompile.table_rows import Row, mesh

GIN = "t5x_configs/experiments/aya_expanse/"
CPU = f"{GIN}cpu/"
STAGE = "espalier.launch.papers.aya_expanse.small_stage"
CLUSTERS = tuple(lexicon.FAMILIES)
ROUTINGS = ("single", "random", "fixed", "reward", "learned", "translated")
TEACHER_STEPS, STUDENT_STEPS = 500, 350
# The joint model's updates until experts part from it: merged from the base on, they were no model (score 0.10).
SHARED_STEPS = STUDENT_STEPS // 2
# A cluster has three of the seven languages, so that its expert reads its data as often as the joint model.
EXPERT_STEPS = round((STUDENT_STEPS - SHARED_STEPS) * 3 / 7)
OFFLINE_STEPS, ONLINE_STEPS = 60, 40
CLUSTER_ONLINE_STEPS = round(ONLINE_STEPS * 3 / 7)
ROUNDS, ONLINE_ONLY_ROUNDS = 3, 4
RATE = 2e-3  # of supervised stages
ROOM_RATE = 1e-3  # of offline preference training that starts halfway
POLISH_STEPS, LOW = 50, 0.1  # updates after the merge, and the share of the rate
POLISHED = CLUSTERS[-1]  # the cluster of whose data a polish reads a tenth
# The six of the search: experts, the joint model, a harmful one, and a copy of the first.
SIX = (
    *(f"expert_{name}" for name in CLUSTERS),
    "student_reward",
    "harmful",
    f"expert_{CLUSTERS[0]}",
)
HARMFUL = SIX.index("harmful")
SINGLE, OPPONENT = "student_single", "student_random"  # models that win rates are against
EVALUATED = ("answers",)


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    arms: dict[str, dict] = {
        "requests": _stage("requests", "--seed={SEED}"),
        "base": sweeps.arm(f"{CPU}base.gin", evaluations=()),
    }
    for name in CLUSTERS:
        data = f"{{requests}}/teacher_{name}.jsonl"
        arms[f"teacher_{name}"] = _sft(data, TEACHER_STEPS, evaluations=())
    teachers = [f"{{teacher_{name}}}" for name in CLUSTERS]
    pool = ("--requests={requests}", "--seed={SEED}", "--runs", *teachers)
    arms["pool"] = _stage("pool", *pool)
    for name in ROUTINGS:
        arms[f"student_{name}"] = _sft(f"{{pool}}/sft_{name}.jsonl", STUDENT_STEPS)
    arms |= _merges()
    arms |= _polishes()
    arms |= _preferences()
    answers = {"call": "espalier.launch.papers.aya_expanse.small_answers:score"}
    return sweeps.config(arms, seeds=seeds, evaluations={"answers": answers})


def _merges() -> dict[str, dict]:
    """Returns the arms of the experts and their merges, and of a merge of six models of which one is left out."""
    arms = {"shared": _sft("{pool}/sft_reward.jsonl", SHARED_STEPS)}
    for name in CLUSTERS:
        data = f"{{pool}}/sft_reward_{name}.jsonl"
        arms[f"expert_{name}"] = _sft(data, EXPERT_STEPS, parent="shared")
    experts = [f"expert_{name}" for name in CLUSTERS]
    arms["merged_mean"] = _merge(experts)
    for arm, method in {
        "merged": "linear",
        "merged_sphere": "multislerp",
        "merged_ties": "ties",
    }.items():
        arms[arm] = _strength(method, experts, "shared")
    arms["harmful"] = _sft("{pool}/sft_harmful.jsonl", EXPERT_STEPS, parent="shared")
    six = [f"{{{arm}}}" for arm in SIX]
    return {
        **arms,
        "search": _stage("search", "--requests={requests}", "--seed={SEED}", "--runs", *six),
    }


def _polishes() -> dict[str, dict]:
    """Returns the arms of polishes of the merge: on all data, and on a tenth of that of one cluster at two rates."""
    low = f"LEARNING_RATE={RATE * LOW!r}"
    tenth = f"{{pool}}/sft_tenth_{POLISHED}.jsonl"
    return {
        "polish": _sft("{pool}/sft_reward.jsonl", POLISH_STEPS, low, parent="merged"),
        "cluster_low": _sft(tenth, POLISH_STEPS, low, parent="merged"),
        "cluster_full": _sft(tenth, POLISH_STEPS, parent="merged"),
    }


def _preferences() -> dict[str, dict]:
    """Returns the arms of preference training, which starts where there is room: from the joint student, halfway."""
    pairs, prompts = "{pool}/pairs.jsonl", "{requests}/online.jsonl"
    rate = f"LEARNING_RATE={ROOM_RATE}"
    arms = {"offline": _offline(pairs, OFFLINE_STEPS, rate, parent="shared")}
    as_many = OFFLINE_STEPS + ROUNDS * ONLINE_STEPS  # as offline, then all rounds
    arms["offline_long"] = _offline(pairs, as_many, rate, parent="shared")
    for number in PAIR_LANGUAGES:
        some = f"{{pool}}/pairs_{number}.jsonl"
        arms[f"offline_languages{number}"] = _offline(some, OFFLINE_STEPS, rate, parent="shared")
    native = "{pool}/pairs_native.jsonl"
    arms["native"] = _offline(native, OFFLINE_STEPS, parent="student_translated")
    before = "offline"
    for number in range(1, ROUNDS + 1):
        asked = EVALUATED if number == ROUNDS else ()
        arm = f"round{number}"
        arms[arm] = _online(prompts, ONLINE_STEPS, parent=before, evaluations=asked)
        before = arm
    before = "shared"
    for number in range(1, ONLINE_ONLY_ROUNDS + 1):
        steps = OFFLINE_STEPS if number == 1 else ONLINE_STEPS  # as many in all
        asked = EVALUATED if number == ONLINE_ONLY_ROUNDS else ()
        arm = f"online{number}"
        arms[arm] = _online(prompts, steps, parent=before, evaluations=asked)
        before = arm
    for name in CLUSTERS:
        some = f"{{requests}}/online_{name}.jsonl"
        arms[f"online_{name}"] = _online(
            some, CLUSTER_ONLINE_STEPS, parent="polish", evaluations=()
        )
    arms["merged_online"] = _strength("linear", [f"online_{name}" for name in CLUSTERS], "polish")
    return arms


def _stage(stage: str, *words: str, evaluations: tuple[str, ...] = ()) -> dict:
    return sweeps.made(STAGE, stage, *words, "--to={run}", evaluations=evaluations)


def _merge(arms: Sequence[str], stage: str = "merge", *flags: str) -> dict:
    words = (*flags, "--runs", *(f"{{{arm}}}" for arm in arms))
    return _stage(stage, *words, evaluations=EVALUATED)


def _strength(method: str, arms: Sequence[str], base: str) -> dict:
    flags = ("--requests={requests}", f"--method={method}", f"--base={{{base}}}")
    return _merge(arms, "strength", *flags)


def _sft(
    data: str, steps: int, *bindings: str, parent: str = "base", evaluations=EVALUATED
) -> dict:
    chats = f"CHATS={data!r}"
    return _trained("sft", chats, steps, *bindings, parent=parent, evaluations=evaluations)


def _offline(data: str, steps: int, *bindings: str, parent: str) -> dict:
    pairs = f"PAIRS={data!r}"
    return _trained("preference", pairs, steps, *bindings, parent=parent, evaluations=EVALUATED)


def _online(data: str, steps: int, *, parent: str, evaluations: Sequence[str]) -> dict:
    prompts = f"PROMPT_FILES={data!r}"
    return _trained("online", prompts, steps, parent=parent, evaluations=evaluations)


def _trained(
    kind: str, data: str, steps: int, *bindings: str, parent: str, evaluations: Sequence[str]
) -> dict:
    files = ("cpu/model_base.gin", f"{kind}.gin", "vocabulary_base.gin", f"cpu/{kind}.gin")
    return sweeps.arm(
        *(f"{GIN}{name}" for name in files),
        bindings=("BASE='{base}'", data, f"TRAIN_STEPS={steps}", *bindings),
        parent=parent,
        evaluations=evaluations,
    )


def _dpo(size: str, topology: str, fsdp: int, tensor: int) -> Row:
    return Row(
        name=f"aya_expanse_{size}_dpo",
        title=f"DPO of {size.upper()}, 64 rows of pairs of 2,048 tokens",
        files=(
            f"t5x_configs/models/aya_expanse_{size}.gin",
            "t5x_configs/experiments/aya_expanse/preference.gin",
        ),
        topology=topology,
        bindings=(
            *("INITIAL_CHECKPOINT_PATH=run", "PAIRS=pairs.jsonl", "DOCUMENT_START=None"),
            "VOCABULARY=None",
            *mesh("fsdp_tp_sp", fsdp=fsdp, tensor=tensor),
        ),
    )


ROWS = (_dpo("8b", "v5e:8x8", fsdp=16, tensor=4), _dpo("32b", "v5e:16x16", fsdp=64, tensor=4))


# What is measured of the runs.

TITLE = "Aya Expanse, 2412.04261"
SEEDS = (5, 8)
EARLIER = (
    "seeds 10 to 14, 270 runs: a third of the score was of sums that no student learned, merges had weights of one third, preference training "
    "started where it had no room, and two claims were judged by the worst of several noisy numbers",
)
PARTS = {"small": "words of seven languages"}
SWEEPS = {"small": "aya_expanse/experiment:{seeds}"}
_KEYS = ("run", "arm", "seed", "parents", "step", "tokens", "seconds", "evaluations", "digest")


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep by part.

    Args:
      model_dir: parent of the sweep's folder.
      seeds: number of seeds.
      parts: of PARTS.
      **options: `workers`, `minutes` and `further` of `sweeps.rows`.
    """
    sweep = {part: ("aya_expanse/experiment", seeds) for part in parts}
    measured = sweeps.parts(model_dir, sweep, with_results, **options)
    return {part: with_wins(rows) for part, rows in measured.items()}


def with_results(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns what the page needs of a row, with what its stage wrote or the mean reward of its last updates."""
    out = {key: row.get(key) for key in _KEYS}
    if row["arm"] == "pool":
        out["qualities"] = small_stage.read(directory, small_pool.QUALITIES)
    if row["arm"] == "search":
        out["search"] = search_of(directory)
    if (strength := small_stage.read(directory, small_stage.STRENGTH)) is not None:
        out["strength"] = strength
    lines = [line["reward"] for line in sweeps.metrics(directory) if "reward" in line]
    if lines:
        out["reward"] = float(np.mean(lines[len(lines) // 2 :]))
    return out


def search_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the search of weights in a folder.

    Returns:
      {'gains': how much lower the mean loss over languages is without each model, of equal weights, 'best': the weights that
      the search chose}.
    """
    lines = (folder / "trials.jsonl").read_text("utf-8").splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    means = {tuple(row["weights"]): float(np.mean(list(row["losses"].values()))) for row in rows}
    count = len(SIX)
    gains = []
    for left_out in range(count):
        rest = tuple(0.0 if i == left_out else round(1 / (count - 1), 6) for i in range(count))
        gains.append(means[(round(1 / count, 6),) * count] - means[rest])
    best = small_stage.read(folder, "search.json")["best"]["weights"]
    return {"gains": gains, "best": best}


def with_wins(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with win rates by language against the two references of the same seed, instead of a judge's scores."""
    judges = {
        (row["arm"], row["seed"]): row["evaluations"]["answers"]["judge"]
        for row in rows
        if row["arm"] in (SINGLE, OPPONENT) and (row["evaluations"] or {}).get("answers")
    }
    out = []
    for row in rows:
        answers = (row["evaluations"] or {}).get("answers")
        if not answers:
            out.append(dict(row))
            continue
        scores = {key: value for key, value in answers.items() if key != "judge"}
        made = {**row, "evaluations": {**row["evaluations"], "answers": scores}}
        made["wins"] = {
            arm: {code: _outcomes(own, reference[code]) for code, own in answers["judge"].items()}
            for (arm, seed), reference in judges.items()
            if seed == row["seed"] and arm != row["arm"]
        }
        out.append(made)
    return out


def _outcomes(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Returns the shares of requests that are won, tied and lost; they sum to 1. Equal answers have equal scores."""
    gaps = np.array(own) - np.array(other)
    return {
        "win": float((gaps > 0).mean()),
        "tie": float((gaps == 0).mean()),
        "loss": float((gaps < 0).mean()),
    }
