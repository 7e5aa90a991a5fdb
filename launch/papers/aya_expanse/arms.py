"""The scores of the runs of launch/papers/aya_expanse/small_sweep.py, and their names in the report."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from data.aya_expanse import lexicon
from launch.papers.aya_expanse import small_pool, small_sweep
from launch.papers.shared import results

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
    **{arm: f"offline, beta {beta:g}" for arm, beta in small_sweep.BETAS.items()},
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
    """Runs as `measure.run` returns them."""

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
OFFLINE_FIRST = ("offline", *(f"round{i}" for i in range(1, small_sweep.ROUNDS + 1)))
ONLINE_ONLY = tuple(f"online{i}" for i in range(1, small_sweep.ONLINE_ONLY_ROUNDS + 1))


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))
