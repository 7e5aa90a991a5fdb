"""Writes train_step.json: the numbers of the first updates of tests/launch/programs/local_text.gin.

  JAX_PLATFORMS=cpu python tests/launch/goldens/make_train_step.py

Run it only after a change that is meant to alter the numbers: initialisers, model, data order, optimiser,
schedule. Say in the commit which of them changed and why.
"""

import json
import pathlib
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
NUMBERS = ("loss", "grad_norm", "update_norm", "param_norm")
BINDINGS = (
    "TRAIN_STEPS=3",
    "train.train.log_period=1",
    "schedules.cosine.warmup_steps=0",
)


def numbers(metrics_file):
    """One mapping for each update."""
    from espalier.trainers.telemetry.metric_writers import read_jsonl

    return [{name: row[name] for name in NUMBERS} for row in read_jsonl(metrics_file)]


def main():
    sys.path[:0] = [str(HERE.parents[2]), str(HERE.parent / "programs")]
    from espalier.launch.config import gin_config

    with tempfile.TemporaryDirectory() as folder:
        given = (f"MODEL_DIR={folder + '/run'!r}", f"DIRECTORY={folder + '/text'!r}")
        gin_config.load(
            [str(HERE.parent / "programs" / "local_text.gin")],
            [*given, *BINDINGS],
            entry="espalier.launch.train:train",
        ).entry()
        found = numbers(f"{folder}/run/metrics.jsonl")
    (HERE / "train_step.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
