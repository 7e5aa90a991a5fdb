"""torch's and transformers' side of the benchmark `accelerator`; runs under .venv-peers, never imported by the project.

  .venv-peers/bin/python -P tests/benchmarks/torch/accelerator_torch.py describe|measure JSON

Prints one line of JSON. Weights are random; parameters are float32 in training and bfloat16 in decoding, as on the other
side, and products are bfloat16. Training recomputes all layers, as the other side does.
"""

import json
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
import transformers

WARM_UP = 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def describe(_: dict) -> dict:
    return {
        "cuda": torch.cuda.is_available(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def measure(work: dict) -> dict:
    kinds = {"train": train, "dpo": train, "decode": decode, "attention": attention}
    return kinds[work["kind"]](work)


def model_of(work: dict, dtype: torch.dtype) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.for_model(**work["config"])
    options = {"attn_implementation": "sdpa", "dtype": dtype}
    if work["config"]["model_type"] == "mixtral":
        options["experts_implementation"] = "grouped_mm"
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config, **options)


def train(work: dict) -> dict:
    """Times whole steps; those of DPO have the log-probabilities of the reference as constants."""
    model = model_of(work, torch.float32).train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    forward = torch.compile(model) if work["mode"] == "compiled" else model
    pairs = work["kind"] == "dpo"
    shape = (work["batch_size"], work["length"])
    if pairs:  # chosen completions, then rejected ones
        shape = (2 * shape[0], shape[1] // 2)
    rows = torch.randint(4, work["model"]["vocab_size"], shape, device=DEVICE)
    seconds = []
    for _ in range(WARM_UP + work["steps"]):
        synchronise()
        began = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = dpo_loss(forward, rows) if pairs else forward(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise()
        seconds.append(time.perf_counter() - began)
    return {
        "seconds": statistics.median(seconds[WARM_UP:]),
        "peak_memory_mb": torch.cuda.max_memory_allocated() / 1e6 if DEVICE == "cuda" else None,
    }


def dpo_loss(forward, rows: torch.Tensor) -> torch.Tensor:
    """Returns -log sigma(0.1 margin) on the last three quarters of each row, which are its completion."""
    prompt = rows.shape[1] // 4
    logits = forward(input_ids=rows).logits[:, prompt - 1 : -1]
    targets = rows[:, prompt:]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    chosen, rejected = -losses.view(2, len(rows) // 2, -1).sum(-1)
    reference = -float(rows.shape[1])
    margin = (chosen - reference) - (rejected - reference)
    return -F.logsigmoid(0.1 * margin).mean()


def decode(work: dict) -> dict:
    """Returns seconds per token: of a long generation less one of a single token."""
    model = model_of(work, torch.bfloat16).eval()
    shape = (work["batch_size"], work["length"])
    ids = torch.randint(3, work["model"]["vocab_size"], shape, device=DEVICE)
    options = {"cache_implementation": "static"} if work["mode"] == "static" else {}

    def seconds(new: int) -> float:
        synchronise()
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        synchronise()
        return time.perf_counter() - began

    times = [seconds(work["new"]) - seconds(1) for _ in range(1 + work["steps"])]
    return {"seconds": statistics.median(times[1:]) / (work["new"] - 1)}


def attention(work: dict) -> dict:
    """Times scaled_dot_product_attention forward and backward; a window needs flex_attention, on GPUs alone.

    Packed rows have documents of equal length, which are rows of their own here: the least work for any kernel.
    """
    report = {"causal": timed(work, 1, sdpa), "packed": timed(work, work["documents"], sdpa)}
    if DEVICE == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        T, window = work["length"], work["window"]

        def visible(b, h, i, j):
            return (j <= i) & (j > i - window)

        mask = create_block_mask(visible, None, None, T, T, device=DEVICE)
        compiled = torch.compile(flex_attention)
        report["window"] = timed(
            work, 1, lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)
        )
    return report


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def timed(work: dict, documents: int, kernel) -> dict:
    B, T, H = work["batch_size"] * documents, work["length"] // documents, work["head_dim"]
    arrays = [
        torch.randn(B, heads, T, H, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for heads in (work["num_heads"], work["num_kv_heads"], work["num_kv_heads"])
    ]
    times = []
    for _ in range(WARM_UP + work["steps"]):
        synchronise()
        began = time.perf_counter()
        (kernel(*arrays).float() ** 2).sum().backward()
        synchronise()
        times.append(time.perf_counter() - began)
    return {"seconds": float(np.median(times[WARM_UP:]))}


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    action = {"describe": describe, "measure": measure}[sys.argv[1]]
    print(json.dumps(action(json.loads(sys.argv[2]))))
