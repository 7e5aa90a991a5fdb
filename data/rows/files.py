"""Sources that read files of rows: with an exact share held out, and with a prompt in each row; and the tokens of their records.

Prompts and completions that are texts are tokenised separately, so that no token spans the boundary. With a chat template, the
prompt ends with the opening of the assistant's turn (the generation prompt). A completion is the text that the template adds to the
prompt when it also renders the completion's messages. It has the tokens that follow the prompt's in the whole conversation, or,
if a token spans the boundary, is tokenised separately. The template writes BOS and ends of turns; no further special
tokens are added, but BOS if the vocabulary reads none in texts, as SentencePiece's.
"""

import abc
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from espalier.common.ranges import Fraction
from espalier.common.spelling import few
from espalier.data import tasks
from espalier.data.cache import fingerprint
from espalier.data.data_source import FileSource
from espalier.data.pieces import Piece
from espalier.data.rows import columns
from espalier.data.rows.columns import Columns
from espalier.data.rows.records import Message, Record
from espalier.data.text import documents, splits
from espalier.data.text.documents import DataError
from espalier.data.text.row_files import BadRows, OnBadRow, Row, SettingError
from espalier.data.tokenizers import chat_sandbox, control_tokens
from espalier.data.tokenizers import chat_template as templates

# Part of the digest of a source: raise it when the same records become other tokens.
TOKENS_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Tokeniser:
    """Converts records to ids."""

    vocabulary: Any  # a SeqIO vocabulary
    # chat template of records with messages; None if all records are texts
    template: templates.ChatTemplate | None
    add_bos: bool  # begin prompts that are texts with BOS, and messages if their template cannot write it
    add_eos: bool  # end completions that are texts with EOS
    prompt_eos: bool = False  # end prompts with EOS, as an encoder's inputs

    def __call__(self, record: Record) -> tuple[list[int], list[list[int]]]:
        """Returns the ids of the prompt, and of each completion.

        Raises:
          DataError: the chat template is missing, rejects the messages, or renders the prompt differently when a
            completion follows.
        """
        if record.is_chat:
            return self._conversation(record)
        encode = self.vocabulary.encode
        return (
            [*self._bos, *encode(record.prompt), *self._prompt_eos],
            [[*encode(completion), *self._eos] for completion in record.completions],
        )

    def text(self, text: str) -> list[int]:
        """Returns the ids of a text that is not a prompt: with BOS and EOS, but only one EOS if the text ends with it."""
        ids = self.vocabulary.encode(text)
        return [*self._bos, *ids, *([] if ids[-1:] == self._eos else self._eos)]

    def encode_marked(self, rendered: chat_sandbox.Rendered) -> tuple[list[int], list[bool]]:
        """Returns the ids of a rendered conversation, and for each whether it overlaps one of the spans."""
        ids, marked = control_tokens.encode(self.vocabulary, rendered)
        bos = (
            [] if hasattr(self.vocabulary, "encode_marked") else self._bos
        )  # the template writes its own
        return [*bos, *ids], [*([False] * len(bos)), *marked]

    @property
    def _bos(self) -> list[int]:
        return [self.vocabulary.bos_id] if self.add_bos else []

    @property
    def _eos(self) -> list[int]:
        return [self.vocabulary.eos_id] if self.add_eos else []

    @property
    def _prompt_eos(self) -> list[int]:
        return [self.vocabulary.eos_id] if self.prompt_eos else []

    def _conversation(self, record: Record) -> tuple[list[int], list[list[int]]]:
        prompt = self.render(record, record.prompt, add_generation_prompt=True)
        before, size = self.encode_marked(prompt.after(0))[0], len(prompt.text)

        def completed(messages: Sequence[Message]) -> list[int]:
            whole = self.continued(record, prompt.text, messages)
            divided = dataclasses.replace(whole, spans=((size, len(whole.text)),))
            ids, after = self.encode_marked(divided)
            start = after.index(True) if True in after else len(ids)
            if ids[:start] == before and not self.prompt_eos:  # a decoder begins its own text
                return ids[start:]
            return control_tokens.encode(self.vocabulary, whole.after(size))[0]

        return [*before, *self._prompt_eos], [*map(completed, record.completions)]

    def continued(
        self, record: Record, prompt: str, completion: Sequence[Message]
    ) -> chat_sandbox.Rendered:
        """Returns a record's prompt with a completion; raises DataError if its text does not begin with `prompt`."""
        rendered = self.render(record, [*record.prompt, *completion])
        whole = rendered.text
        if not whole.startswith(prompt):
            place = len(os.path.commonprefix([prompt, whole]))
            raise DataError(
                f"{record.where}: the chat template renders the prompt differently when a completion "
                f"follows, from character {place} on ({prompt[place : place + 30]!r} before, "
                f"{whole[place : place + 30]!r} after), so prompt and completion cannot be separated. "
                "Write texts, or use a template that begins each turn of the assistant with its "
                "generation prompt"
            )
        return rendered

    def render(
        self, record: Record, messages: Sequence[Message], **options: Any
    ) -> chat_sandbox.Rendered:
        """Returns messages rendered with the record's tools, see `ChatTemplate.render_spans`.

        Raises:
          SettingError: there is no chat template.
          DataError: it rejects the messages.
        """
        if self.template is None:
            raise SettingError(
                f"{record.where}: messages need a chat template, and the vocabulary has none. Set "
                f"chat_template to a jinja file or one of {', '.join(templates.BUILT_IN)}, or write "
                "texts"
            )
        try:
            return self.template.render_spans(messages, **record.template, **options)
        except templates.ChatTemplateError as error:
            raise DataError(f"{record.where}: {error}") from None


class Example(Protocol):
    """A row of a file; rows with equal keys are in one split."""

    @property
    def key(self) -> str: ...


Form = tuple[str, str] | None  # see `ExactSplit._form`


class _Rows(NamedTuple):
    """What is counted of the rows of a piece."""

    form: Form  # of its first example
    hashes: list[int]  # of the keys of all examples
    dropped: tasks.Tally


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowFiles(FileSource, abc.ABC):
    """Rows in files, by split."""

    MACRO: ClassVar[str]  # of the files; the macros of the held-out ones begin with it

    def _empty(self, split: str, total: int, dropped: tasks.Tally) -> DataError:
        where = f"{self.name}: {few(self.files[split], 3)}"
        if total:
            return DataError(
                f"{where}: validation_fraction={self.validation_fraction} of {total} examples leaves none for the {split} "
                f"split. Change validation_fraction ({self.MACRO}_VALIDATION_FRACTION; 0 holds none out), or give "
                f"validation_files ({self.MACRO}_VALIDATION)"
            )
        return DataError(f"{where}: there is no example ({str(dropped) or 'every file is empty'})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactSplit(RowFiles, abc.ABC):
    """Rows in files, by split: an exact share is held out, also of few. Numbers and hashes are counted once, and stored on disk."""

    @abc.abstractmethod
    def _examples(
        self,
        piece: Piece,
        split: str | None,
        bad: BadRows,
        dropped: tasks.Tally | None = None,
    ) -> Iterator[Any]:
        """Yields each `Example` of a piece in one split, or in all; counts rows from which nothing can be learnt."""

    def _form(self, example: Any) -> Form:
        """Returns the form that all rows of a set must have, in words, and the place of a row; None if all forms may be."""
        return None

    def _same_form(self, first: Form, form: Form) -> Form:
        """Returns the form of a set's first row; raises DataError if another row has another form."""
        if first and form and form[0] != first[0]:
            raise DataError(
                f"{form[1]}: the row has {form[0]}, but {first[1]} has {first[0]}. Put rows of different forms into "
                f"different sets ({self.MACRO} = {{'name': 'files', ...}})"
            )
        return first or form

    def _split_of(self, text: str, path: str) -> str:
        if not self.validation_fraction:
            return super()._split_of(text, path)
        return "validation" if _hash(text) in self._held_out else "train"

    @functools.cached_property
    def _held_out(self) -> frozenset[int]:
        return frozenset(self._counted["held_out"])

    def _count_piece(self, piece: Piece, bad: BadRows) -> _Rows:
        dropped, hashes = tasks.Tally(), []
        form: Form = None
        for example in self._examples(piece, None, bad, dropped):
            form = self._same_form(form, self._form(example))
            hashes.append(_hash(example.key))
        return _Rows(form, hashes, dropped)

    def _total(self, counts: Mapping[Piece, _Rows]) -> dict[str, Any]:
        """Returns the numbers of examples, dropped rows, and the hashes of held-out keys."""
        dropped = tasks.Tally()
        hashes: dict[str, list[int]] = {path: [] for path in self.checksums}
        form: Form = None
        for piece, rows in counts.items():
            form = self._same_form(form, rows.form)
            hashes[piece.path] += rows.hashes
            dropped.merge(rows.dropped)
        train = [value for path in self.files["train"] for value in hashes[path]]
        held_out = splits.held_out_hashes(train, fraction=self.validation_fraction)
        held = sum(value in held_out for value in train)
        examples = {"train": len(train) - held}
        if self.validation_fraction:
            examples["validation"] = held
        elif "validation" in self.files:
            examples["validation"] = sum(len(hashes[path]) for path in self.files["validation"])
        for split, count in examples.items():
            if not count:
                raise self._empty(split, len(train), dropped)
        return {"examples": examples, "dropped": dropped, "held_out": sorted(held_out)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedSettings:
    """How rows with prompts are tokenised, and how many are held out.

    Attributes:
      vocabulary: a SeqIO vocabulary, such as from `data.tokenizers.vocabularies`.
      validation_fraction: share of the rows to hold out, if there are no files of held-out rows; rows with the same prompt
        are in one split. 0 makes no validation split.
      chat_template: for rows with messages: a jinja file, or a name in
        `data.tokenizers.chat_template.BUILT_IN`; default the vocabulary's own template.
      special_in_contents: whether special tokens that contents of messages spell are special tokens, as in TRL; False
        encodes them as text, as commands that answer do. Those that the template writes always are.
      add_bos: begin texts, and prompts that are texts, with BOS; a chat template writes its own, or with a SentencePiece
        vocabulary, which reads none in texts, messages begin with BOS too.
      add_eos: end texts and completions that are texts with EOS.
      prompt_eos: end prompts with EOS, as an encoder reads them.
      columns: key of a row -> the column of the files that it is read from, or several columns whose texts are joined by
        blank lines; a row then has these keys alone. None: the keys of the files.
      on_bad_row: what a malformed row is: an 'error', or left out, counted and listed ('skip').
      data_root: directory of relative patterns; None for the working directory.
      cache_dir: directory of remembered checksums; default $ESPALIER_CACHE or ~/.cache/espalier.
    """

    vocabulary: Any
    validation_fraction: Fraction = 0.01
    chat_template: str | None = None
    special_in_contents: bool = True
    add_bos: bool = False
    add_eos: bool = True
    prompt_eos: bool = False
    columns: Columns | None = None
    on_bad_row: OnBadRow = "error"
    data_root: str | None = None
    cache_dir: str | os.PathLike | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptedFiles(RowFiles, abc.ABC):
    """Rows with a prompt each, by split; equal prompts are in the same split."""

    EXAMPLE: ClassVar[str]  # a row as JSON, for error messages

    tokeniser: Tokeniser  # converts records to ids
    columns: Columns | None = None  # of the keys of a row, see `data.rows.columns`

    @classmethod
    def open(cls, settings: PromptedSettings, **fields: Any) -> Self:
        """Returns the source of a task, with the other `fields` of `FileSource.find`, whose errors it raises too.

        Raises:
          ChatTemplateError: the chat template does not exist.
          DataError: a file is not of rows.
          ValueError: the vocabulary lacks the BOS or EOS to add, or `columns` is malformed.
        """
        columns.check(fields["name"], settings.columns)
        vocabulary, add_bos = settings.vocabulary, settings.add_bos
        add_eos = settings.add_eos or settings.prompt_eos
        tasks.check_special_ids(fields["name"], vocabulary, add_bos=add_bos, add_eos=add_eos)
        template = templates.of(
            settings.chat_template, vocabulary, special_in_contents=settings.special_in_contents
        )
        source = cls.find(
            tokeniser=Tokeniser(
                vocabulary, template, add_bos, settings.add_eos, settings.prompt_eos
            ),
            columns=settings.columns,
            validation_fraction=settings.validation_fraction,
            on_bad_row=settings.on_bad_row,
            data_root=settings.data_root,
            cache_dir=settings.cache_dir,
            **fields,
        )
        for path in sorted({path for files in source.files.values() for path in files}):
            documents.check_rows(path, cls.EXAMPLE)
        return source

    @property
    def reads_clock(self) -> bool:
        """Whether records depend on when they are made; see `data.cache.description.describe`."""
        template = self.tokeniser.template
        return template is not None and template.reads_clock

    @property
    def facts(self) -> dict[str, Any]:
        """Returns facts for the record of a run."""
        template = self.tokeniser.template
        return {
            "vocabulary": str(self.tokeniser.vocabulary),
            "chat_template": template and template.origin,
            "add_bos": self.tokeniser.add_bos,
            "add_eos": self.tokeniser.add_eos,
        }

    def _settings(self) -> dict[str, Any]:
        template = self.tokeniser.template
        described = template and [template.templates, template.variables]
        if template and template.added:  # absent by default, so that older caches remain valid
            described = [*described, sorted(template.added.items())]
        return {
            "vocabulary": fingerprint.vocabulary(self.tokeniser.vocabulary),
            "template": fingerprint.describe(described),
            **columns.settings(self.columns),
        }

    def _rows(self, piece: Piece, bad: BadRows) -> Iterator[Row]:
        """Yields the rows of a piece; see `columns.read`."""
        return columns.read(piece, example=self.EXAMPLE, columns=self.columns, bad=bad)

    def _id(self, path: str, line: int) -> str:
        return f"{self.relative(path)}:{line}"


def _hash(text: str) -> int:
    return splits.stable_hash(text, salt="split")
