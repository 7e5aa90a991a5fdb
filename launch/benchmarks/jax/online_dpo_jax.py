"""One run of the benchmark `online_dpo`: a usual `launch.train` command.

  python -m launch.benchmarks.jax.online_dpo_jax FOLDER STEPS

Reads FOLDER, written by online_dpo.py, and prints one line of JSON: seconds of each part of the steps after the warm-up.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

import numpy as np

from launch import environment
from launch.benchmarks import online_dpo

FILES = (
    "data/prompts",
    "runs/online",
    "methods/preference/online_dpo",
    "methods/preference/reward_checkpoint",
)


def main(folder: str, steps: int) -> None:
    environment.restart_with_huge_pages()
    environment.prepare()
    os.environ["ESPALIER_CACHE"] = f"{folder}/cache"
    from launch import cli

    run = pathlib.Path(folder, "online")
    shutil.rmtree(run, ignore_errors=True)
    spans = {part: timed(owner, name) for part, (owner, name) in watched().items()}
    # A step ends when the next one begins, so the run has one more step, which is not measured.
    argv = arguments(folder, run, online_dpo.WARM_UP + steps + 1)
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main("Trains.", entry="launch.train:train", argv=argv)
    if status:
        raise SystemExit(status)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ended = float(np.mean([row["reward/ended"] for row in rows if "reward/ended" in row]))
    print(json.dumps({"seconds": seconds(spans), "ended": ended}))


def watched() -> dict[str, tuple[type, str]]:
    """Returns part -> method whose calls are timed."""
    from trainers.decoding.policy_sampler import PolicySampler
    from trainers.online.rollouts import Rollouts

    return {
        "rollout": (Rollouts, "get"),
        "sampling": (PolicySampler, "__call__"),
        "rewards": (Rollouts, "_rewards"),
        "reference": (Rollouts, "_score"),
    }


def arguments(folder: str, run: pathlib.Path, steps: int) -> list[str]:
    """Returns the arguments of `launch.train`."""
    case = json.loads(pathlib.Path(folder, "case.json").read_text())
    bindings = {
        "MODEL_DIR": str(run),
        "INITIAL_CHECKPOINT_PATH": f"{folder}/run",
        "REWARD_CHECKPOINT": f"{folder}/reward",
        "PROMPT_FILES": f"{folder}/prompts.jsonl",
        "TOKENIZER": f"{folder}/run/tokenizer",
        "DOCUMENT_START": None,
        "PROMPTS": case["prompts"],
        "MAX_PROMPT_LENGTH": case["prompt"][1],
        "MAX_NEW_TOKENS": case["completion"],
        "TRAIN_STEPS": steps,
        "WARMUP_STEPS": 0,
        "LEARNING_RATE": case["learning_rate"],
        "BETA": case["beta"],
        "LOG_PERIOD": 1,
    }
    return online_dpo.arguments(folder, FILES, bindings)


def seconds(spans: dict[str, list[tuple[float, float]]]) -> dict[str, list[float]]:
    """Returns seconds by part for each step, without the warm-up and the last step; parts sum to the step's time.

    Args:
      spans: part -> beginning and end of each call; every part has one call per step.
    """
    first = online_dpo.WARM_UP
    begins = [begin for begin, _ in spans["rollout"]]
    took = {name: [end - begin for begin, end in of_one] for name, of_one in spans.items()}
    rollout = np.asarray(took.pop("rollout"))
    parts = {name: np.asarray(values) for name, values in took.items()}
    parts["arrangement"] = rollout - sum(parts.values())
    return {
        **{name: values[first:-1].tolist() for name, values in parts.items()},
        "update": (np.diff(begins) - rollout[:-1])[first:].tolist(),
    }


def timed(owner: type, name: str) -> list[tuple[float, float]]:
    """Wraps a method; returns a list that receives beginning and end of each later call."""
    function = getattr(owner, name)
    spans: list[tuple[float, float]] = []

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*given, **named)
        finally:
            spans.append((began, time.perf_counter()))

    setattr(owner, name, call)
    return spans


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
