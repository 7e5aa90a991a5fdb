"""SeqIO tasks of supervised data: files as a source of tokens with a loss weight each, registered by a function that gin binds.

    {"messages": [{"role": "user", "content": "..."}, ...]}      a conversation; the assistant's turns are learnt
    {"prompt": ..., "completion": ...}                           texts or messages; the completion is learnt
    {"text": "..."}                                              a text, which is learnt as a whole

The first of these forms that a row has counts, and its other keys are ignored. With messages, "tools" and
"chat_template_kwargs" are passed to the chat template.

A template marks the assistant's turns itself with `{% generation %}`. Without such blocks, a turn is the text that the template
adds when it renders one message more: it begins after the generation prompt, where the model begins to write, and includes
all that closes the turn. A template that renders earlier messages otherwise once later ones follow has no such spans.
"""

import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from espalier.common.ranges import check_choice
from espalier.data import tasks
from espalier.data.data_source import Files, named_sets
from espalier.data.pieces import Piece
from espalier.data.rows import sentences
from espalier.data.rows.files import (
    TOKENS_VERSION,
    ExactSplit,
    PromptedFiles,
    PromptedSettings,
    Tokeniser,
)
from espalier.data.rows.records import (
    DegenerateError,
    Record,
    check_unicode,
    is_empty,
    template_variables,
    text_of,
)
from espalier.data.stream import rows
from espalier.data.stream.stream import with_settings
from espalier.data.text import documents, splits
from espalier.data.text.documents import DataError
from espalier.data.text.row_files import BadRows, Row
from espalier.data.tokenizers.chat_sandbox import Rendered

# Parts of the digest of a source: raise one when the same rows are read as other records, or the same records become other tokens.
ROWS_VERSION, VERSION = 1, 1
CACHED_AS = "data.chats.files"  # the name by which caches know the source
Kind = Literal["messages", "prompt", "text"]
Turns = Literal["all", "last"]
EXAMPLE = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)
_FORMS = f'{EXAMPLE}, {{"prompt": ..., "completion": ...}} or {{"text": "..."}}'
ASSISTANT = "assistant"


def parse(row: Mapping[str, Any], where: str, id: str) -> tuple[Kind, Record]:
    """Returns a row and its form: a conversation or text is the record's prompt, a completion its only completion.

    Raises:
      DataError: the row is malformed; the message names place, key and remedy.
      DegenerateError: there is nothing to learn: no turn of the assistant, or only empty texts.
    """
    kind = _kind(row, where)
    for key in (kind, "completion"):
        check_unicode(row.get(key), key, where)
    content = text_of(row[kind], kind, where)
    variables = template_variables(row, where)
    if kind == "prompt":
        return kind, _with_completion(row, Record(where, id, content, (), template=variables))
    if isinstance(content, str) == (kind == "messages"):
        expected = "a list of messages" if kind == "messages" else "a text"
        raise DataError(f"{where}: {kind!r} is not {expected}. A row is {_FORMS}")
    if kind == "text":
        if is_empty(content):
            raise DegenerateError("empty_text", "'text' is empty")
        return kind, Record(where, id, content, ())
    answers = [message for message in content if message["role"] == ASSISTANT]
    if not answers:
        raise DegenerateError("no_assistant", "'messages' has no turn of the assistant")
    if is_empty(answers):
        raise DegenerateError("empty_answer", "all turns of the assistant are empty")
    return kind, Record(where, id, content, (), template=variables)


def prompt_key(kind: Kind, record: Record) -> str:
    """Returns the text by which a row is held out: equal for rows with the same prompt before the first answer."""
    content = record.prompt
    if kind == "messages":
        content = tuple(itertools.takewhile(lambda m: m["role"] != ASSISTANT, content))
    if kind == "text" or content:
        return Record("", "", content, ()).prompt_text
    # Without a prompt, the whole row decides.
    return Record("", "", [record.prompt, record.completions], ()).prompt_text


def _kind(row: Mapping[str, Any], where: str) -> Kind:
    if "messages" in row:
        return "messages"
    if "prompt" in row and "completion" in row:
        return "prompt"
    if "text" in row:
        return "text"
    raise DataError(
        f"{where}: no key 'messages', no keys 'prompt' and 'completion', and no key 'text'; present are "
        f"{', '.join(map(repr, row)) or 'none'}. A row is {_FORMS}; rename its keys"
    )


def _with_completion(row: Mapping[str, Any], record: Record) -> Record:
    where = record.where
    completion = text_of(row["completion"], "completion", where)
    if isinstance(record.prompt, str) != isinstance(completion, str):
        raise DataError(
            f"{where}: one of 'prompt' and 'completion' is a text, the other has messages; write both in the "
            "same form"
        )
    if record.is_chat and not record.prompt:
        raise DataError(f"{where}: 'prompt' has no message; it needs at least one")
    if is_empty(completion):
        raise DegenerateError("empty_completion", "'completion' is empty")
    return Record(where, record.id, record.prompt, (completion,), template=record.template)


def rendered_turns(tokeniser: Tokeniser, record: Record, turns: Turns) -> Rendered:
    """Returns a conversation as text, with the spans of all turns of the assistant, or only of the last.

    Raises:
      DataError: there is no chat template, it rejects the messages, or a turn has no span.
    """
    whole = tokeniser.render(record, record.prompt)
    assert tokeniser.template is not None  # checked by `render`
    if tokeniser.template.marks_assistant(has_tools="tools" in record.template):
        spans = [(start, end) for start, end in whole.spans if start < end]
        return dataclasses.replace(whole, spans=tuple(spans[-1:] if turns == "last" else spans))
    places = [i for i, message in enumerate(record.prompt) if message["role"] == ASSISTANT]
    chosen = places[-1:] if turns == "last" else places
    turns_spans = tuple(_span(tokeniser, record, whole.text, place) for place in chosen)
    return dataclasses.replace(whole, spans=turns_spans)


def _span(tokeniser: Tokeniser, record: Record, whole: str, place: int) -> tuple[int, int]:
    """Returns the span of the assistant's message `place` in the whole text."""
    messages: Sequence = record.prompt
    if not place:  # no message comes before it that could be rendered alone
        raise DataError(
            f"{record.where}: 'messages' begins with the assistant, so the template cannot render what comes "
            "before. Begin with the user or a system message, or use a template with {% generation %}"
        )
    before = tokeniser.render(record, messages[:place], add_generation_prompt=True).text
    after = whole
    if place + 1 < len(messages):
        after = tokeniser.render(record, messages[: place + 1]).text
    if after.startswith(before) and whole.startswith(after):
        return len(before), len(after)
    only_last = "learn only the last turn (CHAT_TURNS = 'last'), or "
    later = any(message["role"] == ASSISTANT for message in messages[place + 1 :])
    raise DataError(
        f"{record.where}: 'messages': the chat template renders message {place + 1}, of the assistant, or the "
        "messages before it otherwise when more follow, so its tokens cannot be determined: "
        f"{only_last if later else ''}use a template with {{% generation %}} around the assistant's text "
        "(CHAT_TEMPLATE)"
    )


class _Example(NamedTuple):
    """A tokenised row."""

    kind: Kind
    record: Record
    key: str  # examples with equal keys are in one split
    ids: list[int]
    learnt: list[bool]  # whether each id is learnt
    sentence: Mapping[str, np.ndarray]  # its embedding, if there is one
    row: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatFiles(ExactSplit, PromptedFiles):
    """Rows of one form, by split; the held-out share is exact."""

    MACRO: ClassVar[str] = "CHATS"
    EXAMPLE: ClassVar[str] = EXAMPLE

    turns: Turns  # the turns of the assistant that are learnt
    sentences: bool = False  # whether rows have embeddings, see data/rows/sentences.py

    def read_examples(self, piece: Piece, split: str) -> Iterator[dict[str, Any]]:
        for example in self._examples(piece, split, self._bad_rows()):
            yield {
                "targets": np.array(example.ids, np.int32),
                "loss_weights": np.array(example.learnt, np.float32),
                "document_id": example.record.id,
                **example.sentence,
            }

    def tokenised_rows(self) -> Iterator[tuple[str, Mapping[str, Any], list[int], list[bool]]]:
        """Yields each row that can be learnt, of all splits: its place, content, ids, and whether each id is learnt."""
        pieces = dict.fromkeys(piece for split in self.splits for piece in self.pieces(split))
        for piece in pieces:
            for one in self._examples(piece, None, self._bad_rows()):
                yield one.record.where, one.row, one.ids, one.learnt

    def _features(self) -> dict[str, tuple[tuple[int | None, ...], str]]:
        targets = {"targets": ((None,), "int32"), "loss_weights": ((None,), "float32")}
        return {**targets, **sentences.features(self.sentences)}

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "version": [VERSION, ROWS_VERSION, splits.VERSION, documents.VERSION, TOKENS_VERSION],
            "turns": self.turns,
            **({"sentences": True} if self.sentences else {}),
            "special": [self.tokeniser.add_bos, self.tokeniser.add_eos],
        }

    def _examples(
        self,
        piece: Piece,
        split: str | None,
        bad: BadRows,
        dropped: tasks.Tally | None = None,
    ) -> Iterator[_Example]:
        """Yields the tokenised rows of a piece in one split, or in all; counts rows from which nothing can be learnt."""

        def use(row: Row) -> Iterator[_Example]:
            id = self._id(piece.path, row.number)
            try:
                kind, record = parse(row.content, row.where, id)
                key = prompt_key(kind, record)
                if split is None or self._split_of(key, piece.path) == split:
                    ids, learnt = self._tokenised(kind, record)
                    sentence: dict[str, np.ndarray] = {}
                    if self.sentences:
                        sentence = {rows.SENTENCE: sentences.of_row(row.content, row.where)}
                    yield _Example(kind, record, key, ids, learnt, sentence, row.content)
            except DegenerateError as error:
                if dropped is not None:
                    dropped.add(error.reason, id)

        return self._usable(piece, self._rows(piece, bad), use, bad)

    def _tokenised(self, kind: Kind, record: Record) -> tuple[list[int], list[bool]]:
        """Returns the ids of a row, and whether each is learnt; raises DegenerateError if none is."""
        if kind == "text":
            ids = self.tokeniser.text(record.prompt)
            return ids, [True] * len(ids)
        if kind == "prompt" and not record.is_chat:
            prompt, (completion,) = self.tokeniser(record)
            return [*prompt, *completion], [False] * len(prompt) + [True] * len(completion)
        if kind == "prompt":
            ids, learnt = self._completed(record)
        else:
            rendered = rendered_turns(self.tokeniser, record, self.turns)
            ids, learnt = self.tokeniser.encode_marked(rendered)
        if not any(learnt):
            raise DegenerateError("not_rendered", "the template renders nothing of the assistant")
        return ids, learnt

    def _completed(self, record: Record) -> tuple[list[int], list[bool]]:
        """Returns the ids of a prompt of messages with its completion, learnt from where they leave the prompt's ids."""
        prompt = self.tokeniser.render(record, record.prompt, add_generation_prompt=True)
        whole = self.tokeniser.continued(record, prompt.text, record.completions[0])
        before, ids = (self.tokeniser.encode_marked(r.after(0))[0] for r in (prompt, whole))
        start = len(os.path.commonprefix([before, ids]))
        return ids, [place >= start for place in range(len(ids))]

    def _form(self, example: _Example) -> tuple[str, str]:
        content = "messages" if example.record.is_chat else "texts"
        prompted = f"'prompt' and 'completion' with {content}"
        form = prompted if example.kind == "prompt" else repr(example.kind)
        return form, example.record.where


@with_settings(
    PromptedSettings,
    *("vocabulary", "validation_fraction", "chat_template", "special_in_contents", "add_eos"),
    *("columns", "on_bad_row", "data_root", "cache_dir"),
)
def register_chats(
    *,
    name: str,
    files: Files,
    settings: PromptedSettings,
    validation_files: Files | None = None,
    turns: Turns = "all",
    add_bos: bool | None = None,
    with_sentences: bool = False,
) -> None:
    """Registers a task over files of conversations, prompts with completions, or texts; see the module.

    The files are JSON lines (also .gz and .zst), Parquet or Arrow, or data sets of Hugging Face, with rows of one form. The features are the ids `targets`
    and `loss_weights`: 1 for the tokens of the assistant's turns, of completions or of texts, else 0.

    Several sets, given by name, become a task each, and `name` their mixture; `data.chats.stream` weighs them.
    Malformed rows are an error, see `on_bad_row`. Rows from which nothing can be learnt are dropped and counted by reason.

    Args:
      name: name of the task, or of the mixture.
      files: one glob pattern or several; or set -> its patterns.
      validation_files: one glob pattern or several, of held-out files; with several sets, set -> its patterns.
      turns: the turns of the assistant that are learnt: 'all', or the 'last' one of each conversation.
      add_bos: begin texts, and prompts that are texts, with BOS; None: if the tokenizer does. A chat template writes
        its own.
      with_sentences: read an embedding of each row for routers, see data/rows/sentences.py.

    `data.rows.files.PromptedSettings` describes the other arguments.

    Raises:
      FileNotFoundError: a pattern matches no file.
      ChatTemplateError: the chat template does not exist.
      ValueError: `turns` has an unknown value, sets differ, or the vocabulary lacks the BOS or EOS to add.
    """
    check_choice(f"{name}: turns", turns, Turns)
    if add_bos is None:
        add_bos = getattr(settings.vocabulary, "adds_bos", False)
    settings = dataclasses.replace(settings, add_bos=add_bos)
    sets = named_sets(name, files, validation_files)
    embedded = dict.fromkeys(sentences.features(with_sentences))
    for each, (patterns, held_out) in sets.items():
        paths = {"files": patterns, "validation_files": held_out}
        source = ChatFiles.open(settings, name=each, turns=turns, sentences=with_sentences, **paths)
        tasks.register_rows(
            source,
            origin="register_chats",
            features={"targets": settings.vocabulary, "loss_weights": None, **embedded},
            facts={"turns": turns, **source.facts},
        )
    if isinstance(files, Mapping):
        tasks.register_mixture(name, dict.fromkeys(sets, 1.0))
