"""The toy model of sft.json: its configuration, its weights, and its directory as a Hugging Face checkpoint."""

import json
import pathlib

import numpy as np

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def weights(config):
    """The weights of the model by name, in this order."""
    rng = np.random.default_rng(0)
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = D // config["num_attention_heads"]
    K = config["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": (V, D)}
    for i in range(config["num_hidden_layers"]):
        sizes = {"q": (D, D), "k": (K, D), "v": (K, D), "o": (D, D)}
        shapes |= {f"model.layers.{i}.self_attn.{n}_proj.weight": s for n, s in sizes.items()}
        sizes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        shapes |= {f"model.layers.{i}.mlp.{n}_proj.weight": s for n, s in sizes.items()}
    drawn = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    names = [
        f"model.layers.{i}.{n}.weight" for i in range(config["num_hidden_layers"]) for n in norms
    ]
    return drawn | {name: np.ones(D, np.float32) for name in (*names, "model.norm.weight")}


def write(folder, tokenizer, template):
    """Writes the model with a tokenizer.json and a chat template to a new directory."""
    from safetensors import numpy as safetensors

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    safetensors.save_file(weights(CONFIG), folder / "model.safetensors")
    for name, value in (
        ("config.json", CONFIG | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}),
        ("tokenizer.json", tokenizer),
        (
            "tokenizer_config.json",
            {**TOKENS, "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"},
        ),
    ):
        (folder / name).write_text(json.dumps(value), "utf-8")
