"""Tiny Hugging Face folders, made without jax."""

import json

import ml_dtypes
import numpy as np

from espalier.model.hf.files.safetensors_files import SafetensorsReader, SafetensorsWriter

CONFIG = {
    "model_type": "cohere",
    "architectures": ["CohereForCausalLM"],
    "vocab_size": 12,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "logit_scale": 0.0625,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}
_LAYER = {
    "input_layernorm": (8,),
    "mlp.down_proj": (8, 16),
    "mlp.gate_proj": (16, 8),
    "self_attn.q_proj": (8, 8),
    "self_attn.k_proj": (4, 8),
}
_QK_NORMS = {"self_attn.q_norm": (2, 4), "self_attn.k_norm": (1, 4)}


def shapes(*, layers=5, vocab=12, norms=False, head=False):
    parts = {**_LAYER, **(_QK_NORMS if norms else {})}
    named = {f"model.layers.{i}.{k}.weight": s for i in range(layers) for k, s in parts.items()}
    ends = {"model.embed_tokens.weight": (vocab, 8), **named, "model.norm.weight": (8,)}
    return ends | ({"lm_head.weight": (vocab, 8)} if head else {})


def drawn(seed, shapes, dtype=np.float32, around=None):
    rng = np.random.default_rng(seed)
    return {
        name: ((0 if around is None else around[name]) + rng.normal(0, 0.1, shape)).astype(dtype)
        for name, shape in shapes.items()
    }


def write(folder, tensors, config=CONFIG, **layout):
    """Writes a folder with tensors and config.json, and returns its path as text."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    kinds = {name: (x.dtype, x.shape) for name, x in tensors.items()}
    with SafetensorsWriter(folder, kinds, shard_bytes=layout.get("shard", 10**9)) as writer:
        for name, tensor in tensors.items():
            writer.write_values(name, tensor, 0)
    return str(folder)


def pair(root, *, dtype=np.float32, count=2, **layout):
    """Writes models 'a', 'b', ... and returns their tensors."""
    sizes = shapes(**layout)
    models = [drawn(i, sizes, dtype) for i in range(count)]
    for name, tensors in zip("abcdef", models, strict=False):
        write(root / name, tensors)
    return models


def read(folder):
    with SafetensorsReader(folder) as reader:
        return {name: reader.read(name) for name in reader.tensors}


BF16 = np.dtype(ml_dtypes.bfloat16)
