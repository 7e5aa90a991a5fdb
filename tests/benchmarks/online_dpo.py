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
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.benchmarks import compare, dpo

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
        command = compare.ours("online_dpo", folder, steps)
        reports = [compare.measured(command) for _ in range(rounds)]
    return {
        "case": CASE,
        **figures([report["seconds"] for report in reports]),
        "completions_that_ended": [round(report["ended"], 4) for report in reports],
        "other_load_cores": [report["other_load"] for report in reports],
        "contended": compare.contended({"ours": reports}),
    }


def figures(runs: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Returns each part's share of the time, as medians over runs, from each run's seconds per part and step.

    'generation_of_time' is the share of the whole rollout, 'sampling_of_time' that of sampling completions alone.
    """
    parts = (*ROLLOUT, "update")
    spent = {part: np.array([sum(run[part]) for run in runs]) for part in parts}
    whole = np.sum(list(spent.values()), axis=0)
    steps = [np.sum(list(run.values()), axis=0) for run in runs]
    return {
        "generation_of_time": compare.ratio(whole - spent["update"], whole),
        "sampling_of_time": compare.ratio(spent["sampling"], whole),
        "parts_of_time": {part: round(float(np.median(spent[part] / whole)), 4) for part in parts},
        "seconds_per_step": [round(float(np.median(of_run)), 3) for of_run in steps],
    }


def side(folder: str, steps: str) -> dict[str, Any]:
    """Trains on the files of `write`; returns seconds of each part of the steps after the warm-up."""
    spans = {part: dpo.timed(owner, name) for part, (owner, name) in watched().items()}
    # A step ends when the next one begins, so the run has one more step, which is not measured.
    metrics = dpo.train(folder, "online", arguments(folder, WARM_UP + int(steps) + 1))
    ended = float(np.mean([row["reward/ended"] for row in metrics if "reward/ended" in row]))
    return {"seconds": seconds(spans), "ended": ended}


def watched() -> dict[str, tuple[type, str]]:
    """Returns part -> method whose calls are timed."""
    from espalier.trainers.decoding.policy_sampler import PolicySampler
    from espalier.trainers.online.rollouts import Rollouts

    return {
        "rollout": (Rollouts, "get"),
        "sampling": (PolicySampler, "__call__"),
        "rewards": (Rollouts, "_rewards"),
        "reference": (Rollouts, "_score"),
    }


def arguments(folder: str, steps: int) -> list[str]:
    """Returns the arguments of `launch.train`."""
    methods = ("methods/preference/online_dpo", "methods/preference/reward_checkpoint")
    bindings = {
        "REWARD_CHECKPOINT": f"{folder}/reward",
        "PROMPT_FILES": f"{folder}/prompts.jsonl",
        "PROMPTS": CASE["prompts"],
        "MAX_PROMPT_LENGTH": CASE["prompt"][1],
        "MAX_NEW_TOKENS": CASE["completion"],
        "TRAIN_STEPS": steps,
        "LEARNING_RATE": CASE["learning_rate"],
        "BETA": CASE["beta"],
        "LOG_PERIOD": 1,
    }
    return dpo.flags(folder, "online", ("data/prompts", "runs/online", *methods), bindings)


def seconds(spans: dict[str, list[tuple[float, float]]]) -> dict[str, list[float]]:
    """Returns seconds by part for each step, without the warm-up and the last step; parts sum to the step's time.

    Args:
      spans: part -> beginning and end of each call; every part has one call per step.
    """
    begins = [begin for begin, _ in spans["rollout"]]
    parts = {part: np.array([end - begin for begin, end in x]) for part, x in spans.items()}
    rollout = parts.pop("rollout")
    parts["arrangement"] = rollout - sum(parts.values())
    return {
        **{part: values[WARM_UP:-1].tolist() for part, values in parts.items()},
        "update": (np.diff(begins) - rollout[:-1])[WARM_UP:].tolist(),
    }


def write(folder: str) -> None:
    """Writes the files of dpo.write, prompts.jsonl, and reward/, a reward model after one update."""
    dpo.write(folder)
    rng = np.random.default_rng(1)
    least, most = CASE["prompt"]
    with open(os.path.join(folder, "prompts.jsonl"), "w", encoding="utf-8") as file:
        for size in rng.integers(least, most + 1, CASE["prompts_of_file"]):
            file.write(json.dumps({"prompt": dpo.words(rng, size)}) + "\n")
    files = (*dpo.PAIR_FILES, "methods/preference/reward_model")
    bindings = {"BATCH_SIZE": 1, "TRAIN_STEPS": 1, "LEARNING_RATE": 1e-3}
    command = ["-m", "espalier.launch.train", *dpo.flags(folder, "reward", files, bindings)]
    environ = {**os.environ, "ESPALIER_CACHE": f"{folder}/cache"}
    subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, cwd=compare.ROOT, env=environ
    )
