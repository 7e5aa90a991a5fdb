"""The scores of code_mix's runs, on generated text and at full size, and which of them can show a difference."""

import functools
from collections.abc import Mapping
from typing import Any

import pandas as pd

from espalier.data.code_mix import skills
from espalier.launch.evaluate.suites import scores as suite_scores
from espalier.launch.papers.code_mix.suite import SUITE
from espalier.launch.papers.shared import results

GROUPS = ("reasoning", "knowledge", "code")
# Exact match of some of a group's problems. Sorting is the hardest of the three procedures: with the tokens of a recipe, text
# alone shifts and reverses all operands, so that only problems of sorting can show a gain over it.
SORTING = "sorting in words"
PLAIN = "code without rare cases"
# Losses: of held-out documents, nats per token, and of right answers after their prompts, nats per answer. That of calls is of
# those that careless programs have right: of the others data teach another result.
CODE_LOSS, TEXT_LOSS = "loss on web code", "loss on text"
_HELD_OUT = {CODE_LOSS: "skill_web_code", TEXT_LOSS: "skill_text"}
ANSWER_LOSSES = {group: f"loss of answers, {group}" for group in GROUPS}
# Prompts that are judged, by what is asked for: the final result of steps, and a fact.
ASKED = ("final results", "facts")
_RIGHT = tuple(f"right {asked}" for asked in ASKED)
_WINS = "wins over "
_PROCEDURES = {"shifting in words": "shift", "reversing in words": "reverse", SORTING: "sort"}

_LEARNED = 0.02  # of exact match: a model without any skill above it has learned nothing
# Exact match of what has been learned not at all or wholly. Facts have one of 16 values, and a model that has learned these
# but no fact has one in 16 right.
_FLOOR, _CEILING = 0.05, 0.97
_FLOORS = {"knowledge": 0.1}
SHARE_ERROR = 0.005  # of a run's tokens


class Results(results.Results):
    """Runs of a part, as `experiment.run` returns them.

    A score is exact match of a group or of some of its problems, a loss, bits per byte of a task, or the wins over another
    arm in judged answers.
    """

    @property
    def main(self) -> str | None:
        """The size at which arms are compared: the first."""
        return next(iter(self.sizes), None)

    @property
    def parameters(self) -> int:
        """Of each model; 0 without runs that say it."""
        return next((row["parameters"] for row in self.rows if row.get("parameters")), 0)

    def row_scores(self, row: Mapping[str, Any]) -> dict[str, float | None]:
        held_out = row["held_out"]
        bits = {task: values.get("bits_per_byte") for task, values in held_out.items()}
        losses = {
            name: held_out[task]["loss"] for name, task in _HELD_OUT.items() if task in held_out
        }
        judged = row.get("judged", {})
        won = {
            wins(arm, asked): one["win"] - one["loss"]
            for arm, by_asked in judged.items()
            for asked, one in by_asked.items()
        }
        asked = {kind for by_asked in judged.values() for kind in by_asked}
        itself = {wins(row["arm"], kind): 0.0 for kind in asked}
        right = {f"right {kind}": share for kind, share in row.get("right", {}).items()}
        return {**bits, **losses, **won, **itself, **right, **_by_group(row["evaluations"])}

    def lower_is_better(self, score: str) -> bool:
        return score in self.domains or "loss " in score

    def limits(self, score: str) -> tuple[float, float] | None:
        if score in (*GROUPS, SORTING, PLAIN, *_PROCEDURES, *_RIGHT):
            return _FLOORS.get(score, _FLOOR), _CEILING
        return None

    def parts(self, score: str) -> tuple[str, ...]:
        """What may be dead in a score: of problems in words a procedure, of judged answers those that are right at all."""
        if score.startswith(_WINS):
            return (f"right {score.rpartition(', ')[-1]}",)
        return tuple(_PROCEDURES) if score == "reasoning" and SORTING in self.table else ()

    def degenerate(self, row: Mapping[str, Any]) -> str:
        scores = [
            value for group, value in _by_group(row["evaluations"]).items() if group in GROUPS
        ]
        known = [value for value in scores if value is not None]
        if known and max(known) <= _LEARNED:
            return "it has learned no skill"
        asked, read = row.get("asked", {}), row.get("read", {})
        if asked and share_error(asked, read) > SHARE_ERROR:
            return "it has read its sources with other shares than configured"
        return ""

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


def share_error(asked: Mapping[str, float], read: Mapping[str, float]) -> float:
    """Returns the largest difference of a source's share of tokens, as configured and as read."""
    return max(abs(asked.get(s, 0.0) - read.get(s, 0.0)) for s in {**asked, **read})


def _by_group(evaluations: Mapping[str, Any]) -> Mapping[str, float | None]:
    """Returns exact match and losses of skills, or means of the groups' benchmarks; None where some are missing."""
    if "skills" in evaluations:
        scored = evaluations["skills"]
        out = {group: float(scored[group]["exact"]) for group in GROUPS}
        plain = [kind for kind in scored["code"]["by_kind"] if skills.RARE not in kind]
        in_words, often = scored["reasoning"]["by_kind"], copied()
        for name, procedure in _PROCEDURES.items():
            rare = in_words[procedure + skills.RARE]
            out[name] = often * in_words[procedure] + (1 - often) * rare
        out[PLAIN] = sum(scored["code"]["by_kind"][kind] for kind in plain) / len(plain)
        losses = {group: float(scored[group]["loss"]) for group in GROUPS}
        losses["code"] = sum(scored["code"]["loss_by_kind"][kind] for kind in plain) / len(plain)
        return {**out, **{ANSWER_LOSSES[group]: loss for group, loss in losses.items()}}
    scores: dict[str, float] = {}
    for values in (one for one in evaluations.values() if isinstance(one, Mapping)):
        scores |= {name: one["score"] for name, one in values.get("benchmarks", {}).items()}
        if "pass_at_k" in values:
            scores[values["problems"]] = values["pass_at_k"]["1"]
    return dict(suite_scores.means(SUITE, scores)[0])


@functools.cache
def copied() -> float:
    """Returns exact match of calls for a model that copies the most frequent result of web code: the share of plain cases."""
    calls = skills.problems("code")
    return sum(skills.RARE not in one.kind for one in calls) / len(calls)


def wins(arm: str, asked: str) -> str:
    """Returns the score that is the share of judged prompts won against an arm, minus the share lost, of one of ASKED."""
    return f"{_WINS}{arm_name(arm)}, {asked}"


def arm_name(name: str) -> str:
    """Returns the name of an arm in the report."""
    return name.replace("_to_", " → ").replace("_", " ")


def source_name(task: str) -> str:
    """Returns the name of a source in the report."""
    return task.removeprefix("skill_").replace("_", " ")
