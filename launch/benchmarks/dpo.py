"""DPO against TRL's DPOTrainer with a cached reference: step time, memory, and start-up time of a second run.

Both sides start from the same checkpoint in Hugging Face's layout and read the same file of pairs. Each runs its usual
command: `launch.train` with runs/preference.gin, and `DPOTrainer.train` with precompute_ref_log_probs. All sequences
have the same length, so neither side pads. Fresh processes alternate. TRL does not store the reference's
log-probabilities, so each of its runs computes them. Our timed runs reuse those from an earlier run.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np

from launch.benchmarks import pairs, peers

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
_SPECIAL = ("<pad>", "<s>", "</s>")


def run(*, rounds: int = 5, steps: int = 15) -> dict[str, Any]:
    """Alternates both sides `rounds` times, `steps` timed steps in each."""
    reports: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        steps_of = WARM_UP + steps
        commands = {
            "ours": [sys.executable, "-m", "launch.benchmarks.jax.dpo_jax", folder, str(steps_of)],
            "trl": peers.peer_command("dpo_torch.py", folder, str(steps_of)),
        }
        first = peers.measured(commands["ours"])  # computes the reference's log-probabilities
        for _ in range(rounds):
            for side, command in commands.items():
                reports[side].append(peers.measured(command))
    seconds = {
        side: [statistics.median(np.diff(r["step_ends"])[WARM_UP - 1 :]) for r in runs]
        for side, runs in reports.items()
    }
    return {
        "case": CASE,
        "speed_over_trl": pairs.ratio(seconds["trl"], seconds["ours"]),
        "pairs_per_second": {
            side: [round(CASE["batch_size"] / s, 2) for s in values]
            for side, values in seconds.items()
        },
        "peak_memory_of_trls": pairs.ratio(
            *(_of("peak_memory_mb", reports, s) for s in ("ours", "trl"))
        ),
        "peak_memory_mb": {side: _of("peak_memory_mb", reports, side) for side in reports},
        # Time to load the pairs and score them with the reference; imports and compilation are excluded.
        "set_up_over_ours": pairs.ratio(*(_of("set_up_s", reports, s) for s in ("trl", "ours"))),
        "set_up_s": {side: _of("set_up_s", reports, side) for side in reports},
        "first_set_up_s": first["set_up_s"],
        "first_step_over_ours": pairs.ratio(
            *(_of("first_step_s", reports, s) for s in ("trl", "ours"))
        ),
        "first_step_s": {side: _of("first_step_s", reports, side) for side in reports},
        "losses": {side: runs[0]["losses"] for side, runs in reports.items()},
        "other_load_cores": {
            side: [r["other_load"] for r in runs] for side, runs in reports.items()
        },
        "contended": any(
            r["other_load"] > peers.CONTENDED for runs in reports.values() for r in runs
        ),
        "peer_versions": reports["trl"][0]["versions"],
    }


def _of(key: str, found: dict[str, list[dict[str, Any]]], side: str) -> list[float]:
    return [report[key] for report in found[side]]


def write(folder: str) -> None:
    """Writes case.json, pairs.jsonl, model/ in Hugging Face's layout, and run/, the import of model/."""
    rng = np.random.default_rng(0)
    write_run(folder, rng)
    with open(os.path.join(folder, "case.json"), "w", encoding="utf-8") as file:
        json.dump(CASE, file)
    sizes = (CASE["prompt"], CASE["completion"] - 1, CASE["completion"] - 1)
    with open(os.path.join(folder, "pairs.jsonl"), "w", encoding="utf-8") as file:
        for _ in range(CASE["pairs"]):
            texts = [words(rng, n) for n in sizes]
            row = {"prompt": texts[0], "chosen": f" {texts[1]}", "rejected": f" {texts[2]}"}
            file.write(json.dumps(row) + "\n")


def write_run(folder: str, rng: np.random.Generator) -> None:
    """Writes model/ in Hugging Face's layout, and run/, the import of model/."""
    model = pathlib.Path(folder, "model")
    _write_model(model, rng)
    convert = [sys.executable, "-m", "launch.convert", f"--from_hf={model}", f"--to={folder}/run"]
    subprocess.run(convert, check=True, capture_output=True, cwd=peers.ROOT)


def words(rng: np.random.Generator, size: int) -> str:
    """Returns a text of `size` random tokens."""
    return " ".join(f"w{i}" for i in rng.integers(len(_SPECIAL), CASE["vocab_size"], size))


def _write_model(folder: pathlib.Path, rng: np.random.Generator) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers

    from model.hf.families import family_of_config
    from model.hf.files.safetensors_files import SafetensorsWriter

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": CASE["vocab_size"],
        "hidden_size": CASE["embed_dim"],
        "intermediate_size": CASE["mlp_dim"],
        "num_hidden_layers": CASE["num_layers"],
        "num_attention_heads": CASE["num_heads"],
        "num_key_value_heads": CASE["num_heads"],
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    family = family_of_config(config)
    shapes = sorted(family.shapes(family.model(config)).items())
    described = {name: (np.dtype(np.float32), shape) for name, shape in shapes}
    with SafetensorsWriter(os.fspath(folder), described, shard_bytes=2**32) as writer:
        for name, shape in shapes:
            values = np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.02, shape)
            writer.write(name, values.astype(np.float32), 0)
    ids = {f"w{i}": i for i in range(len(_SPECIAL), CASE["vocab_size"])}
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
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
