"""This project's side of the benchmark `dpo`: a usual `launch.train` command.

  python -m launch.benchmarks.jax.dpo_jax FOLDER STEPS

Reads FOLDER, written by dpo.py, and prints one line of JSON.
"""

import contextlib
import io
import json
import os
import pathlib
import resource
import shutil
import sys
import time

from launch import environment


def main(folder: str, steps: int) -> None:
    environment.restart_with_huge_pages()
    environment.prepare()
    os.environ["ESPALIER_CACHE"] = f"{folder}/cache"
    from launch import cli
    from launch.run import reference

    case = json.loads(pathlib.Path(folder, "case.json").read_text())
    run = pathlib.Path(folder, "dpo")
    shutil.rmtree(run, ignore_errors=True)
    length = case["prompt"] + case["completion"]
    bindings = {
        "MODEL_DIR": str(run),
        "INITIAL_CHECKPOINT_PATH": f"{folder}/run",
        "PAIRS": f"{folder}/pairs.jsonl",
        "PAIRS_VALIDATION_FRACTION": 0.0,
        "TOKENIZER": f"{folder}/run/tokenizer",
        "TASK_FEATURE_LENGTHS": {"targets": 2 * length},
        "DOCUMENT_START": None,
        "BATCH_SIZE": case["batch_size"],
        "TRAIN_STEPS": steps,
        "WARMUP_STEPS": 0,
        "LEARNING_RATE": case["learning_rate"],
        "BETA": case["beta"],
        "LOG_PERIOD": 1,
        "config.TransformerConfig.remat": "dots",  # half of the activations, for a few per cent of the time
    }
    files = (f"{folder}/run/config.gin", "t5x_configs/data/preferences.gin")
    arguments = [f"--gin_file={file}" for file in (*files, "t5x_configs/runs/preference.gin")]
    arguments += [f"--gin.{name}={value!r}" for name, value in bindings.items()]
    set_up = _timed(reference, "make_stream")
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main("Trains.", entry="launch.train:train", argv=arguments)
    if status:
        raise SystemExit(status)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "loss" in row]
    report = {
        "losses": [row["loss"] for row in trained],
        "step_ends": [row["time"] for row in trained],
        "first_step_s": trained[0]["time"] - float(os.environ["BENCH_PROCESS_START"]),
        "set_up_s": set_up[0],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }
    print(json.dumps(report))


def _timed(module, name: str) -> list[float]:
    """Wraps a function of a module; returns a list that receives the seconds of each later call."""
    function, seconds = getattr(module, name), []

    def call(**given):
        began = time.perf_counter()
        try:
            return function(**given)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(module, name, call)
    return seconds


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
