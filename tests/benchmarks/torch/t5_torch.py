"""transformers' side of the benchmark of T5; runs under .venv-peers, never imported by the project.

  .venv-peers/bin/python -P tests/benchmarks/torch/t5_torch.py train FOLDER eager|compiled STEPS
  .venv-peers/bin/python -P tests/benchmarks/torch/t5_torch.py serve FOLDER eager|compiled

FOLDER is one of t5.py. `train` prints one line of JSON, `serve` answers requests.
"""

import json
import os
import pathlib
import resource
import sys
import time

import numpy as np
import safetensors.torch
import torch
import transformers

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


def model_of(folder: str) -> transformers.PreTrainedModel:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        os.path.join(folder, "model"), dtype=torch.float32
    )
    for parameter in model.parameters():  # memory-mapped, which training cannot use
        parameter.data = parameter.data.clone()
    # Newer versions of transformers tie the head to the token table, whatever config.json says.
    tensors = safetensors.torch.load_file(os.path.join(folder, "model", "model.safetensors"))
    model.lm_head.weight = torch.nn.Parameter(tensors["lm_head.weight"].clone())
    return model


def train(folder: str, mode: str, steps: str) -> dict:
    case = json.loads(pathlib.Path(folder, "case.json").read_bytes())
    model = model_of(folder).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    not_decayed = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}],
        lr=case["learning_rate"],
        betas=(case["b1"], case["b2"]),
        eps=case["adam_eps"],
        weight_decay=case["weight_decay"],
        fused=True,
    )
    forward = torch.compile(model) if mode == "compiled" else model
    inputs, targets = (
        torch.from_numpy(np.load(os.path.join(folder, f"{name}.npy"))).long()
        for name in ("inputs", "targets")
    )
    started = float(os.environ["BENCH_PROCESS_START"])
    losses, seconds, cpu_seconds = [], [], []
    first_step = None
    for step in range(int(steps)):
        begin, cpu = time.perf_counter(), time.process_time()
        at = step % len(inputs)
        loss = forward(input_ids=inputs[at], labels=targets[at], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu)
        first_step = first_step or time.time() - started
    return {
        "losses": losses,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "first_step_s": first_step,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "versions": VERSIONS,
    }


class Peer:
    """The operations of t5_jax.Ours; 'compiled' compiles the decoder's step for a static cache."""

    def __init__(self, folder: str, mode: str):
        self._sizes = json.loads(pathlib.Path(folder, "case.json").read_bytes())
        self._model = model_of(folder).eval()
        self._options = {}
        if mode == "compiled":
            self._options = {"cache_implementation": "static"}
            self._model.forward = torch.compile(self._model.forward)

    def generate(self, *, batch, length, new, tokens=False):
        """Generates greedily after the inputs; returns tokens and seconds of the call."""
        # The same as case.prompts, which cannot be imported here.
        ids = np.random.default_rng(1).integers(3, self._sizes["vocab_size"], (batch, length))
        ids = torch.from_numpy(ids)
        began = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **self._options,
            )
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": out[:, 1:].tolist() if tokens else None}


def serve(folder: str, mode: str) -> None:
    peer = Peer(folder, mode)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(peer, request.pop("op"))(**request)), flush=True)


if __name__ == "__main__":
    report = {"train": train, "serve": serve}[sys.argv[1]](*sys.argv[2:])
    if report is not None:
        print(json.dumps(report))
