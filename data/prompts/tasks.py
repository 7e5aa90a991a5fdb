"""SeqIO tasks of prompts, registered by a plain function that gin binds."""

import os
from collections.abc import Sequence
from typing import Any

from data import tasks
from data.prompts.files import INFO, PromptFiles


def register_prompts(
    *,
    name: str,
    files: str | Sequence[str],
    vocabulary: Any,
    validation_files: str | Sequence[str] | None = None,
    validation_fraction: float = 0.0,
    chat_template: str | None = None,
    add_bos: bool = False,
    data_root: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Registers a task over files of JSON lines with a "prompt", a text or messages; see `data.prompts.files`.

    Files of preference pairs also work: a pair's prompt is the prompt, and rewards can read its completions. The
    features are `prompt`, its ids, and `info`, the row as bytes.

    Args:
      name: name of the task.
      files: one glob pattern or several.
      vocabulary: a SeqIO vocabulary, as `data.tokenizers.vocabularies` makes.
      validation_files: one glob pattern or several, of held-out files.
      validation_fraction: share of prompts to hold out, by hash, if there are no `validation_files`.
      chat_template: for rows with messages: a jinja file, or a name in `data.tokenizers.chat_template.BUILT_IN`;
        default the vocabulary's own template.
      add_bos: begin prompts that are texts with BOS; a chat template writes its own.
      data_root: directory of relative patterns; None for the working directory.
      cache_dir: directory of remembered checksums; default $ESPALIER_CACHE or ~/.cache/espalier.

    Raises:
      FileNotFoundError: a pattern matches no file.
      ChatTemplateError: the chat template does not exist.
      ValueError: `add_bos` is set and the vocabulary has no BOS.
    """
    import seqio

    source = PromptFiles.open(
        name=name,
        files=files,
        vocabulary=vocabulary,
        validation_files=validation_files,
        validation_fraction=validation_fraction,
        chat_template=chat_template,
        add_bos=add_bos,
        add_eos=False,
        data_root=data_root,
        cache_dir=cache_dir,
    )
    tasks.register_features(
        name,
        source,
        origin="register_prompts",
        features={"prompt": vocabulary, INFO: seqio.PassThroughVocabulary(256)},
        facts=source.facts,
    )
