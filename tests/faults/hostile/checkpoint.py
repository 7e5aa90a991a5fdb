"""A small checkpoint in the form of Hugging Face's, for the rows that damage it or add to it."""

import json
import pathlib
from typing import Any

import numpy as np

from tests.faults import calls
from tests.faults.table import Bench, Silent, Unclear

_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 11,
}


def tensors() -> dict[str, np.ndarray]:
    """Returns the weights of the checkpoint by name."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (11, 8), "model.norm": (8,)}
    shapes["lm_head"] = (11, 8)
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {layer + "input_layernorm": (8,), layer + "post_attention_layernorm": (8,)}
        shapes |= {f"{layer}self_attn.{x}_proj": (8, 8) for x in "qo"}
        shapes |= {f"{layer}self_attn.{x}_proj": (4, 8) for x in "kv"}
        shapes |= {f"{layer}mlp.{x}_proj": (12, 8) for x in ("gate", "up")}
        shapes[layer + "mlp.down_proj"] = (8, 12)
    random_ = np.random.default_rng(0)
    return {f"{n}.weight": random_.normal(size=s).astype(np.float32) for n, s in shapes.items()}


def write(folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """Writes a small Llama checkpoint; a change to None removes a field of its config."""
    import safetensors.numpy

    folder.mkdir(parents=True)
    config = {k: v for k, v in {**_CONFIG, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors(), folder / "model.safetensors")
    return folder


def check_refused(bench: Bench, folder: pathlib.Path, *words: str) -> None:
    """Imports a checkpoint, which must be refused and leave nothing."""
    target = bench.folder / "run"
    calls.refused("convert", [f"--from_hf={folder}", f"--to={target}"], *words)
    if target.exists():
        raise Unclear("a refused import has left a run")


def check_not_executed(bench: Bench) -> None:
    """Raises Silent if code of the checkpoint has made its folder."""
    if (bench.folder / "executed").exists():
        raise Silent("the pickle was executed")
