"""Documents and queries of influence: rows of files or of SeqIO mixtures, as the model reads them."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any

from annotated_types import Ge

from espalier.common.ranges import Count, Size
from espalier.common.storage import paths
from espalier.data.stream.rows import SENTENCE
from espalier.data.text import documents as document_files
from espalier.launch.config.setting_flags import File, Name
from espalier.launch.inference import row_files
from espalier.launch.inference.generate import with_prompt_key
from espalier.launch.inference.score import scored_row
from espalier.launch.inference.texts import decoder_of
from espalier.launch.influence import labels, sources
from espalier.launch.load import run_model
from espalier.launch.load.load_run import LoadedRun, LoadError, RunConfig
from espalier.trainers.decoding.stop_strings import GrowingText
from espalier.trainers.scoring.scoring import Row

QUERY_EXAMPLE = '{"prompt": "2 + 3 =", "completion": " 5"}'
DOCUMENT_EXAMPLE = '{"text": "..."} or {"tokens": [...]}'
LENGTH = 512
_SHOWN = 5


def length_of(run: LoadedRun, length: int | None) -> int:
    """Returns the number of tokens that are read of a document.

    Raises:
      LoadError: it is longer than the model's learned positions, or not positive.
    """
    limit = run.model.max_length
    if length is None:
        return min(LENGTH, limit or LENGTH)
    if length < 1 or (limit is not None and length > limit):
        upper = f" and at most the model's {limit} positions" if limit else ""
        raise LoadError(f"--length={length} must be at least 1{upper}.")
    return length


@contextlib.contextmanager
def query_run(
    config: RunConfig, run: LoadedRun, other: str | None, *, params: str
) -> Iterator[LoadedRun]:
    """Context manager: yields the queries' model, which is `run`, or that of another checkpoint."""
    if other is None:
        yield run
        return
    own = dataclasses.replace(
        config, model=run_model.of_checkpoint(other, macro="query_checkpoint")
    )
    with own.load(other, params=params, encoder_decoders=True) as loaded:
        yield loaded


def read_queries(run: LoadedRun, path: str, length: int, *, written: bool = False) -> list[Row]:
    """Returns the queries of a file; of one that `completions.write` has `written`, with the tokens of the completions.

    Raises:
      LoadError: there is none, or one has no prompt, an empty completion or too many tokens.
      RowFileError, DataError: the file cannot be read.
    """
    rows = []
    for where, row in row_files.read(path, example=QUERY_EXAMPLE, flag="queries"):
        own = {"completion": row["completion_tokens"]} if written else {}
        rows.append(_query(run, {**row, **own}, where, length))
    if not rows:
        raise LoadError(f"--queries={path} has no query: give lines such as {QUERY_EXAMPLE}.")
    return rows


def prompt_row(run: LoadedRun, prompt: Any, where: str) -> Mapping[str, Any]:
    """Returns a prompt as a row that the model reads; raises LoadError if it is none."""
    if not isinstance(prompt, str | list):
        raise LoadError(
            f"{where}: the prompt is neither a text, nor a list of token ids or of messages."
        )
    if run.encodes:
        return {"inputs": prompt}
    if isinstance(prompt, list) and all(type(id) is int for id in prompt):
        return {"tokens": prompt}
    return with_prompt_key({"prompt": prompt})


def _query(run: LoadedRun, row: Mapping[str, Any], where: str, length: int) -> Row:
    missing = [key for key in ("prompt", "completion") if key not in row]
    if missing:
        raise LoadError(
            f"{where} has no {missing[0]!r}: a query is a row such as {QUERY_EXAMPLE}. With --completion_tokens=N the model "
            "writes the completions."
        )
    labels.query(row, where)  # a wrong label is an error before documents are read
    asked = {**prompt_row(run, row["prompt"], where), "targets": row["completion"]}
    query = _read(run, asked, where)
    if not query.targets:
        raise LoadError(
            f"{where}: the completion is empty, so there is nothing to explain: give its text, such as {QUERY_EXAMPLE}."
        )
    read = max(query.inputs, len(query.encoder_inputs))
    if read > length:
        raise LoadError(
            f"{where}: the query has {read} tokens, and the context {length}: shorten it, or raise --length."
        )
    return query


def _read(run: LoadedRun, row: Mapping[str, Any], where: str) -> Row:
    """Returns a row of a file; raises LoadError if it has what only routers of sentences read."""
    read = scored_row(run, row, where)
    if read.columns:
        raise LoadError(
            f"{where} has {SENTENCE!r}, which influence does not read: remove it, and give a model whose routers read no sentences."
        )
    return read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Which documents are read.

    Attributes:
      documents: file of documents as JSON lines, also .gz or .zst.
      mixture: SeqIO mixture or task, instead of a file.
      split: split of the mixture that is read.
      module: module to import that registers mixtures; repeatable.
      max_documents: number of first documents that are read; all if not set.
      sequences: training sequences in their order, instead of a file: NAME of Megatron's files NAME.bin and NAME.idx, as of
        Pythia's data.
      sequence_tokens: tokens of each, the model's length in training and one more.
      step_sequences: sequences of a training step.
      first_step: the first training step whose sequences are read, from 0.
      end_step: the step before which reading ends, such as the checkpoint's; all if not set.
    """

    documents: File | None = None
    mixture: Name | None = None
    split: Name = "train"
    module: Sequence[Name] = ()
    max_documents: Size | None = None
    sequences: File | None = None
    sequence_tokens: Annotated[int, Ge(2)] = 2049
    step_sequences: Size = 1024
    first_step: Count = 0
    end_step: int | None = None

    def length(self, run: LoadedRun, length: int | None) -> int:
        """Returns `length_of` a document: of a sequence, the whole if it is not set."""
        if length is None and self.sequences is not None:
            return sources.length_of(run, self.sequence_tokens)
        return length_of(run, length)

    def of(
        self, run: LoadedRun, length: int, part: Sequence[tuple[int, Any]] | None = None
    ) -> "Documents":
        """Returns the documents as a model reads them, at most `length` tokens of each; see `Documents` for a part of them."""
        return Documents(run=run, length=length, source=self, part=part)

    def import_mixtures(self) -> None:
        """Imports the modules of a mixture; raises LoadError for settings of a mixture or of sequences without them."""
        if self.sequences is None:
            for name in sources.SETTINGS:
                if getattr(self, name) != getattr(Source, name):
                    raise LoadError(
                        f"--{name} is of sequences: add --sequences=NAME, or remove --{name}."
                    )
        if self.mixture is None:
            for name, is_set in (("module", self.module), ("split", self.split != "train")):
                if is_set:
                    raise LoadError(
                        f"--{name} is of a mixture: add --mixture=NAME, or remove --{name}."
                    )
            return
        from espalier.data.text import user_data

        for module in self.module:
            user_data.import_mixtures(module=module)


@dataclasses.dataclass(kw_only=True)
class Documents:
    """Documents that are read from the first on at each iteration: of a file, a SeqIO mixture, or sequences in order.

    Repetitions among sequences are not looked for: their digests would be more than a machine's memory.

    Attributes:
      run: the model that reads them.
      length: tokens that are read of each; the rest is cut off.
      source: which documents these are.
      part: (line, row) of some documents of the file, which are read instead of it; None for all.
      cut: number of documents that were cut, of the last iteration.
      repeated: (place, place of the first) of documents with the tokens of an earlier one, of the last iteration.
    """

    run: LoadedRun
    length: int
    source: Source
    part: Sequence[tuple[int, Any]] | None = None
    cut: int = 0
    repeats: int = 0
    repeated: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self.path, self.limit = self.source.documents, self.source.max_documents
        self.mixture, self.split = self.source.mixture or "", self.source.split
        named = (self.path, self.source.mixture, self.source.sequences)
        if sum(name is not None for name in named) != 1:
            raise LoadError(
                "Give the documents, by one of --documents=FILE, --mixture=NAME and --sequences=NAME."
            )
        self.order = None
        if self.source.sequences is not None:
            self.order = sources.order_of(
                *(self.run, self.source.sequences),
                tokens=self.source.sequence_tokens,
                **{name: getattr(self.source, name) for name in sources.SETTINGS[1:]},
            )
        elif self.path is None:
            sources.check_mixture(self.run, self.mixture, self.split)
        elif self.part is None:
            self._file = row_files.local(self.path, "documents")

    def __iter__(self) -> Iterator[Row]:
        self.cut, self.repeats, self.repeated = 0, 0, []
        if self.order is not None:
            yield from (row for _, row in itertools.islice(self._placed(), self.limit))
            return
        seen: dict[bytes, int] = {}
        for number, (where, row) in enumerate(itertools.islice(self._placed(), self.limit), 1):
            digest = hashlib.blake2b(_content(row), digest_size=8).digest()
            first = seen.setdefault(digest, number)
            if first != number and row.targets:
                self.repeats += 1
                if self.repeats <= _SHOWN:
                    self.repeated.append((where, f"document {first}"))
            yield row

    def chosen(self, wanted: Collection[int]) -> Iterator[tuple[int, Row]]:
        """Yields (number, row) of the wanted documents, ascending."""
        if self.order is not None:
            at = self.order.chosen(self.run, wanted)
            yield from ((i, self._cut(row)) for i, row in at)
            return
        yield from ((i, row) for i, row in enumerate(self) if i in wanted)

    def texts(self, wanted: Collection[int]) -> Iterator[dict[str, Any]]:
        """Yields {"document": number, "text": decoded tokens} of those wanted documents that come without a text."""
        without = set(wanted)
        if self.path is not None:
            rows = enumerate(row for _, row in itertools.islice(self.lines(), self.limit))
            without = {i for i, row in rows if i in without and "text" not in row}
        if without:
            for i, row in self.chosen(without):
                yield {"document": i, "text": "".join(texts(self.run, row))}

    def record(self) -> dict[str, Any]:
        """Returns what identifies the documents: the digest of the file, or of tokens of others, which are read once."""
        if self.order is not None:
            return self.order.record(self.limit)
        if self.path is not None:
            own = row_files.digest(self.path, "documents")
            return {"path": paths.absolute(self.path), "sha256": own, "limit": self.limit}
        tokens = hashlib.sha256()
        for row in self:
            tokens.update(_content(row))
        named = {"mixture": self.mixture, "split": self.split, "limit": self.limit}
        return {**named, "sha256": tokens.hexdigest()}

    def count(self) -> int | None:
        """Returns the number of documents; of a mixture about the number, or None if neither it nor the limit is known."""
        if self.order is not None:
            return min(self.order.count, self.order.count if self.limit is None else self.limit)
        if self.path is None:
            own = [task.num_input_examples(self.split) for task in sources.tasks_of(self.mixture)]
            known = [] if None in own else [sum(own)]
            return min([*known, *([] if self.limit is None else [self.limit])], default=None)
        return sum(1 for _ in itertools.islice(self.lines(), self.limit))

    def facts(self, number: int) -> dict[str, Any]:
        """Returns the extra entries of a document's row of scores: for a sequence its number and its step, else none."""
        return {} if self.order is None else self.order.facts(number)

    def notes(self) -> list[str]:
        """Returns sentences about documents that were cut, and repeated ones, of the last iteration."""
        notes = []
        if self.cut:
            notes.append(f"documents cut to --length={self.length} tokens: {self.cut:,}")
        if self.repeats:
            shown = ", ".join(f"{where} repeats {first}" for where, first in self.repeated)
            more = f" and {self.repeats - _SHOWN:,} more" if self.repeats > _SHOWN else ""
            notes.append(
                f"documents that repeat an earlier one and have its scores: {self.repeats:,} ({shown}{more}); remove them to "
                "rank each once"
            )
        return notes

    def lines(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (number, row) of the lines of the file."""
        if self.part is not None:
            return iter(self.part)
        return document_files.read_json_lines(self._file, example=DOCUMENT_EXAMPLE)

    def _placed(self) -> Iterator[tuple[str, Row]]:
        for where, row in self._rows():
            read = row if isinstance(row, Row) else _read(self.run, row, where)
            short = self._cut(read)
            self.cut += short is not read
            yield where, short

    def _cut(self, row: Row) -> Row:
        room = max(0, self.length + 1 - len(row.context))
        if len(row.targets) <= room and len(row.encoder_inputs) <= self.length:
            return row
        return dataclasses.replace(
            row, targets=row.targets[:room], encoder_inputs=row.encoder_inputs[: self.length]
        )

    def _rows(self) -> Iterator[tuple[str, Any]]:
        if self.order is not None:
            yield from self.order.rows(self.run)
            return
        if self.path is not None:
            for number, row in self.lines():
                yield f"{self.path}, line {number}", row
            return
        for i, example in enumerate(sources.examples(self.mixture, self.split, self.length)):
            where = f"{self.mixture}, example {i}"
            targets = [int(id) for id in example["targets"]]
            inputs = [int(id) for id in example["inputs"]] if "inputs" in example else []
            if self.run.encodes:
                read = self.run.prefixed(inputs)
                yield (
                    where,
                    Row(context=[self.run.start_token or 0], targets=targets, encoder_inputs=read),
                )
                continue
            context = self.run.context(inputs)
            if not context:
                context, targets = targets[:1] or [0], targets[1:]
            yield where, Row(context=context, targets=targets)


def _content(row: Row) -> bytes:
    return repr((row.encoder_inputs, row.context, row.targets)).encode()


def texts(run: LoadedRun, row: Row) -> list[str]:
    """Returns the text that each target adds after the context; "" where a character is not complete.

    The first text begins with that of the context, without its first token if that only starts a text. Tokens of a run
    without a vocabulary are shown as numbers.
    """
    if not row.targets:
        return []
    first = 1 if row.context[0] == (run.start_token or 0) else 0
    before, last = row.context[first:], ""
    if run.vocabulary_or_none is None:
        pieces = [f"{token} " for token in [*before, *row.targets]]
    else:
        growing = GrowingText(decoder_of(run.vocabulary))
        pieces = [growing.add(int(token)) for token in [*before, *row.targets]]
        last = growing.finish()
    joined = ["".join(pieces[: len(before) + 1]), *pieces[len(before) + 1 :]]
    return [*joined[:-1], joined[-1] + last]


def write_sample(path: pathlib.Path, rows: list[Row]) -> None:
    """Writes the first documents that factors were fitted on, which refinements and measurements use."""
    path.write_text(json.dumps([dataclasses.asdict(row) for row in rows]) + "\n")


def read_sample(path: pathlib.Path) -> list[Row]:
    """Returns the documents of `write_sample`; none without the file."""
    if not path.is_file():
        return []
    try:
        return [Row(**row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError):
        raise LoadError(f"{path} is damaged: fit the factors again.") from None
