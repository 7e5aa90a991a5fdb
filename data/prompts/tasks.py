"""SeqIO tasks of prompts in files; each example includes its row, which rewards read.

{"prompt": "3 + 4 = ", "answer": "7"}
{"prompt": [{"role": "user", "content": "3 + 4?"}], "answer": "7"}
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from espalier.data import tasks
from espalier.data.rows.files import TOKENS_VERSION, PromptedFiles, PromptedSettings
from espalier.data.rows.records import Record, text_of
from espalier.data.stream.stream import with_settings
from espalier.data.text import documents, splits
from espalier.data.text.documents import DataError

# Part of the digest of a source: raise it when the same rows are read as other examples.
VERSION = 1
EXAMPLE = '{"prompt": "...", "answer": "..."}'
INFO = "info"  # bytes of the whole row as JSON


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFiles(PromptedFiles):
    """Prompts in files, by split."""

    EXAMPLE: ClassVar[str] = EXAMPLE

    def read_examples(self, path: str, split: str) -> Iterator[dict[str, Any]]:
        """Yields the features of the examples of one file and one split.

        Raises:
          DataError: a row is malformed; the message names its line.
        """
        for number, where, row in self._rows(path):
            record = _record(row, where, self._id(path, number))
            if self._split_of(record.prompt_text, path) != split:
                continue
            prompt, _ = self.tokeniser(record)
            row_json = json.dumps(row, ensure_ascii=False, default=str).encode(
                "utf-8", "surrogatepass"
            )
            yield {
                "prompt": np.array(prompt, np.int32),
                INFO: np.frombuffer(row_json, np.uint8).astype(np.int32),
                "document_id": record.id,
            }

    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        return dict.fromkeys(("prompt", INFO), ((None,), "int32"))

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "version": [VERSION, documents.VERSION, splits.VERSION, TOKENS_VERSION],
            "add_bos": self.tokeniser.add_bos,
        }

    def _count(self) -> dict[str, Any]:
        counted = {
            split: sum(1 for path in paths for _ in self.read_examples(path, split))
            for split, paths in self.files.items()
        }
        for split, count in counted.items():
            if not count:
                raise DataError(
                    f"{self.name}: {self.files[split][0]}: no prompt is in the {split} split. Add prompts, or "
                    "change validation_fraction"
                )
        return {"examples": counted, "dropped": {}}


def _record(row: Mapping[str, Any], where: str, id: str) -> Record:
    if "prompt" not in row:
        raise DataError(
            f"{where}: no key 'prompt'; present are {', '.join(map(repr, row)) or 'none'}. A row is {EXAMPLE}"
        )
    prompt = text_of(row["prompt"], "prompt", where)
    if not prompt:
        raise DataError(f"{where}: 'prompt' is empty; delete the line")
    return Record(where=where, id=id, prompt=prompt, completions=())


@with_settings(
    PromptedSettings,
    *("vocabulary", "validation_fraction", "chat_template", "special_in_contents", "add_bos"),
    *("columns", "data_root", "cache_dir"),
    validation_fraction=0.0,
    add_eos=False,
)
def register_prompts(
    *,
    name: str,
    files: str | Sequence[str],
    settings: PromptedSettings,
    validation_files: str | Sequence[str] | None = None,
) -> None:
    """Registers a task over files of rows with a "prompt", a text or messages; see the module.

    The files are JSON lines (also .gz and .zst), Parquet or Arrow, or data sets of Hugging Face.
    Files of preference pairs also work: a pair's prompt is the prompt, and rewards can read its completions. The
    features are `prompt`, its ids, and `info`, the row as bytes.

    `data.preference.tasks.register_pairs` and `data.rows.files.PromptedSettings` describe the arguments and errors.
    """
    import seqio

    source = PromptFiles.open(settings, name=name, files=files, validation_files=validation_files)
    tasks.register_rows(
        source,
        origin="register_prompts",
        features={"prompt": settings.vocabulary, INFO: seqio.PassThroughVocabulary(256)},
        facts=source.facts,
    )
