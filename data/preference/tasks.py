"""SeqIO tasks of preference data, registered by a plain function that gin binds."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from data import tasks
from data.preference import files as preference_files
from data.preference import records
from data.text.documents import DataError


def register_pairs(
    *,
    name: str,
    files: str | Sequence[str],
    vocabulary: Any,
    kind: records.Kind = "paired",
    validation_files: str | Sequence[str] | None = None,
    validation_fraction: float = 0.01,
    chat_template: str | None = None,
    add_bos: bool = False,
    add_eos: bool = True,
    invalid: preference_files.Invalid = "drop",
    data_root: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Registers a task over files of JSON lines (also .gz and .zst) in TRL's formats; see `records`.

    Its features are ids: `prompt`, `chosen` and `rejected`, with `margin` (float32, one number; 0 where a
    row has none). Of kind 'unpaired' `chosen` is the completion, `labels` (float32) says whether it is
    desirable, and `rejected` is the completion of the next example, in the order of the files, that has
    another prompt: KTO estimates from those how far the policy has moved (arXiv 2402.01306).

    Malformed rows are an error. Degenerate pairs are dropped and counted by reason (or an error): completions
    that are equal as texts, without invisible characters or as tokens; empty completions; and, in a row without
    a prompt, completions that do not begin alike.

    Args:
      name: of the task.
      files: a glob or several.
      vocabulary: a SeqIO vocabulary, as `data.tokenizers.vocabularies` makes.
      kind: 'paired', or 'unpaired', for which a pair is a desirable and an undesirable completion.
      validation_files: a glob or several of held-out files.
      validation_fraction: without them, the share to hold out by the hash of the prompt, so that all
        pairs of a prompt are in one split; 0 makes no validation split.
      chat_template: of rows with messages: a jinja file, or a name of
        `data.tokenizers.chat_template.BUILT_IN`; default the vocabulary's own.
      add_bos: begin prompts that are texts with BOS; a chat template writes its own.
      add_eos: end completions that are texts with EOS.
      invalid: 'drop' degenerate pairs, or make the first one an 'error'.
      data_root: directory that relative patterns start at; None for the working directory.
      cache_dir: where checksums are remembered; default $ESPALIER_CACHE or ~/.cache/espalier.

    Raises:
      FileNotFoundError: a pattern matches no file.
      DataError: a matching file is of another kind.
      ChatTemplateError: there is no such chat template.
      ValueError: an unknown kind or value of `invalid`, or BOS or EOS of a vocabulary without it.
    """
    for argument, value, known in (
        ("kind", kind, records.KINDS),
        ("invalid", invalid, preference_files.INVALID),
    ):
        if value not in known:
            raise ValueError(
                f"{name}: {argument} is {value!r}; it must be one of {', '.join(map(repr, known))}"
            )
    source = preference_files.PreferenceFiles.open(
        name=name,
        files=files,
        vocabulary=vocabulary,
        validation_files=validation_files,
        validation_fraction=validation_fraction,
        chat_template=chat_template,
        add_bos=add_bos,
        add_eos=add_eos,
        data_root=data_root,
        cache_dir=cache_dir,
        kind=kind,
        invalid=invalid,
    )
    for path in sorted({path for paths in source.files.values() for path in paths}):
        if not {".jsonl", ".json"} & set(pathlib.Path(path).suffixes[-2:]):
            raise DataError(
                f"{path}: preference data are read from JSON lines (.jsonl or .json, also with .gz or "
                ".zst); write the file's rows as such, one object a line"
            )
    tasks.register_features(
        name,
        source,
        origin="register_pairs",
        features={
            **dict.fromkeys(preference_files.TOKENS, vocabulary),
            preference_files.NUMBER[kind]: None,
        },
        facts={"kind": kind, **source.facts},
    )
