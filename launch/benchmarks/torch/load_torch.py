"""The peer's side of the import benchmark; runs under .venv-peers, never imported by the project.

  .venv-peers/bin/python -P launch/benchmarks/torch/load_torch.py FOLDER

Reads a checkpoint with transformers, touches every page of its weights, and prints one line of JSON.
"""

import json
import sys
import time

import torch
import transformers


def peak_bytes() -> int:
    """Returns the peak resident memory of this process in bytes, including touched pages of mapped files (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def main(folder: str) -> None:
    # transformers imports modules on first use; this keeps their imports out of the measured time.
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, vocab_size=8,
        )
    )  # fmt: skip
    before, begin = peak_bytes(), time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = time.perf_counter() - begin
    for parameter in model.parameters():
        parameter.detach().view(torch.uint8).flatten()[::4096].sum()
    print(
        json.dumps(
            {
                "load_s": loaded,
                "load_and_touch_s": time.perf_counter() - begin,
                "peak_mb": peak_bytes() / 1e6,
                "peak_over_start_mb": (peak_bytes() - before) / 1e6,
                "parameters": sum(p.numel() for p in model.parameters()),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
