"""TRL's side of the benchmarks `dpo` and `sft`; runs under .venv-peers, never imported by the project.

  .venv-peers/bin/python -P tests/benchmarks/torch/trl_torch.py dpo|sft FOLDER STEPS [PACKING]

Reads FOLDER, written by dpo.py or sft.py, and prints one line of JSON.
"""

import json
import os
import resource
import sys
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import datasets
import torch
import transformers
import trl


class Steps(transformers.TrainerCallback):
    """Records the end times of steps, and what is logged of them."""

    def __init__(self):
        self.ends, self.logs = [], []

    def on_step_end(self, args, state, control, **_):
        self.ends.append(time.time())

    def on_log(self, args, state, control, logs=None, **_):
        if "loss" in logs:
            self.logs.append(dict(logs))


def dpo(case: dict, options: dict, **parts):
    """Returns the trainer of pairs; it computes the reference's log-probabilities here, not in `train`."""
    arguments = trl.DPOConfig(
        **options,
        beta=case["beta"],
        max_length=case["prompt"] + case["completion"],
        precompute_ref_log_probs=True,
        disable_dropout=True,
    )
    trainer = trl.DPOTrainer(args=arguments, **parts)
    trainer.get_train_dataloader()
    return trainer


def sft(case: dict, options: dict, packing: str, **parts):
    """Returns the trainer of conversations, which are packed."""
    arguments = trl.SFTConfig(
        **options,
        max_length=case["length"],
        packing=True,
        packing_strategy=packing,
        assistant_only_loss=True,
    )
    return trl.SFTTrainer(args=arguments, **parts)


TRAINERS = {"dpo": (dpo, "pairs.jsonl"), "sft": (sft, "chats.jsonl")}


def main(method: str, folder: str, steps: int, *packing: str) -> None:
    make, name = TRAINERS[method]
    with open(os.path.join(folder, "case.json"), encoding="utf-8") as file:
        case = json.load(file)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    datasets.disable_progress_bars()
    path = os.path.join(folder, "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(path)
    recorder = Steps()
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        rows = datasets.load_dataset(
            "json", data_files=os.path.join(folder, name), split="train", cache_dir=cache
        )
        options = {
            "output_dir": out,
            "max_steps": steps,
            "per_device_train_batch_size": case["batch_size"],
            "learning_rate": case["learning_rate"],
            "lr_scheduler_type": "cosine",
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        parts = {"model": model, "train_dataset": rows, "processing_class": tokenizer}
        trainer = make(case, options, *packing, **parts)
        trainer.add_callback(recorder)
        set_up = time.perf_counter() - began
        trainer.train()
    report = {
        "losses": [row["loss"] for row in recorder.logs],
        "step_ends": recorder.ends,
        "first_step_s": recorder.ends[0] - float(os.environ["BENCH_PROCESS_START"]),
        "set_up_s": set_up,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "versions": {m.__name__: m.__version__ for m in (trl, torch, transformers)},
    }
    if method == "sft":
        report["tokens_a_step"] = recorder.logs[-1]["num_tokens"] / len(recorder.logs)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
