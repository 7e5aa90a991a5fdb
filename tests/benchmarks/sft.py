"""Supervised fine-tuning against TRL's SFTTrainer: step time, memory and start-up time, on packed conversations.

Both sides start from the same checkpoint in Hugging Face's layout, with a SmolLM2's proportions, and read the same file of
conversations, of which they learn the assistant's turns. Each runs its usual command: `launch.train` with
runs/finetune.gin, and `SFTTrainer.train` with assistant_only_loss and the faster of two strategies of packing: "bfd", TRL's default,
joins the rows of a batch into one row, whose attention is over all of its length without FlashAttention, and "wrapped" cuts
conversations at the ends of rows and lets them see each other. Fresh processes alternate. Times are per token of a
conversation, since the ways of packing fill their rows a little differently.
"""

import json
import os
import pathlib
import statistics
import tempfile
from typing import Any

import numpy as np

from tests.benchmarks import compare, dpo

CASE: dict[str, Any] = {
    "num_layers": 4,
    "embed_dim": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "mlp_dim": 1536,
    "vocab_size": 8192,
    "length": 512,  # tokens of a row
    "batch_size": 4,  # rows
    "conversations": 600,
    "turn": [8, 96],  # least and most tokens of a turn
    "learning_rate": 2e-5,
}
WARM_UP = 3
PACKINGS = ("bfd", "wrapped")
# Without special tokens of its own; both sides learn what is inside of the blocks.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + ' </s> ' }}{% endgeneration %}"
    "{% else %}{{ '<s> ' + m.content + ' </s> ' }}{% endif %}{% endfor %}"
)


def run(*, rounds: int = 5, steps: int = 10) -> dict[str, Any]:
    """Alternates both sides `rounds` times, `steps` timed steps in each."""
    with tempfile.TemporaryDirectory() as folder:
        commands = {
            "ours": compare.ours("sft", folder, WARM_UP + steps),
            **{
                packing: compare.peer("torch/trl_torch.py", "sft", folder, WARM_UP + steps, packing)
                for packing in PACKINGS
            },
        }
        write(folder)
        reports = compare.alternate_processes(commands, rounds)
    per_second = compare.each(reports, tokens_per_second)
    faster = max(PACKINGS, key=lambda packing: statistics.median(per_second[packing]))
    return {
        "case": CASE,
        "packing": faster,
        "speed_over_trl": compare.ratio(per_second["ours"], per_second[faster]),
        "tokens_per_second": {side: [round(x, 1) for x in xs] for side, xs in per_second.items()},
        "tokens_a_step": compare.each(reports, lambda report: round(report["tokens_a_step"], 1)),
        **dpo.facts({"ours": reports["ours"], "trl": reports[faster]}),
    }


def tokens_per_second(report: dict[str, Any]) -> float:
    """Returns the tokens of conversations that a side trains on in a second, after the warm-up."""
    seconds = statistics.median(np.diff(report["step_ends"])[WARM_UP - 1 :])
    return report["tokens_a_step"] / seconds


def side(folder: str, steps: str) -> dict[str, Any]:
    """Trains on the files of `write`; returns losses, times and memory."""
    trained = dpo.train(folder, "sft", arguments(folder, int(steps)))
    facts = json.loads(pathlib.Path(folder, "sft", "run.json").read_text(encoding="utf-8"))
    source = facts["data"]["sources"]["chats"]
    return {
        **dpo.trained_report(trained),
        "tokens_a_step": CASE["batch_size"] * source["tokens"] / source["rows"],
    }


def arguments(folder: str, steps: int) -> list[str]:
    """Returns the flags of `launch.train`."""
    bindings = {
        "CHATS": f"{folder}/chats.jsonl",
        "CHATS_VALIDATION_FRACTION": 0.0,
        "TASK_FEATURE_LENGTHS": {"targets": CASE["length"]},
        "BATCH_SIZE": CASE["batch_size"],
        "TRAIN_EPOCHS": None,
        "TRAIN_STEPS": steps,
        "LEARNING_RATE": CASE["learning_rate"],
        "LOG_PERIOD": 1,
    }
    return dpo.flags(folder, "sft", ("data/chat", "runs/finetune"), bindings)


def write(folder: str) -> None:
    """Writes the files of `dpo.write_run`, and chats.jsonl."""
    rng = np.random.default_rng(0)
    dpo.write_run(folder, CASE, rng, TEMPLATE)
    with open(os.path.join(folder, "chats.jsonl"), "w", encoding="utf-8") as file:
        for _ in range(CASE["conversations"]):
            sizes = rng.integers(*CASE["turn"], 2 * rng.integers(1, 4))
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": dpo.words(rng, size)}
                for i, size in enumerate(sizes)
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
