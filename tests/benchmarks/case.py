"""Models, weights and rows of both sides of the benchmarks."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

# The sizes in t5x_configs/models/bench_llama.gin are the same.
CASE: dict[str, Any] = {
    "num_layers": 6,
    "embed_dim": 256,
    "num_heads": 4,
    "mlp_dim": 704,
    "vocab_size": 8192,
    "length": 512,
    "batch_size": 8,
    "norm_eps": 1e-6,
    "rope_base": 10_000.0,
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.95,
    "adam_eps": 1e-8,
    "weight_decay": 0.1,
}
# The model of the generation benchmarks.
DECODE: dict[str, Any] = {
    "num_layers": 8,
    "embed_dim": 384,
    "num_heads": 6,
    "num_kv_heads": 6,
    "mlp_dim": 1024,
    "vocab_size": 8192,
    "norm_eps": 1e-6,
    "rope_base": 10_000.0,
    "max_length": 256,
}
_HF_NAMES = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "mlp_dim": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "length": "max_position_embeddings",
    "max_length": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
}
# Weights of training and generation are drawn by layer and in this order, as in recorded runs.
_DRAWN = ("embed", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def hf_config(case: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Returns the config.json of a model with the sizes of a case: a Llama, except for `settings`."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_key_value_heads": case.get("num_heads"),
        "hidden_act": "silu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **{_HF_NAMES[name]: size for name, size in case.items() if name in _HF_NAMES},
        **settings,
    }


def normal(rng: np.random.Generator, std: float) -> Callable[[str, tuple[int, ...]], np.ndarray]:
    """Returns the function that draws weights for `write_model`; scales of norms are 1."""
    return lambda _, shape: np.ones(shape) if len(shape) == 1 else rng.normal(0, std, shape)


def write_model(
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    values: Callable[[str, tuple[int, ...]], np.ndarray],
    *,
    order: Callable[[str], Any] | None = None,
) -> int:
    """Writes a checkpoint in Hugging Face's layout; returns the bytes of its weights.

    Args:
      folder: is created.
      config: config.json.
      values: returns a tensor by name and shape, or its first rows, which are then repeated.
      order: sort key of names; tensors are written in this order.
    """
    from espalier.model.hf.files.safetensors_files import SafetensorsWriter
    from espalier.model.hf.plan import FLOATS
    from espalier.model.hf.registry import family_of_config

    family, dtype = family_of_config(config), FLOATS[config["torch_dtype"]]
    shapes = family.shapes(family.model(config))
    tensors = {name: (dtype, shapes[name]) for name in sorted(shapes, key=order)}
    os.mkdir(folder)
    pathlib.Path(folder, "config.json").write_text(json.dumps(config))
    with SafetensorsWriter(os.fspath(folder), tensors, shard_bytes=2 * 10**9) as writer:
        for name, (_, shape) in tensors.items():
            rows = values(name, shape).astype(dtype, copy=False)
            for first in range(0, shape[0], len(rows)):
                writer.write(name, rows[: shape[0] - first], first)
        return sum(info.nbytes for info in writer.tensors.values())


def write_training(folder: str, *, steps: int, **settings: Any) -> None:
    """Writes case.json, with `settings` in it, model/ and tokens.npy [steps, B, T] of the training benchmarks."""
    rng = np.random.default_rng(0)
    write_llama(folder, CASE | settings, rng, std=0.02)
    # Zipf-distributed ids, so that the loss falls within a few steps.
    shape = (steps, CASE["batch_size"], CASE["length"])
    tokens = (rng.zipf(1.2, shape) * 7919 % CASE["vocab_size"]).astype(np.int32)
    np.save(os.path.join(folder, "tokens.npy"), tokens)


def write_decoding(folder: str, case: Mapping[str, Any]) -> None:
    """Writes case.json and model/ of the generation benchmarks."""
    # Large weights, so that logits are far from uniform and no choice is a tie.
    write_llama(folder, case, np.random.default_rng(0), std=0.05)


def write_llama(
    folder: str, case: Mapping[str, Any], rng: np.random.Generator, *, std: float
) -> None:
    """Writes case.json, and model/ with random weights."""

    def drawn(name: str) -> tuple[list[int], int]:
        layer = [int(part) for part in name.split(".") if part.isdigit()]
        return layer, next((i for i, part in enumerate(_DRAWN) if part in name), -1)

    pathlib.Path(folder, "case.json").write_text(json.dumps(dict(case)))
    write_model(os.path.join(folder, "model"), hf_config(case), normal(rng, std), order=drawn)


def prompts(case: Mapping[str, Any], batch: int, length: int) -> list[list[int]]:
    """Returns random prompts, the same on both sides."""
    return np.random.default_rng(1).integers(3, case["vocab_size"], (batch, length)).tolist()


def byte_level_bpe(texts: Iterable[str], size: int, end: str) -> Any:
    """Returns a byte-level BPE tokenizer of `size` ids, trained on texts; the first id is the special token `end`."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class RandomRows:
    """A training stream of random token ids that needs no corpus; the cost of a step does not depend on the ids."""

    source_names = ("random",)

    def __init__(self, batch_size: int, length: int, vocab_size: int):
        self.batch_size, self.length, self._vocab_size = batch_size, length, vocab_size

    def batch(self, step: int, lo: int, hi: int) -> dict[str, np.ndarray]:
        shape = (self.batch_size, self.length)
        ids = np.random.default_rng(step).integers(4, self._vocab_size, shape).astype(np.int32)
        whole = {
            "decoder_input_tokens": np.roll(ids, 1, axis=1),
            "decoder_target_tokens": ids,
            "decoder_loss_weights": np.ones(shape, np.float32),
            "decoder_segment_ids": np.ones(shape, np.int32),
            "decoder_positions": np.broadcast_to(np.arange(self.length, dtype=np.int32), shape),
            "source_ids": np.zeros(self.batch_size, np.int32),
        }
        return {name: array[lo:hi] for name, array in whole.items()}
