"""SeqIO tasks of preference data, registered by a plain function that gin binds."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from espalier.common.ranges import Fraction, check_choice
from espalier.data import tasks
from espalier.data.preference import files as preference_files
from espalier.data.preference import records
from espalier.data.text.documents import DataError


def register_pairs(
    *,
    name: str,
    files: str | Sequence[str],
    vocabulary: Any,
    kind: records.Kind = "paired",
    validation_files: str | Sequence[str] | None = None,
    validation_fraction: Fraction = 0.01,
    chat_template: str | None = None,
    special_in_contents: bool = True,
    add_bos: bool = False,
    add_eos: bool = True,
    prompt_eos: bool = False,
    invalid: preference_files.Invalid = "drop",
    data_root: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Registers a task over files of JSON lines (also .gz and .zst) in TRL's formats; see `records`.

    For 'paired' data, the features are the ids `prompt`, `chosen` and `rejected`, and `margin` (one float32; 0 if
    the row has none). For 'unpaired' data, `chosen` is the completion, and `labels` (one float32) is 1 if it is
    desirable and 0 if not. `rejected` is then the completion of the next example, in the order of the files, with
    another prompt: KTO uses these to estimate the policy's KL divergence (arXiv 2402.01306).

    Malformed rows are an error. Degenerate pairs are dropped and counted by reason, or are an error too (see
    `invalid`): completions that are equal as texts, equal without invisible characters, or equal as tokens; empty
    completions; and, in a row without a prompt, completions without a common beginning.

    Args:
      name: name of the task.
      files: one glob pattern or several.
      vocabulary: a SeqIO vocabulary, such as from `data.tokenizers.vocabularies`.
      kind: 'paired', or 'unpaired'; a pair is then a desirable and an undesirable completion.
      validation_files: one glob pattern or several, of held-out files.
      validation_fraction: share of prompts to hold out, by hash, if there are no `validation_files`; all pairs
        of a prompt are in one split. 0 makes no validation split.
      chat_template: for rows with messages: a jinja file, or a name in
        `data.tokenizers.chat_template.BUILT_IN`; default the vocabulary's own template.
      special_in_contents: see `data.chats.tasks.register_chats`.
      add_bos: begin prompts that are texts with BOS; a chat template writes its own.
      add_eos: end completions that are texts with EOS.
      prompt_eos: end prompts with EOS, as an encoder reads them.
      invalid: 'drop' drops degenerate pairs, 'error' raises at the first one.
      data_root: directory of relative patterns; None for the working directory.
      cache_dir: directory of remembered checksums; default $ESPALIER_CACHE or ~/.cache/espalier.

    Raises:
      FileNotFoundError: a pattern matches no file.
      DataError: a matching file is not a file of JSON lines.
      ChatTemplateError: the chat template does not exist.
      ValueError: `kind` or `invalid` has an unknown value, or the vocabulary lacks the BOS or EOS to add.
    """
    check_choice(f"{name}: kind", kind, records.Kind)
    check_choice(f"{name}: invalid", invalid, preference_files.Invalid)
    source = preference_files.PreferenceFiles.open(
        name=name,
        files=files,
        vocabulary=vocabulary,
        validation_files=validation_files,
        validation_fraction=validation_fraction,
        chat_template=chat_template,
        special_in_contents=special_in_contents,
        add_bos=add_bos,
        add_eos=add_eos,
        prompt_eos=prompt_eos,
        data_root=data_root,
        cache_dir=cache_dir,
        kind=kind,
        invalid=invalid,
    )
    for path in sorted({path for paths in source.files.values() for path in paths}):
        if not {".jsonl", ".json"} & set(pathlib.Path(path).suffixes[-2:]):
            raise DataError(
                f"{path}: preference data are read from JSON lines (.jsonl or .json, also with .gz or "
                ".zst); write one JSON object per line"
            )
    tasks.register_rows(
        source,
        origin="register_pairs",
        features=dict.fromkeys(preference_files.TOKENS, vocabulary)
        | {preference_files.NUMBER[kind]: None},
        facts={"kind": kind, **source.facts},
    )
