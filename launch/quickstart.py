"""Runs a small code-mix pre-training ablation on real text and code, and compares its arms.

Three models see the same number of tokens: text only, text and code in equal parts, or code first and
then text. Prints held-out loss by domain, a plot, samples of each model and the run directories.
A restarted command resumes. Example:

  espalier quickstart --out=runs/quickstart
"""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch import cli
from espalier.launch.config.setting_flags import File, Folder

ARMS = ("text", "balanced", "code_then_text")
PROMPTS = ("The ", "def ")


def compare(*, out: Folder = "runs/quickstart", gin_file: Sequence[File] = ()) -> Mapping[str, Any]:
    """Trains the arms that are not done yet, and compares all arms.

    Args:
      out: write the run directories into this folder.
      gin_file: gin file that changes all arms, read after theirs; repeatable.
    """
    from espalier.launch.config import gin_config
    from espalier.launch.report.__main__ import report

    started = time.monotonic()
    runs = {}
    for number, arm in enumerate(ARMS, 1):
        directory = os.path.join(out, arm)
        print(f"\n== arm {number} of {len(ARMS)}: {arm.replace('_', ' ')} ==", flush=True)
        config = gin_config.load(
            [f"t5x_configs/experiments/code_mix/quickstart_{arm}.gin", *gin_file],
            [f"MODEL_DIR={directory!r}"],
            entry="espalier.launch.train:train",
        )
        result = config.entry(started=time.monotonic())
        if result["interrupted"]:
            print("Interrupted; `make quickstart` resumes here.")
            return result
        runs[arm] = directory
    print()
    report(runs, out)
    for arm, directory in runs.items():
        for prompt, text in _samples(directory):
            print(f"\nsample of {arm.replace('_', ' ')}, continuing {prompt!r}:\n{prompt}{text}")
    minutes = (time.monotonic() - started) / 60
    print(f"\nplot   {os.path.join(out, 'report.png')}")
    for directory in runs.values():
        print(f"run    {directory}")
    print(f"{minutes:.1f} minutes")
    return {}


def _samples(directory: str) -> list[tuple[str, str]]:
    """Returns a sampled continuation of each prompt by the newest checkpoint of a run."""
    from espalier.launch.inference import generate
    from espalier.launch.load import load_run
    from espalier.trainers.decoding.sampling import Sampling
    from espalier.trainers.decoding.settings import Settings

    rows = generate.generate(
        load_run.config_of(directory),
        [(f"prompt {prompt!r}", {"text": prompt}) for prompt in PROMPTS],
        checkpoint=directory,
        token_healing=True,
        settings=Settings(max_new_tokens=60, sampling=Sampling(temperature=0.7, top_p=0.9)),
    )
    return [(row["prompt"], row["text"]) for row in rows]


main = cli.command(__doc__, "quickstart", compare)

if __name__ == "__main__":
    raise SystemExit(main())
