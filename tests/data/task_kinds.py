"""One small task of every kind that this project registers, with texts that tokenisers treat specially."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from espalier.data import tasks
from espalier.data.chats import tasks as chats
from espalier.data.data_source import GeneratedSource
from espalier.data.instructions import tasks as instructions
from espalier.data.preference import tasks as preference
from espalier.data.prompts import tasks as prompts
from espalier.data.t5 import examples as t5
from espalier.data.text import document_files, user_data
from espalier.data.tokenizers import vocabularies

# Combining and astral characters, line ends, NUL, the replacement character, SentencePiece's space and its stand-in, byte
# order marks, white space alone, and the spellings of special tokens.
HARD = (
    "plain words",
    "  two  spaces\t\ttabs\r\nand lines\n\n\n",
    "na\u00efve a\u0301 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4 \u0939\u093f \u0627\u0644 \U0001f642\U0001f469\u200d\U0001f680",
    "a\x00b\x00",
    "\ufffd \ufffd\ufffd",
    "\u2581 \u2582\u2581\u2581 \u00a0 \u200b\ufeff",
    " ",
    "\n",
    "<extra_id_0> and <extra_id_1>ly </s> <pad> <unk> <0x0A> <s>",
    "0123456789" * 30,
    "\ue000\U000f0000\x7f\x85\u2028",
)
YAML = """
templates:
- {name: 'Is it?', jinja: '{{text}}? ||| {{answer_choices[label]}}', answer_choices: no ||| yes,
   metadata: {original_task: true}}
"""
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}{{ '</' + m.role + '>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def _write(path: pathlib.Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(folder: pathlib.Path) -> pathlib.Path:
    """Returns the path of a SentencePiece model of 500 pieces, trained on the texts."""
    texts = [f"{text} {n} the quick brown fox" for n in range(30) for text in HARD]
    path = _write(folder / "corpus.jsonl", [{"text": text} for text in texts])
    corpus = document_files.find(
        name="corpus", files=path, validation_fraction=0.0, cache_dir=folder / "cache"
    )
    made = vocabularies.sentencepiece(
        **{"corpus": corpus, "size": 500, "character_coverage": 0.98},
        cache_dir=folder / "cache",
    )
    return pathlib.Path(made.sentencepiece_model_file)


def register_text(folder: pathlib.Path, vocabulary: Any, **settings: Any) -> None:
    """Registers the task of texts, whose files `register` has written; `settings` of `register_files`."""
    settings = {"name": "text", "validation_fraction": 0.2, **settings}
    files = {"files": str(folder / settings["name"] / "*.jsonl"), "cache_dir": folder / "cache"}
    user_data.register_files(vocabulary=vocabulary, **{**files, **settings})


def register(folder: pathlib.Path, vocabulary: Any, kinds: list[str] | None = None) -> list[str]:
    """Registers the tasks, with files in a folder, and returns their names. `vocabulary` has BOS and EOS but for bytes."""
    cache, template = folder / "cache", folder / "template.jinja"
    folder.mkdir(parents=True, exist_ok=True)
    template.write_text(TEMPLATE)
    bos = vocabulary.bos_id is not None
    texts = [f"{text} {number}" if number % 3 else text for number, text in enumerate(HARD * 4)]
    messages = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": f"{number} {text}"}]
        for number, text in enumerate(texts)
    ]

    def write_text(name: str, **settings: Any) -> None:
        for part in (0, 1):
            rows = [{"text": text} for text in texts[part::2]]
            _write(folder / name / f"{part}.jsonl", rows)
        register_text(folder, vocabulary, name=name, **settings)

    def of_rows(register: Callable[..., None], name: str, rows: list, **settings: Any) -> None:
        path = _write(folder / f"{name}.jsonl", rows)
        register(
            **{"name": name, "files": path, "vocabulary": vocabulary, "cache_dir": cache},
            **{"validation_fraction": 0.2, **settings},
        )

    def instruct() -> None:
        rows = [{"text": each, "label": n % 2} for n, each in enumerate(texts)]
        for split in ("train", "validation"):
            _write(folder / "set" / f"{split}.jsonl", rows)
        (folder / "set" / "templates.yaml").write_text(YAML)
        for form, name, held_out in (
            ("encoder_decoder", "encoded", {"evaluated": ["set"]}),
            ("decoder", "decoded", None),
        ):
            (folder / f"set_{name}").exists() or (folder / f"set_{name}").symlink_to("set")
            instructions.register_instructions(
                **{"name": f"instructions_{name}", "data_dir": str(folder), "form": form},
                **{"train": {"all": [f"set_{name}"]}, "held_out": held_out},
                **{"vocabulary": vocabulary, "cache_dir": cache},
            )

    def generated() -> None:
        facts = {"origin": "kinds", "vocabulary": vocabulary}
        texts = Texts("generated_texts", 8, 0)
        tasks.register_source(texts.name, texts, **facts, add_bos=bos, add_eos=True)
        tasks.register_rows(
            Rows("generated_rows", 8, 0),
            **{"origin": "kinds", "facts": {}},
            features={"targets": vocabulary, "loss_weights": None},
        )

    every = {
        "text": lambda: write_text("text"),
        "text_bos": lambda: write_text("text_bos", add_bos=bos, add_eos=False),
        "chats": lambda: of_rows(
            chats.register_chats,
            "chats",
            [{"messages": each} for each in messages],
            chat_template=str(template),
        ),
        "pairs": lambda: of_rows(
            preference.register_pairs,
            "pairs",
            [
                {"prompt": each, "chosen": f"{each} {n}", "rejected": f"no {n}", "margin": n / 3}
                for n, each in enumerate(texts)
            ],
        ),
        "unpaired": lambda: of_rows(
            preference.register_pairs,
            "unpaired",
            [
                {"prompt": f"{n} {each}", "chosen": f"{each} {n}", "rejected": f"no {n}"}
                for n, each in enumerate(texts)
            ],
            kind="unpaired",
        ),
        "prompts": lambda: of_rows(
            prompts.register_prompts,
            "prompts",
            [{"prompt": each, "answer": each} for each in texts],
        ),
        "examples": lambda: of_rows(
            t5.register_examples,
            "examples",
            [{"inputs": f"{n} {each}", "targets": f"x{each}"} for n, each in enumerate(texts)]
            + [{"inputs": [5, 6, 7], "targets": [8, 9], "loss_weights": [0, 0.5]}],
        ),
        "instructions": instruct,
        "generated": generated,
    }
    for kind, call in every.items():
        if kinds is None or kind in kinds:
            call()
    return list(tasks.sources())


@dataclasses.dataclass(frozen=True)
class Texts(GeneratedSource):
    validation_documents = 4

    @property
    def digest(self) -> str:
        return str(self)

    def texts(self, split: str) -> list[str]:
        return [f"{split} {text}" for text in HARD[: self.num_input_examples(split)]]


class Rows(Texts):
    def examples(self, split: str) -> dict[str, Any]:
        rng = np.random.default_rng(self.splits.index(split))
        shape = (self.num_input_examples(split), 7)
        weights = rng.random(shape, np.float32)
        return {"targets": rng.integers(3, 99, shape), "loss_weights": weights}
