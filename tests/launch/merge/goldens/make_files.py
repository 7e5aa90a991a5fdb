"""Writes files.npz: what mergekit 0.1.5 writes for a few configurations of tiny Llama folders.

Run from the repository root with an environment that has mergekit (and with it torch):

  .venv-peers/bin/python tests/launch/merge/goldens/make_files.py

The last norm and the head never get a list, of which mergekit takes the first value there, and this project the last.
"""

import json
import pathlib
import tempfile

import numpy as np
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.numpy import load_file, save_file

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 7,
    "hidden_size": 4,
    "intermediate_size": 6,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
LAYER = {
    "input_layernorm": (4,),
    "post_attention_layernorm": (4,),
    "self_attn.q_proj": (4, 4),
    "self_attn.k_proj": (2, 4),
    "self_attn.v_proj": (2, 4),
    "self_attn.o_proj": (4, 4),
    "mlp.gate_proj": (6, 4),
    "mlp.up_proj": (6, 4),
    "mlp.down_proj": (4, 6),
}
ENDS = {"model.embed_tokens": (7, 4), "model.norm": (4,), "lm_head": (7, 4)}

# A path that starts with @ is a folder of this name.
CASES = {
    "slerp of slices, by layer and part": """
slices:
  - sources:
      - {model: '@a', layer_range: [0, 4]}
      - {model: '@b', layer_range: [0, 4]}
merge_method: slerp
base_model: '@a'
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.4
""",
    "ties, by layer and part": """
models:
  - model: '@b'
    parameters:
      density:
        - {filter: self_attn, value: [1, 0.7, 0.1]}
        - {value: 0.6}
      weight: 0.9
  - model: '@c'
    parameters:
      density: 0.5
      weight:
        - {filter: lm_head, value: 0.3}
        - {filter: model.norm, value: 0.2}
        - {filter: down_proj, value: 0.7}
        - {value: [0.1, 0.3, 0.7, 1]}
merge_method: ties
base_model: '@a'
parameters: {normalize: true, lambda: 0.8}
""",
    "linear of several slices": """
slices:
  - sources:
      - {model: '@a', layer_range: [0, 3], parameters: {weight: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}}
      - {model: '@b', layer_range: [1, 4]}
    parameters: {weight: 0.3}
  - sources:
      - {model: '@c', layer_range: [2, 4]}
      - {model: '@a', layer_range: [1, 3], parameters: {weight: 0.2}}
parameters:
  weight:
    - {filter: q_proj, value: [0.6, 0.9]}
    - {value: 0.7}
merge_method: linear
""",
    "passthrough, scaled": """
slices:
  - sources: [{model: '@a', layer_range: [0, 2]}]
  - sources:
      - model: '@b'
        layer_range: [1, 4]
        parameters:
          scale:
            - {filter: o_proj, value: [0, 0.5]}
            - {filter: down_proj, value: 0.0}
            - {value: 1.0}
merge_method: passthrough
""",
}


def main() -> None:
    rng = np.random.default_rng(0)
    layers = {f"model.layers.{i}.{name}": shape for i in range(4) for name, shape in LAYER.items()}
    shapes = {f"{name}.weight": shape for name, shape in {**ENDS, **layers}.items()}
    base = {name: rng.normal(0, 1, shape) for name, shape in shapes.items()}
    arrays = {}
    with tempfile.TemporaryDirectory() as root:
        for model in "abc":
            tensors = {
                name: (base[name] + rng.normal(0, 0.3, shape)).astype(np.float32)
                for name, shape in shapes.items()
            }
            folder = pathlib.Path(root, model)
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(CONFIG))
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            arrays |= {f"inputs/{model}/{name}": x for name, x in tensors.items()}
        for number, (case, text) in enumerate(CASES.items()):
            out = pathlib.Path(root, str(number))
            config = MergeConfiguration.model_validate(
                yaml.safe_load(text.replace("@", f"{root}/"))
            )
            run_merge(config, str(out), MergeOptions(copy_tokenizer=False, quiet=True))
            for file in out.glob("*.safetensors"):
                arrays |= {f"{case}/{name}": x for name, x in load_file(file).items()}
    for name, content in (("config", CONFIG), ("cases", CASES)):
        arrays[name] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    np.savez_compressed(pathlib.Path(__file__).with_name("files.npz"), **arrays)


if __name__ == "__main__":
    main()
