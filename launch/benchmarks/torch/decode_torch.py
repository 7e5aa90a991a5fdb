"""The peer's side of the generation benchmarks; runs under .venv-peers, never imported by the project.

  .venv-peers/bin/python -P launch/benchmarks/torch/decode_torch.py FOLDER

Reads case.json and weights.npz in FOLDER, then answers requests on standard input (see decode_case.py).
"""

import json
import os
import sys
import time

import numpy as np
import torch
import transformers


class Peer:
    """The operations of decode_jax.Ours, with transformers and kvpress."""

    def __init__(self, folder):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        with open(os.path.join(folder, "case.json"), encoding="utf-8") as file:
            self._sizes = sizes = json.load(file)
        config = transformers.LlamaConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["embed_dim"],
            intermediate_size=sizes["mlp_dim"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"],
            num_key_value_heads=sizes["num_kv_heads"],
            max_position_embeddings=sizes["max_length"],
            rms_norm_eps=sizes["norm_eps"],
            rope_theta=sizes["rope_base"],
            tie_word_embeddings=True,
            attn_implementation="sdpa",
        )
        self._model = transformers.LlamaForCausalLM(config).float().eval()
        with np.load(os.path.join(folder, "weights.npz")) as weights:
            named = {name: torch.from_numpy(weights[name]) for name in weights.files}
        result = self._model.load_state_dict(named, strict=False)
        assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}, result
        self._model.tie_weights()

    def _prompts(self, batch, length):
        # The same as decode_case.prompts, which cannot be imported here.
        ids = np.random.default_rng(1).integers(3, self._sizes["vocab_size"], (batch, length))
        return torch.from_numpy(ids)

    def generate(self, *, batch, length, new, cache="dynamic", tokens=False):
        """Generates greedily with transformers' dynamic or static cache; returns tokens and seconds of the call."""
        ids = self._prompts(batch, length)
        options = {}
        if cache == "static":  # not compiled: compiled decoding is slower on CPU
            options = {"cache_implementation": "static", "disable_compile": True}
        began = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": out[:, length:].tolist() if tokens else None}

    def compress(self, *, batch, length, ratio, window, kernel):
        """Returns the seconds in kvpress's SnapKVPress during the prefill of a prompt, all layers together."""
        from kvpress import SnapKVPress

        spent = []

        class Timed(SnapKVPress):
            def compress(self, *args, **kwargs):
                began = time.perf_counter()
                result = super().compress(*args, **kwargs)
                spent.append(time.perf_counter() - began)
                return result

        press = Timed(compression_ratio=ratio, window_size=window, kernel_size=kernel)
        ids = self._prompts(batch, length)
        sums = []
        for _ in range(3):
            spent.clear()
            with torch.inference_mode(), press(self._model):
                self._model.model(ids, past_key_values=transformers.DynamicCache())
            assert len(spent) == self._sizes["num_layers"]
            sums.append(sum(spent))
        return {"seconds": min(sums[1:])}

    def versions(self):
        return {"torch": torch.__version__, "transformers": transformers.__version__}


def main(folder):
    peer = Peer(folder)
    operations = {"generate": peer.generate, "compress": peer.compress, "versions": peer.versions}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(operations[request.pop("op")](**request)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
