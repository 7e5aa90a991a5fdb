"""SnapKV at small scale: trains retrieval models, and measures them, a chat model and the time of decoding."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launch.papers.shared import sweeps
from launch.papers.shared.sweeps import Stages

TITLE = "SnapKV, 2404.14469"
SEEDS = 5
PARTS = {
    "retrieval": "small trained models",
    "needles": "a chat model",
    "latency": "the time of decoding, on idle cores",
}
PROMPTS = 256  # of each measurement of a retrieval model; every seed draws its own
LINES = 48
CAPACITIES = (16, 24, 32, 48, 96)
CAPACITY = 48  # about a fifth of the prompt of 247 tokens
SHORTER = {12: (24, 48), 24: (24, 48)}  # lines -> capacities, for the map of depths and lengths
POSITIONS = {"lines": 12, "capacity": 24}  # where both positions of the question are compared


def run(
    *, model_dir: str, seeds: int, parts: Sequence[str] = tuple(PARTS), **options: Any
) -> dict[str, Any]:
    """Returns all measurements by part; those made before are read.

    Args:
      model_dir: parent of the runs that are trained, of the converted chat model and of the results.
      seeds: number of retrieval models.
      parts: of PARTS.
      **options: as of `sweeps.rows`.
    """
    folder = pathlib.Path(model_dir)
    stages = Stages(folder / "results")
    out: dict[str, Any] = {}
    if "retrieval" in parts:
        out["retrieval"] = _retrieval(folder / "retrieval", stages, seeds, **options)
    if "needles" in parts:
        out["needles"] = _needles(folder, stages)
    if "latency" in parts:  # last, and alone: it needs idle cores
        from launch.papers.snapkv import latency

        stage = stages.get("latency", latency.SETTINGS, latency.measure)
        out["latency"] = {"settings": stage["settings"], **stage["result"]}
    return out


def _retrieval(folder: pathlib.Path, stages: Stages, seeds: int, **options: Any) -> dict[str, Any]:
    """Returns {'phases': a row for each phase of training, 'models': seed -> measurements} after training."""
    from launch.papers.snapkv import sweep

    rows = sweeps.rows(folder, "snapkv/sweep", seeds, **options)
    last = {row["seed"]: row for row in rows if row["arm"] == sweep.LAST}
    return {
        "phases": [_phase(row, folder / row["directory"]) for row in rows],
        "models": {
            str(seed): _model(folder / row["directory"], stages, seed, row["digest"])
            for seed, row in sorted(last.items())
        },
    }


def _phase(row: Mapping[str, Any], directory: pathlib.Path) -> dict[str, Any]:
    """Returns the number of updates of a phase, and the shares of prompts that were answered at its end."""
    prefix = "answers/"
    reached = {
        name.removeprefix(prefix): value
        for line in sweeps.metrics(directory)
        for name, value in line.items()
        if name.startswith(prefix)
    }
    facts = {name: row[name] for name in ("arm", "seed", "step", "seconds")}
    return {**facts, "reached": reached}


def _model(directory: pathlib.Path, stages: Stages, seed: int, digest: str) -> dict[str, Any]:
    """Returns all measurements of one retrieval model; `digest` is of its training."""
    from launch.papers.snapkv import attention, retrieval

    sizes = {"prompts": PROMPTS, "lines": LINES}
    at_fifth = {**sizes, "capacity": CAPACITY}
    positions = {"prompts": PROMPTS, **POSITIONS}
    measures: dict[str, tuple[Any, dict[str, Any]]] = {
        "accuracy": (retrieval.accuracy, {**sizes, "capacities": CAPACITIES}),
        **{
            f"accuracy_{lines}": (
                retrieval.depths,
                {"prompts": PROMPTS, "lines": lines, "capacities": capacities},
            )
            for lines, capacities in SHORTER.items()
        },
        "agnostic": (retrieval.question_agnostic, at_fifth),
        "positions": (retrieval.question_positions, positions),
        "hits": (attention.hit_rates, sizes),
        "overlaps": (attention.overlaps, at_fifth),
        "kept_last": (attention.kept_hits, {**positions, "question": "last"}),
        "kept_first": (attention.kept_hits, {**positions, "question": "first"}),
    }
    with _loaded(directory) as loaded:
        model = retrieval.Retriever.of_run(loaded)
        return {
            name: stages.get(
                f"retrieval_{seed}_{name}",
                {**settings, "seed": seed, "model": digest},
                lambda measure=measure, settings=settings: measure(model, **settings, seed=seed),
            )["result"]
            for name, (measure, settings) in measures.items()
        }


@contextlib.contextmanager
def _loaded(directory: pathlib.Path) -> Iterator[Any]:
    """Loads a run's newest checkpoint."""
    from launch.config import gin_config
    from launch.run import load_run

    config = gin_config.load(
        entry="launch.run.load_run:RunConfig",
        unused={"VOCABULARY": "None"},
        defaults=load_run.files_of(str(directory)),
    )
    with config.entry().load(str(directory)) as loaded:
        yield loaded


def _needles(folder: pathlib.Path, stages: Stages) -> dict[str, Any]:
    """Returns the chat model's answers, after converting it."""
    from launch import convert
    from launch.papers.snapkv import needles

    directory = folder / "smollm2"
    if not directory.exists():
        source = sweeps.smollm2_weights(
            ", or choose the other parts with --parts retrieval latency"
        )
        if convert.main([f"--from_gguf={source}", f"--to={directory}"]):
            raise ValueError(f"{source} was not converted; see above.")
    with _loaded(directory) as loaded:
        return needles.measure_all(loaded, stages)
