"""Online DPO: the share of a run's time in which the policy generates its training data.

The command is a usual one: `launch.train` with runs/online.gin, methods/preference/online_dpo.gin and
methods/preference/reward_checkpoint.gin, since online DPO is used with reward models. Policy, reference and reward model
have the size of the benchmark `dpo`. A step samples two completions for each of 32 prompts, the batch size of
runs/online.gin. Completions have up to 64 tokens, like the longest prompts, as in short questions and answers. With
longer completions, generation takes a larger share; with longer prompts, a smaller one. Weights are random, so hardly
any completion ends before its 64 tokens, and decoding runs to the full length.

Fresh processes repeat the run, and their shares are compared. Shares are of the wall time from the beginning of a rollout
to the beginning of the next, without the first steps, which compile.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from launch.benchmarks import dpo, pairs, peers

CASE: dict[str, Any] = {
    **{name: dpo.CASE[name] for name in dpo.MODEL},
    "prompts": 32,  # per step
    "prompt": [32, 64],  # tokens, uniform
    "completion": 64,
    "prompts_of_file": 512,
    "learning_rate": 1e-6,
    "beta": 0.1,
}
WARM_UP = 3
# Everything except the update counts as generation.
ROLLOUT = ("sampling", "rewards", "reference", "arrangement")


def run(*, rounds: int = 5, steps: int = 12) -> dict[str, Any]:
    """Repeats the run `rounds` times, `steps` timed steps in each."""
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        command = [sys.executable, "-m", "launch.benchmarks.jax.online_dpo_jax", folder, str(steps)]
        reports = [peers.measured(command) for _ in range(rounds)]
    return {
        "case": CASE,
        **figures([report["seconds"] for report in reports]),
        "completions_that_ended": [round(report["ended"], 4) for report in reports],
        "other_load_cores": [report["other_load"] for report in reports],
        "contended": any(report["other_load"] > peers.CONTENDED for report in reports),
    }


def figures(runs: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Returns each part's share of the time, as medians over runs, from each run's seconds per part and step.

    'generation_of_time' is the share of the whole rollout, 'sampling_of_time' that of sampling completions alone.
    """
    parts = (*ROLLOUT, "update")
    spent = {part: np.array([sum(run[part]) for run in runs]) for part in parts}
    whole = np.sum(list(spent.values()), axis=0)
    steps = [np.sum(list(run.values()), axis=0) for run in runs]
    return {
        "generation_of_time": pairs.ratio(whole - spent["update"], whole),
        "sampling_of_time": pairs.ratio(spent["sampling"], whole),
        "parts_of_time": {part: round(float(np.median(spent[part] / whole)), 4) for part in parts},
        "seconds_per_step": [round(float(np.median(of_run)), 3) for of_run in steps],
    }


def write(folder: str) -> None:
    """Writes the files of dpo.write, case.json, prompts.jsonl, and reward/, a reward model after one update."""
    dpo.write(folder)
    pathlib.Path(folder, "case.json").write_text(json.dumps(CASE))
    rng = np.random.default_rng(1)
    least, most = CASE["prompt"]
    with open(os.path.join(folder, "prompts.jsonl"), "w", encoding="utf-8") as file:
        for size in rng.integers(least, most + 1, CASE["prompts_of_file"]):
            file.write(json.dumps({"prompt": dpo.words(rng, size)}) + "\n")
    files = ("data/preferences", "runs/preference", "methods/preference/reward_model")
    bindings = {
        "MODEL_DIR": f"{folder}/reward",
        "INITIAL_CHECKPOINT_PATH": f"{folder}/run",
        "PAIRS": f"{folder}/pairs.jsonl",
        "PAIRS_VALIDATION_FRACTION": 0.0,
        "TOKENIZER": f"{folder}/run/tokenizer",
        "TASK_FEATURE_LENGTHS": {"targets": 2 * (dpo.CASE["prompt"] + dpo.CASE["completion"])},
        "DOCUMENT_START": None,
        "BATCH_SIZE": 1,
        "TRAIN_STEPS": 1,
        "WARMUP_STEPS": 0,
        "LEARNING_RATE": 1e-3,
    }
    command = [sys.executable, "-m", "launch.train", *arguments(folder, files, bindings)]
    environ = {**os.environ, "ESPALIER_CACHE": f"{folder}/cache"}
    subprocess.run(command, check=True, capture_output=True, cwd=peers.ROOT, env=environ)


def arguments(folder: str, files: tuple[str, ...], bindings: dict[str, Any]) -> list[str]:
    """Returns flags of a run with the model of `folder`, gin files of t5x_configs, and macro bindings."""
    flags = [f"--gin_file={folder}/run/config.gin"]
    flags += [f"--gin_file=t5x_configs/{file}.gin" for file in files]
    return flags + [f"--gin.{name}={value!r}" for name, value in bindings.items()]
