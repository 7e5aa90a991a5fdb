"""lm-evaluation-harness with this project's model against its own Hugging Face backend: requests per second.

Both sides have the same checkpoint and requests and alternate in fresh processes. The time is that of the first
answer to all requests. It includes compilation, with compiled programs cached on disk, but not loading the model. The
peer is first measured with several batch sizes; the fastest one is used. The result reports whether the answers are the
same. The peer runs in .venv-lm-eval, made by `make peers-lm-eval`.
"""

import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from launch.benchmarks import pairs, peers

PYTHON = peers.ROOT / ".venv-lm-eval" / "bin" / "python"
SIDE = peers.ROOT / "launch" / "benchmarks" / "jax" / "lm_eval_side.py"
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
KINDS = ("multiple_choice", "generate_until")


def run(
    *,
    rounds: int = 5,
    documents: int = 120,
    prompts: int = 32,
    new_tokens: int = 64,
    peer_batches: Sequence[int] = (1, 8, 32),
    sizes: Mapping[str, int] = SIZES,
) -> dict[str, Any]:
    """Alternates both sides `rounds` times on `documents` four-choice questions and `prompts` prompts to continue."""
    if not PYTHON.exists():
        raise peers.PeerError(f"{PYTHON} is missing: run `make peers-lm-eval` first.")
    with tempfile.TemporaryDirectory() as folder:
        _write(folder, sizes, documents, prompts, new_tokens)
        ours = [sys.executable, "-m", "launch.benchmarks.jax.lm_eval_side", folder, "ours", "0"]
        theirs = [str(PYTHON), "-P", str(SIDE), folder, "peer"]
        first = peers.measured(ours)  # fills the cache of compiled programs
        choices = {str(n): peers.measured([*theirs, str(n)]) for n in peer_batches}
        best = {kind: min(choices, key=lambda n: choices[n][kind]["seconds"]) for kind in KINDS}
        reports: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
        for _ in range(rounds):
            reports["ours"].append(peers.measured(ours))
            answers = {n: peers.measured([*theirs, n]) for n in sorted(set(best.values()))}
            reports["peer"].append({kind: answers[best[kind]][kind] for kind in KINDS})
        return {
            "case": {
                **sizes,
                "documents": documents,
                "choices": 4,
                "prompts": prompts,
                "new": new_tokens,
            },
            "peer_versions": choices[str(peer_batches[0])]["versions"],
            "other_load": [report["other_load"] for report in reports["ours"]],
            **{kind: _compare(kind, reports, best[kind], first) for kind in KINDS},
        }


def _compare(
    kind: str,
    reports: Mapping[str, Sequence[Mapping[str, Any]]],
    batch: str,
    first: Mapping[str, Any],
) -> dict[str, Any]:
    seconds = {
        side: [report[kind]["seconds"] for report in found] for side, found in reports.items()
    }
    mine, theirs = (reports[side][0][kind]["answers"] for side in ("ours", "peer"))
    count = len(mine)
    found: dict[str, Any] = {
        "speed_over_peer": pairs.ratio(seconds["peer"], seconds["ours"]),
        "requests_per_second": {
            side: [round(count / s, 2) for s in values] for side, values in seconds.items()
        },
        "ours_again_in_the_same_process": [
            round(count / report[kind]["again"], 2) for report in reports["ours"]
        ],
        "ours_without_compiled_programs": round(count / first[kind]["seconds"], 2),
        "peer_batch_size": int(batch),
    }
    if kind == "generate_until":
        same = sum(answer == peer_answer for answer, peer_answer in zip(mine, theirs, strict=True))
        return {**found, "same_texts": same / count}
    differences = [
        abs(answer[0] - peer_answer[0]) for answer, peer_answer in zip(mine, theirs, strict=True)
    ]
    same = all(
        answer[1] == peer_answer[1] for answer, peer_answer in zip(mine, theirs, strict=True)
    )
    return {**found, "largest_difference": max(differences), "same_greedy": same}


def _write(
    folder: str, sizes: Mapping[str, int], documents: int, prompts: int, new_tokens: int
) -> None:
    """Writes model/ (a Hugging Face checkpoint), run/ (the import of model/) and requests.json."""
    from launch.weights import import_weights
    from model.hf.families import family_of_config

    model = pathlib.Path(folder, "model")
    model.mkdir()
    text = _text()
    vocab = _write_tokenizer(model, text, sizes["vocab_size"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **sizes,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 0}')
    _write_weights(model, family_of_config(config), config)
    import_weights.import_hf(os.fspath(model), os.path.join(folder, "run"))
    requests = _requests(text, documents, prompts, new_tokens)
    pathlib.Path(folder, "requests.json").write_text(json.dumps(requests))


def _write_weights(folder: pathlib.Path, family: Any, config: Mapping[str, Any]) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    shapes = family.shapes(family.model(config))
    # Large weights, so that logits are far from uniform and no choice is a tie.
    tensors = {
        name: (np.ones(shape) if "norm" in name else rng.normal(0, 0.05, shape)).astype(np.float32)
        for name, shape in sorted(shapes.items())
    }
    save_file(tensors, folder / "model.safetensors")


def _text() -> str:
    """Returns the text of Python's language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _write_tokenizer(folder: pathlib.Path, text: str, size: int) -> int:
    """Trains and writes a byte-level BPE tokenizer; returns its number of entries."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.save(os.fspath(folder / "tokenizer.json"))
    names = {f"{name}_token": "</s>" for name in ("bos", "eos", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


def _requests(text: str, documents: int, prompts: int, new_tokens: int) -> dict[str, Any]:
    """Returns arguments of all requests by kind: passages of 20 to 120 words, with choices or generation settings."""
    rng = np.random.default_rng(1)
    words = text.split()

    def passage(low: int, high: int) -> str:
        length = int(rng.integers(low, high))
        start = int(rng.integers(0, len(words) - length))
        return " ".join(words[start : start + length])

    choices: list[list[Any]] = []
    for _ in range(documents):
        context = f"Question: {passage(20, 120)}\nAnswer:"
        choices += [[context, f" {passage(1, 9)}"] for _ in range(4)]
    options = {"until": ["\n\n"], "max_gen_toks": new_tokens, "do_sample": False}
    return {
        "multiple_choice": choices,
        "generate_until": [[passage(20, 120), options] for _ in range(prompts)],
    }
