"""SeqIO tasks of supervised data, registered by a plain function that gin binds."""

import os
from collections.abc import Mapping
from typing import Any

from espalier.common.ranges import Fraction, check_choice
from espalier.data import tasks
from espalier.data.chats import spans
from espalier.data.chats.files import ChatFiles
from espalier.data.data_source import Files, named_sets


def register_chats(
    *,
    name: str,
    files: Files,
    vocabulary: Any,
    validation_files: Files | None = None,
    validation_fraction: Fraction = 0.01,
    turns: spans.Turns = "all",
    chat_template: str | None = None,
    special_in_contents: bool = True,
    add_bos: bool | None = None,
    add_eos: bool = True,
    data_root: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Registers a task over files of conversations, prompts with completions, or texts; see `data.chats.records`.

    The files are JSON lines (also .gz and .zst) or Parquet, with rows of one form. The features are the ids `targets`
    and `loss_weights`: 1 for the tokens of the assistant's turns, of completions or of texts, else 0.

    Several sets, given by name, become a task each, and `name` their mixture; `data.chats.stream` weighs them.
    Malformed rows are an error. Rows from which nothing can be learnt are dropped and counted by reason.

    Args:
      name: name of the task, or of the mixture.
      files: one glob pattern or several; or set -> its patterns.
      vocabulary: a SeqIO vocabulary, such as from `data.tokenizers.vocabularies`.
      validation_files: one glob pattern or several, of held-out files; with several sets, set -> its patterns.
      validation_fraction: share of the rows of each set to hold out, if there are no `validation_files`; rows with the
        same prompt are in one split. 0 makes no validation split.
      turns: the turns of the assistant that are learnt: 'all', or the 'last' one of each conversation.
      chat_template: for rows with messages: a jinja file, or a name in
        `data.tokenizers.chat_template.BUILT_IN`; default the vocabulary's own template.
      special_in_contents: whether special tokens that contents of messages spell are special tokens, as in TRL; False
        encodes them as text, as commands that answer do. Those that the template writes always are.
      add_bos: begin texts, and prompts that are texts, with BOS; None: if the tokenizer does. A chat template writes
        its own.
      add_eos: end texts and completions that are texts with EOS.
      data_root: directory of relative patterns; None for the working directory.
      cache_dir: directory of remembered checksums; default $ESPALIER_CACHE or ~/.cache/espalier.

    Raises:
      FileNotFoundError: a pattern matches no file.
      ChatTemplateError: the chat template does not exist.
      ValueError: `turns` has an unknown value, sets differ, or the vocabulary lacks the BOS or EOS to add.
    """
    check_choice(f"{name}: turns", turns, spans.Turns)
    if add_bos is None:
        add_bos = getattr(vocabulary, "adds_bos", False)
    sets = named_sets(name, files, validation_files)
    for each, (patterns, held_out) in sets.items():
        source = ChatFiles.open(
            name=each,
            files=patterns,
            vocabulary=vocabulary,
            validation_files=held_out,
            validation_fraction=validation_fraction,
            chat_template=chat_template,
            special_in_contents=special_in_contents,
            add_bos=add_bos,
            add_eos=add_eos,
            data_root=data_root,
            cache_dir=cache_dir,
            turns=turns,
        )
        tasks.register_rows(
            source,
            origin="register_chats",
            features={"targets": vocabulary, "loss_weights": None},
            facts={"turns": turns, **source.facts},
        )
    if isinstance(files, Mapping):
        tasks.register_mixture(name, dict.fromkeys(sets, 1.0))
