"""Config files and weights of the families, for the tests of this folder."""

import json
import pathlib

import numpy as np

from espalier.model.hf import registry

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CASES = sorted((GOLDENS / "parity").glob("*.npz"))
ENCODER_DECODERS = {"t5", "mt5"}  # whose rows have inputs: t5_test.py
PUBLISHED = json.loads((GOLDENS / "published_configs.json").read_text())
# Smaller than any published model; tests of errors change one field.
SMALL = {
    name: {
        **config,
        "hidden_size": 8,
        "intermediate_size": 5,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 11,
        "head_dim": 4,
    }
    for name, config in PUBLISHED.items()
    if name not in ("gpt2", "pythia_160m")
}
for config in SMALL.values():  # what lists all layers of the published model
    for key in ("layer_types", "no_rope_layers"):
        config.pop(key, None)
SMALL["pythia_160m"] = PUBLISHED["pythia_160m"] | {
    **{"hidden_size": 8, "intermediate_size": 5, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "vocab_size": 11, "rotary_pct": 0.5},
}
SMALL["gpt2"] = {**PUBLISHED["gpt2"], "n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 11}


def load(path):
    with np.load(path) as file:
        config = json.loads(str(file["config"]))
        tensors = {k.partition("/")[2]: file[k] for k in file if k.startswith("tensor/")}
    family = registry.family_of_config(config)
    return config, family, family.model(config), tensors
