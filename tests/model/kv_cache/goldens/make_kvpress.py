"""Writes kvpress.npz: what kvpress 0.5.5 keeps of a prompt, with the weights of a random Llama.

Run from the repository root with an environment that has kvpress (and with it torch and transformers):

  .venv-kvpress/bin/python tests/model/kv_cache/goldens/make_kvpress.py

Shapes: L layers, B = 1 prompt, T tokens, S slots, K key/value heads.
"""

import pathlib

import kvpress
import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

LENGTH, RATIO = 40, 0.6

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    initializer_range=0.3,
    attn_implementation="sdpa",
)
model = LlamaForCausalLM(config).float().eval()
tokens = torch.randint(0, 61, (1, LENGTH))
found = {"tokens": tokens.numpy()}
for name, value in model.state_dict().items():
    found["weights/" + name] = value.numpy()


def keys(press):
    """Keys [B, K, S, H] of every layer after the prompt."""
    cache = DynamicCache()
    with torch.no_grad(), press(model) if press else torch.no_grad():
        out = model(tokens, past_key_values=cache)
    return [layer.keys for layer in cache.layers], out.logits


whole, logits = keys(None)
found["logits"] = logits[0, -1].numpy()
for name, press in {
    "snapkv": kvpress.SnapKVPress(RATIO, window_size=6, kernel_size=5),
    "tova": kvpress.TOVAPress(RATIO),
}.items():
    for layer, kept in enumerate(keys(press)[0]):
        # A kept key is found among all keys by its values.
        same = (kept[:, :, :, None] == whole[layer][:, :, None]).all(-1)
        assert (same.sum(-1) == 1).all()
        found[f"{name}/{layer}"] = np.sort(same.int().argmax(-1)[0].numpy(), axis=-1)
path = pathlib.Path(__file__).with_name("kvpress.npz")
np.savez_compressed(path, **found)
print(path, path.stat().st_size, {k: v.shape for k, v in found.items() if "weights" not in k})
