"""transformers' side of the benchmarks of training, generation and import; runs under .venv-peers or .venv-kvpress.

  .venv-peers/bin/python -P tests/benchmarks/torch/llama_torch.py train FOLDER eager|compiled STEPS
  .venv-peers/bin/python -P tests/benchmarks/torch/llama_torch.py train FOLDER EXPERTS|EXPERTS+compiled STEPS
  .venv-peers/bin/python -P tests/benchmarks/torch/llama_torch.py serve FOLDER
  .venv-peers/bin/python -P tests/benchmarks/torch/llama_torch.py load|first_token MODEL

FOLDER is a folder of case.py or moe_case.py, EXPERTS is transformers' implementation of experts: eager, batched_mm or
grouped_mm. `serve` answers requests, the others print one line of JSON. The project never imports this file.
"""

import json
import os
import pathlib
import resource
import sys
import time

import numpy as np
import torch
import transformers

VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}


def model_of(folder: str, **options) -> transformers.PreTrainedModel:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        os.path.join(folder, "model"), dtype=torch.float32, attn_implementation="sdpa", **options
    )
    for (
        parameter
    ) in model.parameters():  # The weights are memory-mapped, which training cannot use.
        parameter.data = parameter.data.clone()
    return model


def case_of(folder: str) -> dict:
    return json.loads(pathlib.Path(folder, "case.json").read_bytes())


def train(folder: str, mode: str, steps: str) -> dict:
    case = case_of(folder)
    experts = mode.partition("+")[0]
    options = {"experts_implementation": experts} if "num_experts" in case else {}
    model = model_of(folder, use_cache=False, **options).train()
    if "lora_rank" in case:
        model = with_lora(model, case["lora_rank"])
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim > 1]
    not_decayed = [p for p in trained if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": not_decayed, "weight_decay": 0.0}],
        lr=case["learning_rate"],
        betas=(case["b1"], case["b2"]),
        eps=case["adam_eps"],
        weight_decay=case["weight_decay"],
        fused=True,
    )
    forward = torch.compile(model) if mode.endswith("compiled") else model
    tokens = torch.from_numpy(np.load(os.path.join(folder, "tokens.npy"))).long()
    started = float(os.environ["BENCH_PROCESS_START"])
    first = {}
    losses, seconds, cpu_seconds = [], [], []
    for step in range(int(steps)):
        begin, cpu = time.perf_counter(), time.process_time()
        rows = tokens[step % len(tokens)]
        loss = forward(input_ids=rows, labels=rows).loss
        if not first:
            loss.item()
            first["loss"] = time.time() - started
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu)
        first.setdefault("step", time.time() - started)
    return {
        "losses": losses,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "first_loss_s": first["loss"],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "first_step_s": first["step"],
        "versions": VERSIONS,
    }


def with_lora(model: transformers.PreTrainedModel, rank: int) -> torch.nn.Module:
    """Returns the frozen model with peft's LoRA at all projections, with this project's default scale."""
    import peft

    VERSIONS["peft"] = peft.__version__
    settings = peft.LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, settings)


class Peer:
    """The operations of decode_jax.Ours, with transformers and kvpress."""

    def __init__(self, folder):
        self._sizes = case_of(folder)
        self._model = model_of(folder).eval()
        self._manager = None

    def _prompts(self, batch, length):
        # The same as case.prompts, which cannot be imported here.
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

    def continuous_batching(self, *, requests, rows):
        """Generates greedily with transformers' continuous batching, its manager being warm; returns tokens and seconds."""
        if self._manager is None:
            settings = transformers.ContinuousBatchingConfig(
                # By default it takes and fills most of the memory before the first request, which takes minutes on a CPU.
                num_blocks=4 * rows,
                max_batch_tokens=512,
                max_requests_per_batch=rows,
            )
            self._manager = self._model.init_continuous_batching(
                generation_config=transformers.GenerationConfig(
                    do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=128
                ),
                continuous_batching_config=settings,
            )
            self._manager.start()
        began, cpu = time.perf_counter(), time.process_time()
        names = [self._manager.add_request(ids, max_new_tokens=new) for ids, new in requests]
        tokens = {}
        while len(tokens) < len(names):
            result = self._manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                tokens[result.request_id] = list(result.generated_tokens)
            elif not self._manager.is_running():
                raise RuntimeError("transformers' continuous batching ended; its error is above.")
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        return {**seconds, "tokens": [tokens[name] for name in names]}

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
        return VERSIONS


def serve(folder: str) -> None:
    peer = Peer(folder)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(getattr(peer, request.pop("op"))(**request)), flush=True)


def load(folder: str) -> dict:
    """Loads a checkpoint and touches every page of its weights."""
    # transformers imports modules on first use; this keeps their imports out of the measured time.
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size"), 8)
    sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    before, begin = peak_bytes(), time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = time.perf_counter() - begin
    for parameter in model.parameters():
        parameter.detach().view(torch.uint8).flatten()[::4096].sum()
    return {
        "load_s": loaded,
        "load_and_touch_s": time.perf_counter() - begin,
        "peak_mb": peak_bytes() / 1e6,
        "peak_over_start_mb": (peak_bytes() - before) / 1e6,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": VERSIONS,
    }


def first_token(folder: str) -> dict:
    """Loads a checkpoint and continues the prompt of first_token.py by one token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.arange(100, 116)[None]
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    return {
        "first_token_s": time.time() - float(os.environ["BENCH_PROCESS_START"]),
        "peak_mb": peak_bytes() / 1e6,
        "versions": VERSIONS,
    }


def peak_bytes() -> int:
    """Returns the peak resident memory of this process in bytes, including touched pages of mapped files (Linux)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


if __name__ == "__main__":
    actions = {"train": train, "serve": serve, "load": load, "first_token": first_token}
    report = actions[sys.argv[1]](*sys.argv[2:])
    if report is not None:
        print(json.dumps(report))
