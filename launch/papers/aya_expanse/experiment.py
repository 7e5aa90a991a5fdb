"""The whole of Aya Expanse (arXiv 2412.04261) in small, and programs of full size: the runs, and what is measured of them.

Seven languages in three clusters, on words of installed packages. A base; a teacher of each cluster; students of what each routing
keeps of their answers; experts of the clusters, which part from the joint model halfway, merged; the weights of a merge of six, one of
them harmful; polish; offline and online preference training, by cluster with merges, and jointly. The number of seeds after a colon:

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
from espalier.launch.papers.shared import results, sweeps
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
OFFLINE_STEPS, ONLINE_STEPS, BY_LANGUAGES_STEPS = 60, 30, 40
CLUSTER_OFFLINE_STEPS, CLUSTER_ONLINE_STEPS = (
    round(steps * 3 / 7) for steps in (OFFLINE_STEPS, ONLINE_STEPS)
)
ROUNDS, ONLINE_ONLY_ROUNDS = 6, 4
BETAS = {"offline_beta001": 0.01, "offline_beta003": 0.03, "offline_beta03": 0.3}  # and 0.1
RATE = 2e-3  # of supervised stages
# Name -> (share of the rate, updates) of a polish after the merge.
POLISHES = {
    "polish_tenth": (0.1, 50),
    "polish_tenth_long": (0.1, 100),
    "polish_twentieth": (0.05, 50),
    "polish_full": (1.0, 50),
}
# The six of the search: experts, the joint model, a harmful one, and a copy of the first.
SIX = (
    *(f"expert_{name}" for name in CLUSTERS),
    "student_reward",
    "harmful",
    f"expert_{CLUSTERS[0]}",
)
HARMFUL = SIX.index("harmful")
EVALUATED = ("answers",)


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    arms: dict[str, dict] = {
        "requests": _stage("requests", "--seed={SEED}"),
        "base": sweeps.arm(f"{CPU}base.gin", evaluations=()),
    }
    for name in CLUSTERS:
        arms[f"teacher_{name}"] = _sft(f"{{requests}}/teacher_{name}.jsonl", TEACHER_STEPS)
    teachers = [f"{{teacher_{name}}}" for name in CLUSTERS]
    pool = ("--requests={requests}", "--seed={SEED}", "--runs", *teachers)
    arms["pool"] = _stage("pool", *pool)
    for name in ROUTINGS:
        arms[f"student_{name}"] = _sft(f"{{pool}}/sft_{name}.jsonl", STUDENT_STEPS)
    arms["shared"] = _sft("{pool}/sft_reward.jsonl", SHARED_STEPS)
    for name in CLUSTERS:
        data = f"{{pool}}/sft_reward_{name}.jsonl"
        arms[f"expert_{name}"] = _sft(data, EXPERT_STEPS, parent="shared")
    arms["merged"] = _merge([f"expert_{name}" for name in CLUSTERS])
    for name, (share, steps) in POLISHES.items():
        data = "{pool}/sft_reward.jsonl"
        arms[name] = _sft(data, steps, f"LEARNING_RATE={RATE * share!r}", parent="merged")
    arms |= _weights()
    arms |= _joint_preferences()
    arms |= _merged_preferences()
    answers = {"call": "espalier.launch.papers.aya_expanse.small_answers:score"}
    divergence = {"call": "espalier.launch.papers.aya_expanse.small_answers:divergence"}
    return sweeps.config(
        arms, seeds=seeds, evaluations={"answers": answers, "divergence": divergence}
    )


def _weights() -> dict[str, dict]:
    """Returns the arms of the search of weights among the six."""
    six = [f"{{{arm}}}" for arm in SIX]
    return {
        "harmful": _sft("{pool}/sft_harmful.jsonl", EXPERT_STEPS, parent="shared"),
        "search": _stage("search", "--requests={requests}", "--seed={SEED}", "--runs", *six),
        "six_searched": _stage("searched", "--search={search}", evaluations=EVALUATED),
        "six_uniform": _merge(SIX),
        "six_spherical": _merge(SIX, "--method=multislerp"),
        "six_ties": _merge(SIX, "--method=ties", "--base={shared}"),
    }


def _joint_preferences() -> dict[str, dict]:
    """Returns the arms of preference training of the joint model."""
    start = "student_reward"
    arms = {"offline": _offline("{pool}/pairs.jsonl", OFFLINE_STEPS, parent=start, kl=True)}
    for name, beta in BETAS.items():
        settings = (f"BETA={beta}",)
        arms[name] = _offline("{pool}/pairs.jsonl", OFFLINE_STEPS, *settings, parent=start, kl=True)
    as_many = OFFLINE_STEPS + 3 * ONLINE_STEPS  # as offline, then three rounds
    arms["offline_long"] = _offline("{pool}/pairs.jsonl", as_many, parent=start)
    for number in PAIR_LANGUAGES:
        pairs = f"{{pool}}/pairs_{number}.jsonl"
        arms[f"offline_languages{number}"] = _offline(pairs, BY_LANGUAGES_STEPS, parent=start)
    native = "{pool}/pairs_native.jsonl"
    arms["native"] = _offline(native, BY_LANGUAGES_STEPS, parent="student_translated")
    prompts = "{requests}/online.jsonl"
    for number in range(1, ROUNDS + 1):
        before = f"round{number - 1}" if number > 1 else "offline"
        arms[f"round{number}"] = _online(prompts, ONLINE_STEPS, parent=before)
    for number in range(1, ONLINE_ONLY_ROUNDS + 1):
        before = f"online{number - 1}" if number > 1 else start
        steps = OFFLINE_STEPS if number == 1 else ONLINE_STEPS  # as many in all
        arms[f"online{number}"] = _online(prompts, steps, parent=before)
    return arms


def _merged_preferences() -> dict[str, dict]:
    """Returns the arms of preference training by cluster, with a merge after each stage."""
    arms = {}
    for name in CLUSTERS:
        pairs = f"{{pool}}/pairs_{name}.jsonl"
        arms[f"offline_{name}"] = _offline(pairs, CLUSTER_OFFLINE_STEPS, parent="polish_tenth")
    arms["merged_offline"] = _merge([f"offline_{name}" for name in CLUSTERS])
    for name in CLUSTERS:
        prompts = f"{{requests}}/online_{name}.jsonl"
        arms[f"online_{name}"] = _online(prompts, CLUSTER_ONLINE_STEPS, parent="merged_offline")
    arms["merged_online"] = _merge([f"online_{name}" for name in CLUSTERS])
    return arms


def _stage(stage: str, *words: str, evaluations: tuple[str, ...] = ()) -> dict:
    return sweeps.made(STAGE, stage, *words, "--to={run}", evaluations=evaluations)


def _merge(arms: tuple[str, ...] | list[str], *flags: str) -> dict:
    words = (*flags, "--runs", *(f"{{{arm}}}" for arm in arms))
    return _stage("merge", *words, evaluations=EVALUATED)


def _sft(data: str, steps: int, *bindings: str, parent: str = "base") -> dict:
    return _trained("sft", f"CHATS={data!r}", steps, *bindings, parent=parent)


def _offline(data: str, steps: int, *bindings: str, parent: str, kl: bool = False) -> dict:
    evaluations = (*EVALUATED, "divergence") if kl else EVALUATED
    return _trained(
        "preference", f"PAIRS={data!r}", steps, *bindings, parent=parent, evaluations=evaluations
    )


def _online(data: str, steps: int, *, parent: str) -> dict:
    return _trained("online", f"PROMPT_FILES={data!r}", steps, parent=parent)


def _trained(
    kind: str, data: str, steps: int, *bindings: str, parent: str, evaluations=EVALUATED
) -> dict:
    files = ("cpu/model_base.gin", f"{kind}.gin", "vocabulary_base.gin", f"cpu/{kind}.gin")
    return sweeps.arm(
        *(f"{GIN}{name}" for name in files),
        bindings=("BASE='{base}'", data, f"TRAIN_STEPS={steps}", *bindings),
        parent=parent,
        evaluations=evaluations,
    )


S, WORST, ARTEFACTS = "score", "score of the worst language", "words of the other language"
WINS, WORST_WINS = "win rate", "win rate in the worst language"
DIVERGENCE, REWARD = "divergence", "reward in training"
REFERENCE = "student_single"  # of win rates
FLOOR = 0.1  # score below which a model has not learned to answer
TAUGHT = 0.4  # mean score of the teachers in their own languages, below which routing says nothing
# Languages in which neither one nor three languages of pairs are.
UNSEEN = ("it", "nl", "cs", "pl")
UNSEEN_SCORE = "score in languages without pairs"
_LABELS = {
    "student_single": "student of the best single teacher",
    "student_reward": "student of routing by reward",
    "shared": "joint student, halfway",
    "merged": "experts merged",
    "polish_tenth": "polish, a tenth of the rate",
    "polish_tenth_long": "polish, a tenth, twice as long",
    "polish_twentieth": "polish, a twentieth of the rate",
    "polish_full": "polish, full rate",
    "six_searched": "six, searched weights",
    "six_uniform": "six, equal weights",
    "six_spherical": "six, on the sphere",
    "six_ties": "six, TIES",
    "offline": "offline",
    "offline_long": "offline, as many updates as three rounds more",
    **{arm: f"offline, beta {beta:g}" for arm, beta in BETAS.items()},
    **{
        f"offline_languages{n}": f"pairs of {n} language{'s' * (n > 1)}"
        for n in small_pool.PAIR_LANGUAGES
    },
    **{f"student_{name}": f"student of {name} routing" for name in ("random", "fixed", "learned")},
    "student_translated": "student of translated answers",
    "native": "native against translated pairs",
    "merged_offline": "offline by cluster, merged",
    "merged_online": "a round by cluster, merged",
}


def of_language(code: str) -> str:
    """Returns the name of the score in a language."""
    return f"score in {code}"


def won(shares: Mapping[str, float]) -> float:
    """Returns the share of wins and half of the ties."""
    return shares["win"] + shares["tie"] / 2


class Runs(results.Results):
    """Runs as `experiment.run` returns them."""

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        evaluations = row.get("evaluations") or {}
        answers = evaluations.get("answers")
        out: dict[str, float | None] = {
            DIVERGENCE: evaluations.get("divergence"),
            REWARD: row.get("reward"),
        }
        if not answers:
            return out
        scores = answers["score"]
        out |= {S: _mean(scores), WORST: min(scores.values())}
        out |= {of_language(code): value for code, value in scores.items()}
        out[UNSEEN_SCORE] = _mean({code: scores[code] for code in UNSEEN})
        own = {c: v for c, v in answers["artefacts"].items() if c != lexicon.SHARED}
        out[ARTEFACTS] = _mean(own)
        if wins := row.get("wins"):
            rates = {code: won(shares) for code, shares in wins.items()}
            out |= {WINS: _mean(rates), WORST_WINS: min(rates.values())}
        return out

    def lower_is_better(self, score: str) -> bool:
        return score in (ARTEFACTS, DIVERGENCE)

    def digits(self, score: str) -> int:
        return 3

    def limits(self, score: str) -> tuple[float, float] | None:
        return None if score in (DIVERGENCE, REWARD, ARTEFACTS) else (0.0, 1.0)

    def degenerate(self, row: Mapping[str, Any]) -> str:
        score = self.row_scores(row).get(S)
        return "it has not learned to answer" if score is not None and score < FLOOR else ""

    def label(self, arm: str) -> str:
        return _LABELS.get(arm, arm.replace("_", " "))

    def pool(self, key: str) -> dict[int, Any]:
        """Returns what the pool's answers are worth, by seed; see `small_pool.QUALITIES`."""
        return {
            seed: row["qualities"][key]
            for seed, row in self.find("pool").items()
            if row.get("qualities")
        }

    def untaught(self) -> str:
        """Returns why routing says nothing: teachers that do not know their own languages; empty if they do."""
        for seed, teachers in self.pool("teachers").items():
            own = [teachers[name][c] for name, codes in lexicon.FAMILIES.items() for c in codes]
            if np.mean(own) < TAUGHT:
                return f"seed {seed}: the teachers score {np.mean(own):.2f} in their own languages, less than {TAUGHT}"
        return ""

    def disagreement(self) -> dict[int, dict[str, float]]:
        """Returns the deviation over teachers of their mean scores, by seed and language."""
        return {
            seed: {
                code: float(np.std([one[code] for one in teachers.values()]))
                for code in lexicon.LANGUAGES
            }
            for seed, teachers in self.pool("teachers").items()
        }

    def searches(self) -> dict[int, Any]:
        """Returns the searches of weights by seed; see `measure.search_of`."""
        return {
            seed: row["search"] for seed, row in self.find("search").items() if row.get("search")
        }


# The stages of the recipe, each after the one before it.
STAGES = {
    "student_single": "best single teacher",
    "student_reward": "arbitrage",
    "merged": "merge of experts",
    "polish_tenth": "polish",
    "merged_offline": "offline, merged",
    "merged_online": "online, merged",
}
OFFLINE_FIRST = ("offline", *(f"round{i}" for i in range(1, ROUNDS + 1)))
ONLINE_ONLY = tuple(f"online{i}" for i in range(1, ONLINE_ONLY_ROUNDS + 1))


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


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
SEEDS = 5
PARTS = {"small": "words of seven languages"}
_KEYS = ("run", "arm", "seed", "parents", "step", "tokens", "seconds", "evaluations", "digest")


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns the rows of the sweep by part.

    Args:
      model_dir: parent of the sweep's folder.
      seeds: number of seeds.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
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
    lines = [line["reward"] for line in sweeps.metrics(directory) if "reward" in line]
    if lines:
        out["reward"] = float(np.mean(lines[len(lines) // 2 :]))
    return out


def search_of(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the search of weights in a folder.

    Returns:
      {'trials': [[mean loss, loss of the worst language], ...], 'uniform': the first of them, with equal weights, 'best': the
      chosen one, 'gains': how much lower the mean loss is without each model, of equal weights}.
    """
    lines = (folder / "trials.jsonl").read_text("utf-8").splitlines()[1:]
    rows = [json.loads(line) for line in lines]
    losses = {tuple(row["weights"]): list(row["losses"].values()) for row in rows}
    means = {weights: float(np.mean(some)) for weights, some in losses.items()}
    count = len(SIX)
    gains = []
    for left_out in range(count):
        rest = tuple(0.0 if i == left_out else round(1 / (count - 1), 6) for i in range(count))
        gains.append(means[(round(1 / count, 6),) * count] - means[rest])
    best = small_stage.read(folder, "search.json")["best"]["losses"].values()
    trials = [[means[weights], max(some)] for weights, some in losses.items()]
    return {
        "trials": trials,
        "uniform": trials[0],
        "best": [float(np.mean(list(best))), max(best)],
        "gains": gains,
    }


def with_wins(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with win rates by language against the reference of the same seed, in place of a judge's scores."""
    judges = {
        row["seed"]: row["evaluations"]["answers"]["judge"]
        for row in rows
        if row["arm"] == REFERENCE and (row["evaluations"] or {}).get("answers")
    }
    out = []
    for row in rows:
        answers = (row["evaluations"] or {}).get("answers")
        if not answers:
            out.append(dict(row))
            continue
        scores = {key: value for key, value in answers.items() if key != "judge"}
        made = {**row, "evaluations": {**row["evaluations"], "answers": scores}}
        if (reference := judges.get(row["seed"])) is not None and row["arm"] != REFERENCE:
            made["wins"] = {
                code: _outcomes(own, reference[code]) for code, own in answers["judge"].items()
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
