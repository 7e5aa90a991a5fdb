"""The peer's side of the training benchmarks; runs under .venv-peers, never imported by the project.

  .venv-peers/bin/python -P launch/benchmarks/torch/llama_torch.py FOLDER eager|compiled STEPS
  .venv-peers/bin/python -P launch/benchmarks/torch/llama_torch.py FOLDER EXPERTS|EXPERTS+compiled STEPS

Reads FOLDER, written by case.py or moe_case.py, and prints one line of JSON. EXPERTS is transformers' implementation
of experts: eager, batched_mm or grouped_mm.
"""

import json
import os
import resource
import sys
import time

import numpy as np
import torch
import transformers


def main(folder: str, mode: str, steps: int) -> None:
    with open(os.path.join(folder, "case.json"), encoding="utf-8") as file:
        case = json.load(file)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if "num_experts" in case:
        model = _mixtral(folder, mode.partition("+")[0])
    else:
        model = _llama(case, folder)
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
    forward = torch.compile(model) if mode.endswith("compiled") else model
    tokens = torch.from_numpy(np.load(os.path.join(folder, "tokens.npy"))).long()
    started = float(os.environ["BENCH_PROCESS_START"])
    first = {}
    losses, seconds, cpu_seconds = [], [], []
    for step in range(steps):
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
    report = {
        "losses": losses,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "first_loss_s": first["loss"],
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "first_step_s": first["step"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(json.dumps(report))


def _llama(case: dict, folder: str) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=case["vocab_size"],
        hidden_size=case["embed_dim"],
        intermediate_size=case["mlp_dim"],
        num_hidden_layers=case["num_layers"],
        num_attention_heads=case["num_heads"],
        num_key_value_heads=case["num_heads"],
        max_position_embeddings=case["length"],
        rms_norm_eps=case["norm_eps"],
        rope_theta=case["rope_base"],
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config).float().train()
    with np.load(os.path.join(folder, "weights.npz")) as weights:
        named = {name: torch.from_numpy(weights[name]) for name in weights.files}
    result = model.load_state_dict(named, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}, result
    model.tie_weights()
    return model


def _mixtral(folder: str, experts: str) -> transformers.PreTrainedModel:
    checkpoint = os.path.join(folder, "checkpoint")
    model = transformers.MixtralForCausalLM.from_pretrained(
        checkpoint,
        dtype=torch.float32,
        attn_implementation="sdpa",
        experts_implementation=experts,
        use_cache=False,
    )
    for parameter in model.parameters():  # Training needs a copy of memory-mapped weights.
        parameter.data = parameter.data.clone()
    return model.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
