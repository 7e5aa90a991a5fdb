"""Writes preference_pairs.json: rows of preference data as the ids that TRL trains on.

Run from the root with the reference implementations and trl, after `make peers`:

  .venv-peers/bin/python tests/data/goldens/make_preference_pairs.py

TRL tokenises prompt and completion as one text. Completions of texts begin with a space here, at which this
tokenizer never merges, so that its ids are those of the two apart.
"""

import json
import os
import pathlib
import types

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from trl import DPOTrainer
from trl.data_utils import unpair_preference_dataset

HERE = pathlib.Path(__file__).parent
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def said(role, content):
    return {"role": role, "content": content}


SYSTEM, QUESTION = (
    said("system", "Be brief."),
    said("user", "What colour is the sky? \u200fأزرق\u200f"),
)
BLUE, GREEN = said("assistant", "It is blue."), said("assistant", "It is green\u200b, ma\u00f1ana.")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
# Rows, and the template of those with messages.
CASES = [
    ("texts", None, {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, не так."}),
    ("implicit text", None, {"chosen": "The sky is blue.", "rejected": "The sky is green."}),
    ("chat", "chatml", {"prompt": [SYSTEM, QUESTION], "chosen": [BLUE], "rejected": [GREEN]}),
    ("implicit chat", "chatml", {"chosen": [QUESTION, BLUE], "rejected": [QUESTION, GREEN]}),
    (
        "several turns",
        "llama3",
        {
            "chosen": [QUESTION, BLUE, said("user", "Sure?"), said("assistant", "Yes.")],
            "rejected": [QUESTION, BLUE, said("user", "Sure?"), said("assistant", "No, sorry.")],
        },
    ),
    (
        "tools and variables",
        "llama3",
        {
            "prompt": [QUESTION],
            "chosen": [BLUE],
            "rejected": [GREEN],
            "tools": json.dumps([TOOL]),
            "chat_template_kwargs": {"custom": "Today is Monday."},
        },
    ),
]


def train() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [json.dumps(CASES, ensure_ascii=False)] * 3,
        trainers.BpeTrainer(
            vocab_size=340,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def prepared(row, tokenizer):
    """The row as DPOTrainer prepares it; nothing of the trainer but its tokenizer has a part in that."""
    trainer = types.SimpleNamespace(_tokenizer=tokenizer)
    args = types.SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start"
    )
    rows = datasets.Dataset.from_list([row])
    (found,) = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "golden")
    return {name: found[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")}


def main() -> None:
    inner = train()
    cases = []
    for name, template, row in CASES:
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **TOKENS)
        if template:
            path = HERE / "chat_templates" / f"{template}.jinja"
            tokenizer.chat_template = path.read_text("utf-8")
        ids = prepared(row, tokenizer)
        cases.append({"name": name, "template": template, "row": row, "ids": ids})
    pairs = datasets.Dataset.from_list([CASES[0][2], CASES[0][2] | {"prompt": "Grass is"}])
    golden = {
        "tokenizer": json.loads(inner.to_str()),
        "tokens": TOKENS,
        "cases": cases,
        "pairs": list(pairs),
        "unpaired": list(unpair_preference_dataset(pairs)),
    }
    out = HERE / "preference_pairs.json"
    out.write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
