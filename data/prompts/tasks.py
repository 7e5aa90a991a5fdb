"""SeqIO tasks of prompts in files; each example includes its row, which rewards read.

{"prompt": "3 + 4 = ", "answer": "7"}
{"prompt": [{"role": "user", "content": "3 + 4?"}], "answer": "7"}
"""

import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from espalier.data import tasks
from espalier.data.pieces import Piece
from espalier.data.rows.files import TOKENS_VERSION, PromptedFiles, PromptedSettings
from espalier.data.rows.records import Record, check_unicode, template_variables, text_of
from espalier.data.stream.stream import with_settings
from espalier.data.text import documents, splits
from espalier.data.text.documents import DataError
from espalier.data.text.row_files import BadRows, Row
from espalier.data.tokenizers.vocabulary import PassThroughVocabulary

# Part of the digest of a source: raise it when the same rows are read as other examples.
VERSION = 2
EXAMPLE = '{"prompt": "...", "answer": "..."}'
INFO = "info"  # bytes of the whole row as JSON


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptFiles(PromptedFiles):
    """Prompts in files, by split."""

    EXAMPLE: ClassVar[str] = EXAMPLE

    def read_examples(self, piece: Piece, split: str) -> Iterator[dict[str, Any]]:
        """Yields the features of the examples of one piece and one split.

        Raises:
          DataError: a row is malformed; the message names its line.
        """
        return (features for _, features in self._examples(piece, self._bad_rows(), split))

    def _examples(
        self, piece: Piece, bad: BadRows, wanted: str | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (split, features) of the examples of one split, or of all."""

        def use(row: Row) -> Iterator[tuple[str, dict[str, Any]]]:
            record = _record(row.content, row.where, self._id(piece.path, row.number))
            split = self._split_of(record.prompt_text, piece.path)
            if wanted not in (None, split):
                return
            prompt, _ = self.tokeniser(record)
            row_json = json.dumps(row.content, ensure_ascii=False, default=str).encode(
                "utf-8", "surrogatepass"
            )
            yield (
                split,
                {
                    "prompt": np.array(prompt, np.int32),
                    INFO: np.frombuffer(row_json, np.uint8).astype(np.int32),
                    "document_id": record.id,
                },
            )

        return self._usable(piece, self._rows(piece, bad), use, bad)

    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        return dict.fromkeys(("prompt", INFO), ((None,), "int32"))

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "version": [VERSION, documents.VERSION, splits.VERSION, TOKENS_VERSION],
            "add_bos": self.tokeniser.add_bos,
            **({"prompt_eos": True} if self.tokeniser.prompt_eos else {}),
        }

    def _count_piece(self, piece: Piece, bad: BadRows) -> dict[str, int]:
        return collections.Counter(split for split, _ in self._examples(piece, bad))

    def _total(self, counts: Mapping[Piece, Mapping[str, int]]) -> dict[str, Any]:
        counted = {
            split: sum(count.get(split, 0) for count in counts.values()) for split in self.files
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
    check_unicode(row["prompt"], "prompt", where)
    prompt = text_of(row["prompt"], "prompt", where)
    if not prompt:
        raise DataError(f"{where}: 'prompt' is empty; delete the line")
    # No template renders a text, whose row may have columns of these names for its rewards.
    variables = {} if isinstance(prompt, str) else template_variables(row, where)
    return Record(where, id, prompt, completions=(), template=variables)


@with_settings(
    PromptedSettings,
    *("vocabulary", "validation_fraction", "chat_template", "special_in_contents", "add_bos"),
    *("prompt_eos", "columns", "on_bad_row", "data_root", "cache_dir"),
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
    source = PromptFiles.open(settings, name=name, files=files, validation_files=validation_files)
    tasks.register_rows(
        source,
        origin="register_prompts",
        features={"prompt": settings.vocabulary, INFO: PassThroughVocabulary(256)},
        facts=source.facts,
    )
