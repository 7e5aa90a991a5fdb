"""DPO against TRL's DPOTrainer with a cached reference: step time, memory, and start-up time of a second run.

Both sides start from the same checkpoint in Hugging Face's layout and read the same file of pairs. Each runs its usual
command: `launch.train` with runs/preference.gin, and `DPOTrainer.train` with precompute_ref_log_probs. All sequences
have the same length, so neither side pads. Fresh processes alternate. TRL does not store the reference's
log-probabilities, so each of its runs computes them. Our timed runs reuse those from an earlier run.
"""

import contextlib
import functools
import io
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.benchmarks import case, compare

CASE: dict[str, Any] = {
    "num_layers": 6,
    "embed_dim": 256,
    "num_heads": 4,
    "mlp_dim": 704,
    "vocab_size": 8192,
    "prompt": 64,
    "completion": 192,  # tokens, EOS included
    "batch_size": 8,
    "pairs": 1000,
    "learning_rate": 1e-5,
    "beta": 0.1,
}
MODEL = ("num_layers", "embed_dim", "num_heads", "mlp_dim", "vocab_size")
WARM_UP = 3
PAIR_FILES = ("data/preferences", "runs/preference")
_SPECIAL = ("<pad>", "<s>", "</s>")


def run(*, rounds: int = 5, steps: int = 15) -> dict[str, Any]:
    """Alternates both sides `rounds` times, `steps` timed steps in each."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "ours": compare.ours("dpo", folder, WARM_UP + steps),
            "trl": compare.peer("torch/trl_torch.py", "dpo", folder, WARM_UP + steps),
        }
        write(folder)
        # Computes the reference's log-probabilities.
        first = compare.measured(commands["ours"])
        reports = compare.alternate_processes(commands, rounds)
    seconds = compare.each(
        reports, lambda report: statistics.median(np.diff(report["step_ends"])[WARM_UP - 1 :])
    )
    set_up = compare.each(reports, "set_up_s")
    return {
        "case": CASE,
        "speed_over_trl": compare.ratio(seconds["trl"], seconds["ours"]),
        "pairs_per_second": {
            side: [round(CASE["batch_size"] / s, 2) for s in values]
            for side, values in seconds.items()
        },
        # Time to load the pairs and score them with the reference; imports and compilation are excluded.
        "set_up_over_ours": compare.ratio(set_up["trl"], set_up["ours"]),
        "set_up_s": set_up,
        "first_set_up_s": first["set_up_s"],
        **facts(reports),
    }


def facts(reports: Mapping[str, list[compare.Report]]) -> dict[str, Any]:
    """Returns figures of memory and start-up, and the losses, of 'ours' and 'trl'."""
    memory, first_step = (compare.each(reports, key) for key in ("peak_memory_mb", "first_step_s"))
    return {
        "peak_memory_of_trls": compare.ratio(memory["ours"], memory["trl"]),
        "peak_memory_mb": memory,
        "first_step_over_ours": compare.ratio(first_step["trl"], first_step["ours"]),
        "first_step_s": first_step,
        "losses": {side: runs[0]["losses"] for side, runs in reports.items()},
        "other_load_cores": compare.each(reports, "other_load"),
        "contended": compare.contended(reports),
        "peer_versions": reports["trl"][0]["versions"],
    }


def side(folder: str, steps: str) -> dict[str, Any]:
    """Trains on the files of `write`; returns losses, times and memory."""
    from espalier.launch.preference import reference

    set_up = timed(reference, "make_stream")
    bindings = {
        "BATCH_SIZE": CASE["batch_size"],
        "TRAIN_STEPS": int(steps),
        "LEARNING_RATE": CASE["learning_rate"],
        "BETA": CASE["beta"],
        "LOG_PERIOD": 1,
        "config.TransformerConfig.remat": "dots",  # half of the activations, for a few per cent of the time
    }
    metrics = train(folder, "dpo", flags(folder, "dpo", PAIR_FILES, bindings))
    trained = [row for row in metrics if "loss" in row]
    return {**trained_report(trained), "set_up_s": set_up[0][1] - set_up[0][0]}


def trained_report(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns losses, times and memory of this process's run from its rows of metrics."""
    return {
        "losses": [row["loss"] for row in rows],
        "step_ends": [row["time"] for row in rows],
        "first_step_s": rows[0]["time"] - float(os.environ["BENCH_PROCESS_START"]),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }


def flags(folder: str, run: str, files: Sequence[str], bindings: Mapping[str, Any]) -> list[str]:
    """Returns the flags of `launch.train` for a new run FOLDER/RUN that starts from the imported model.

    `files` are gin files of t5x_configs without the extension, `bindings` values of macros besides the common ones.
    """
    values = {
        "MODEL_DIR": f"{folder}/{run}",
        "INITIAL_CHECKPOINT_PATH": f"{folder}/run",
        "TOKENIZER": f"{folder}/run/tokenizer",
        "WARMUP_STEPS": 0,
        **bindings,
    }
    if "data/preferences" in files:
        length = 2 * (CASE["prompt"] + CASE["completion"])
        values |= {"PAIRS": f"{folder}/pairs.jsonl", "PAIRS_VALIDATION_FRACTION": 0.0}
        values["TASK_FEATURE_LENGTHS"] = {"targets": length}
    paths = [f"{folder}/run/config.gin", *(f"t5x_configs/{file}.gin" for file in files)]
    settings = [f"--gin.{name}={value!r}" for name, value in values.items()]
    return [*(f"--gin_file={path}" for path in paths), *settings]


def train(folder: str, run: str, arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Runs `launch.train` anew in this process, without its output; returns the lines of metrics.jsonl."""
    os.environ["ESPALIER_CACHE"] = f"{folder}/cache"
    from espalier.launch import cli

    directory = pathlib.Path(folder, run)
    shutil.rmtree(directory, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main("Trains.", entry="espalier.launch.train:train", argv=arguments)
    if status:
        raise SystemExit(status)
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def timed(owner: Any, name: str) -> list[tuple[float, float]]:
    """Wraps a function of a class or module; returns a list that receives beginning and end of each later call."""
    function = getattr(owner, name)
    spans: list[tuple[float, float]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spans.append((began, time.perf_counter()))

    setattr(owner, name, call)
    return spans


def write(folder: str) -> None:
    """Writes the files of `write_run`, and pairs.jsonl."""
    rng = np.random.default_rng(0)
    write_run(folder, CASE, rng)
    sizes = (CASE["prompt"], CASE["completion"] - 1, CASE["completion"] - 1)
    with open(os.path.join(folder, "pairs.jsonl"), "w", encoding="utf-8") as file:
        for _ in range(CASE["pairs"]):
            texts = [words(rng, n) for n in sizes]
            row = {"prompt": texts[0], "chosen": f" {texts[1]}", "rejected": f" {texts[2]}"}
            file.write(json.dumps(row) + "\n")


def write_run(
    folder: str, case_: Mapping[str, Any], rng: np.random.Generator, template: str | None = None
) -> None:
    """Writes case.json, model/ in Hugging Face's layout with a chat template, and run/, the import of model/."""
    _write_model(pathlib.Path(folder, "model"), case_, rng, template)
    convert = ["-m", "espalier.launch.convert", f"--from_hf={folder}/model", f"--to={folder}/run"]
    subprocess.run([sys.executable, *convert], check=True, capture_output=True, cwd=compare.ROOT)
    pathlib.Path(folder, "case.json").write_text(json.dumps(case_))


def words(rng: np.random.Generator, size: int) -> str:
    """Returns a text of `size` random tokens."""
    return " ".join(f"w{i}" for i in rng.integers(len(_SPECIAL), CASE["vocab_size"], size))


def _write_model(
    folder: pathlib.Path, case_: Mapping[str, Any], rng: np.random.Generator, template: str | None
) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    config = case.hf_config(case_, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    case.write_model(folder, config, case.normal(rng, 0.02))
    ids = {f"w{i}": i for i in range(len(_SPECIAL), case_["vocab_size"])}
    ids |= {token: i for i, token in enumerate(_SPECIAL)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.save(os.fspath(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        **({} if template is None else {"chat_template": template}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
