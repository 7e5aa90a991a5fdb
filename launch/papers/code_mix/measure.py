"""Code in pre-training at small scale: runs the sweep as far as it is not done, and reads its results."""

import collections
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.code_mix.sweep import ANSWERS
from launch.papers.shared import sweeps

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
    files = {part: ("code_mix/sweep", seeds) for part in parts}
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
    from launch.papers.code_mix.judged import by_arm
    from launch.sweeping.results import read_results

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
    from launch.papers.code_mix import judged

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
