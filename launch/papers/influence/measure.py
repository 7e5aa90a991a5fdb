"""Influence at small scale: exact responses of tiny models, the small corpus with its retrained models, and a real model."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from launch.papers.shared import sweeps

TITLE = "procedural knowledge by EK-FAC influence, 2411.12580"
SEEDS = 5
_SEEN = 5  # seeds of the tiny models before those that judge: one of them had weights that vanish
PARTS = {
    "exact": "exact responses of tiny models",
    "corpus": "facts, procedures and text",
    "smollm": "SmolLM2-135M over real text, a demonstration of about 40 minutes",
}


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns {"exact": [{"seed", "seconds", and of `exact.run`}], "corpus": rows of `by_seed`, "smollm": of `of_report`}.

    Args:
      model_dir: of all runs and measurements.
      seeds: of the parts that judge.
      parts: of PARTS.
      **options: as of `sweeps.rows`.

    Raises:
      StoppedError: the sweep was stopped and continues when it is started again.
    """
    out: dict[str, Any] = {}
    if "exact" in parts:
        stages = sweeps.Stages(pathlib.Path(model_dir, "exact"))
        out["exact"] = [_exact(stages, seed) for seed in sweeps.seeds(seeds, after=_SEEN)]
    if "corpus" in parts:
        rows = sweeps.parts(
            model_dir, {"corpus": ("influence/sweep", seeds)}, with_records, **options
        )
        out["corpus"] = by_seed(rows["corpus"])
    if "smollm" in parts:
        sweep = {"smollm": ("influence/smollm_sweep", "full")}
        # Nearly all arms need the one before: a single worker has all cores.
        rows = sweeps.parts(model_dir, sweep, with_report, **{**options, "workers": 1})
        out["smollm"] = of_report(rows["smollm"])
    return out


def _exact(stages: sweeps.Stages, seed: int) -> dict[str, Any]:
    from launch.papers.influence import exact

    sizes = {name: getattr(exact, name) for name in _EXACT}
    stage = stages.get(f"seed{seed}", {"seed": seed, **sizes}, lambda: exact.run(seed))
    return {"seed": seed, "seconds": stage["seconds"], **stage["result"]}


_EXACT = ("DOCUMENTS", "QUERIES", "HALVES", "LENGTH", "SYMBOLS", "DAMPING", "LABELS", "CG_STEPS")


def with_records(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns arm, seed and seconds of a row of results, with the record that a made run wrote, if it did."""
    from launch.papers.influence import losses, scoring

    files = {"scores": scoring.RECORD, "losses": losses.RECORD}
    file = directory / files.get(row["arm"], "")
    record = json.loads(file.read_bytes()) if row["arm"] in files and file.is_file() else None
    return {**{key: row[key] for key in ("arm", "seed", "seconds")}, "record": record}


def with_report(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns arm and seconds of a row of results of smollm_sweep.py, with the report that was made there, if it was."""
    file = directory / "report.json"
    report = json.loads(file.read_bytes()) if row["arm"] == "report" and file.is_file() else None
    return {"arm": row["arm"], "seconds": row["seconds"], "report": report}


def of_report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Returns {"documents", "rank_by", "compression", "seconds" by arm, "analyses", "queries"}; None without a report.

    A query has "prompt", "completion", "nats" and "first": the source and the text of its first document.
    """
    reports = [row["report"] for row in rows if row["report"]]
    if not reports:
        return None
    (report,) = reports
    queries = [
        {
            **{name: query[name] for name in ("prompt", "completion", "nats")},
            "first": {name: query["top"][0][name] for name in ("source", "text")},
        }
        for query in report["queries"]
    ]
    return {
        **{name: report[name] for name in ("documents", "rank_by", "compression", "analyses")},
        "seconds": {row["arm"]: row["seconds"] for row in rows},
        "queries": queries,
    }


def by_seed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns {"seed", "seconds" of all its runs, "scores", "losses"} of each seed; None for what it lacks."""
    out = []
    for seed in sorted({row["seed"] for row in rows}):
        mine = {row["arm"]: row for row in rows if row["seed"] == seed}
        records = {name: (mine.get(name) or {}).get("record") for name in ("scores", "losses")}
        seconds = round(sum(row["seconds"] for row in mine.values()), 1)
        out.append({"seed": seed, "seconds": seconds, **records})
    return out
