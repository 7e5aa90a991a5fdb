"""The scores of the small experiment's runs, and what makes a comparison of them say nothing."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from espalier.launch.papers.aya_expanse import lexicon
from espalier.launch.papers.aya_expanse.experiment import (
    ONLINE_ONLY_ROUNDS,
    POLISHED,
    ROUNDS,
)
from espalier.launch.papers.shared import results

S, LOSS = "score", "loss"
REWARD, ARTEFACTS = "reward in training", "words of the other language"
UNPAIRED = "score outside of English"  # of languages that pairs in English only do not have
ELSEWHERE, AT_HOME = "score in the other clusters", "score in the polished cluster"
TAUGHT = 0.5  # mean score of the teachers in their own languages, below which routing says nothing
MOVED = 0.02  # of the score: preference training that changes it by less in all compared arms moved nothing
# Floor and ceiling of each kind. Words at random are right in 1 of 54 places, and sorted ones that are copied in one of three.
LIMITS = {"translate": (0.1, 0.98), "sort": (0.4, 0.98)}
_LABELS = {
    "student_single": "student of the best single teacher",
    "student_reward": "student of routing by reward",
    "student_translated": "student of translated answers",
    **{f"student_{name}": f"student of {name} routing" for name in ("random", "fixed", "learned")},
    "shared": "joint student, halfway",
    "merged_mean": "mean of the experts",
    "merged": "experts merged, searched strength",
    "merged_sphere": "experts on the sphere, searched strength",
    "merged_ties": "experts by TIES, searched strength",
    "polish": "polish of the merge",
    "cluster_low": "polish on one cluster, a tenth of the rate",
    "cluster_full": "polish on one cluster, full rate",
    "offline": "offline",
    "offline_long": "offline only",
    "online4": "online only",
    "round3": "offline and three rounds",
    "offline_languages1": "pairs of English",
    "offline_languages7": "pairs of seven languages",
    "native": "native against translated pairs",
    "merged_online": "preferences by cluster, merged",
}


def of_language(code: str) -> str:
    """Returns the name of the score in a language."""
    return f"score in {code}"


def of_kind(kind: str) -> str:
    """Returns the name of the score of a kind of requests."""
    return f"score of {kind}"


def won_against(reference: str, code: str = "") -> str:
    """Returns the name of the win rate against an arm, the mean over languages or in one."""
    return f"win rate against {reference}" + (f" in {code}" if code else "")


def won(shares: Mapping[str, float]) -> float:
    """Returns the share of wins and half of the ties."""
    return shares["win"] + shares["tie"] / 2


class Runs(results.Results):
    """Runs as `experiment.run` returns them."""

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        answers = (row.get("evaluations") or {}).get("answers")
        out: dict[str, float | None] = {REWARD: row.get("reward")}
        if not answers:
            return out
        scores = answers["score"]
        out |= {S: _mean(scores, scores), LOSS: _mean(answers["loss"], scores)}
        out |= {of_language(code): value for code, value in scores.items()}
        out |= {of_kind(kind): value for kind, value in answers["kinds"].items()}
        foreign = [code for code in scores if code != lexicon.SHARED]
        home = lexicon.FAMILIES[POLISHED]
        out[UNPAIRED] = _mean(scores, foreign)
        out[AT_HOME] = _mean(scores, home)
        out[ELSEWHERE] = _mean(scores, [code for code in foreign if code not in home])
        out[ARTEFACTS] = _mean(answers["artefacts"], foreign)
        for reference, wins in (row.get("wins") or {}).items():
            rates = {code: won(shares) for code, shares in wins.items()}
            out[won_against(reference)] = _mean(rates, rates)
            out |= {won_against(reference, code): rate for code, rate in rates.items()}
        return out

    def lower_is_better(self, score: str) -> bool:
        return score in (LOSS, ARTEFACTS)

    def digits(self, score: str) -> int:
        return 3

    def limits(self, score: str) -> tuple[float, float] | None:
        return {of_kind(kind): limits for kind, limits in LIMITS.items()}.get(score)

    def parts(self, score: str) -> tuple[str, ...]:
        """Returns the kinds of requests for the mean over them."""
        averages = score in (S, UNPAIRED, ELSEWHERE, AT_HOME) or score.startswith("score in ")
        return tuple(map(of_kind, LIMITS)) if averages else ()

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

    def unmoved(self, start: str, *arms: str) -> str:
        """Returns why a comparison of preference training says nothing: no arm left the start; empty if one did."""
        gains = {arm: self.paired(S, arm, start) for arm in arms}
        means = {arm: (one - before).mean() for arm, (one, before) in gains.items() if one.size}
        if not means or max(map(abs, means.values())) >= MOVED:
            return ""
        listed = ", ".join(f"{self.label(arm)} {gain:+.3f}" for arm, gain in means.items())
        return f"preference training moved nothing: gains over its start within {MOVED} ({listed})"

    def searches(self) -> dict[int, Any]:
        """Returns the searches of weights by seed; see `search_of`."""
        return {
            seed: row["search"] for seed, row in self.find("search").items() if row.get("search")
        }

    def strengths(self, arm: str) -> dict[int, Any]:
        """Returns the searched strengths of a merge by seed: {'losses': [[strength, loss], ...], 'best': strength}."""
        return {
            seed: row["strength"] for seed, row in self.find(arm).items() if row.get("strength")
        }


# The stages of the recipe, each after the one before it.
STAGES = {
    "student_single": "best single teacher",
    "student_reward": "arbitrage",
    "merged": "merge of experts",
    "polish": "polish",
    "merged_online": "preferences merged",
}
OFFLINE_FIRST = ("offline", *(f"round{i}" for i in range(1, ROUNDS + 1)))
ONLINE_ONLY = tuple(f"online{i}" for i in range(1, ONLINE_ONLY_ROUNDS + 1))


def _mean(values: Mapping[str, float], keys: Iterable[str]) -> float:
    return float(np.mean([values[key] for key in keys]))
