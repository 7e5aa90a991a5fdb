"""Registers data as tasks: the corpus, files, TFDS sets, and modules that register SeqIO tasks."""

import importlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.common.ranges import Fraction, NonNegative, Positive
from espalier.data import seqio_tasks, tasks
from espalier.data.cache import cache_dir as cache
from espalier.data.data_source import Files
from espalier.data.stream import mixing
from espalier.data.text import corpus as corpus_lib
from espalier.data.text import document_files, documents, tfds_source
from espalier.data.text.document_filters import DocumentFilter
from espalier.data.text.row_files import OnBadRow
from espalier.data.text.sources import names


def register_corpus(
    *,
    vocabulary: Any,
    corpus: corpus_lib.Corpus | None = None,
    sources: Sequence[str] = ("all",),
    temperature: Positive = 1.0,
    language_temperature: Positive = 3.0,
    add_bos: bool = False,
    add_eos: bool = True,
) -> None:
    """Registers the corpus: tasks `english`, `docstrings`, `python`, `cpp`, `markup`, `lang_<code>`.

    The mixtures are `text` (english, docstrings), `code` (python, cpp), `multilingual` (all
    languages) and `all`. Each mixture contains only sources that the corpus holds. A second call
    with the same arguments changes nothing.

    Args:
      vocabulary: a SeqIO vocabulary, such as from `data.tokenizers.vocabularies`.
      corpus: an assembled corpus; by default `data.text.corpus.assemble(sources=sources)`.
      sources: names of sources or groups to register.
      temperature: a source of b bytes has the rate b ** (1 / temperature) in a mixture.
      language_temperature: the temperature of `multilingual`, whose sources differ tenfold in size.
      add_bos: begin each document with the vocabulary's BOS.
      add_eos: end each document with EOS.

    Raises:
      ValueError: a source is unknown, or the corpus holds none of the sources.
    """
    wanted = names.resolve(sources)
    if corpus is None:
        corpus = corpus_lib.assemble(sources=sources)
    present = [source for source in wanted if source in corpus.sources]
    if not present:
        raise ValueError(
            f"none of the sources {', '.join(wanted)} is in the corpus, which holds "
            f"{', '.join(corpus.sources)}"
        )
    for source in present:
        tasks.register_source(
            source,
            corpus.source(source),
            origin="register_corpus",
            vocabulary=vocabulary,
            add_bos=add_bos,
            add_eos=add_eos,
        )
    for group, grouped in names.GROUPS.items():
        members = [source for source in grouped if source in present]
        exponent = 1 / (language_temperature if group == "multilingual" else temperature)
        if members:
            tasks.register_mixture(
                group, {source: corpus.size(source) ** exponent for source in members}
            )
    tasks.record_corpus(corpus.digest, corpus.summary())


def register_files(
    *,
    name: str,
    files: Files,
    vocabulary: Any,
    shares: Mapping[str, NonNegative] | None = None,
    validation_files: Files | None = None,
    validation_fraction: Fraction = 0.01,
    text_key: str | Sequence[str] = "text",
    id_key: str | None = None,
    document_per: str = "file",
    max_document_bytes: int = documents.MAX_BYTES,
    data_root: str | None = None,
    filters: Sequence[DocumentFilter] = (),
    on_bad_row: OnBadRow = "error",
    add_bos: bool = False,
    add_eos: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Registers a task over files: JSON lines (.jsonl, also .gz and .zst), text, Parquet or Arrow, or data sets of Hugging Face.

    Several sets of files, given by name, become a task each, and `name` their mixture.

    Args:
      name: name of the task, or of the mixture.
      files: one or several globs of training files, or several sets, {name of the set: its globs}.
      vocabulary: a SeqIO vocabulary, such as from `data.tokenizers.vocabularies`.
      shares: of several sets: set -> its share of the tokens, normalised; None: the bytes of its training text, so that
        all are read about equally often.
      add_bos: begin each document with BOS.
      add_eos: end each document with EOS.

    `data.text.document_files.find` describes how documents are found, held out and filtered: the other arguments.

    Raises:
      FileNotFoundError: a pattern matches no file.
      ValueError: the files, the fraction, the shares or the filters are invalid, another task has this name, or
        the vocabulary lacks the BOS or EOS to be added.
    """
    source = document_files.find(
        name=name,
        files=files,
        validation_files=validation_files,
        validation_fraction=validation_fraction,
        text_key=text_key,
        id_key=id_key,
        document_per=document_per,
        max_document_bytes=max_document_bytes,
        data_root=data_root,
        filters=filters,
        on_bad_row=on_bad_row,
        cache_dir=cache_dir,
    )
    several = source if isinstance(source, document_files.DocumentSets) else None
    _check_shares(name, shares, several.sources if several else ())
    sources = source.sets if isinstance(source, document_files.DocumentSets) else (source,)
    for each in sources:
        tasks.register_source(
            each.name,
            each,
            origin="register_files",
            vocabulary=vocabulary,
            add_bos=add_bos,
            add_eos=add_eos,
        )
    if several:
        tasks.register_mixture(
            name, shares or {each.name: each.size(each.name) for each in several.sets}
        )


def _check_shares(name: str, shares: Mapping[str, float] | None, sets: Sequence[str]) -> None:
    """Raises ValueError unless shares are None, or of exactly the sets, and can be normalised."""
    if shares is None:
        return
    if shares.keys() != set(sets):
        raise ValueError(
            f"{name}: the shares are of {', '.join(shares)}, and the sets of files are "
            f"{', '.join(sets) or 'one without a name'}: give each set, and no other, a share (0 for none)"
        )
    mixing.normalised(shares, tuple(sets), f"the shares of {name!r}")


def register_sources(
    *,
    name: str,
    sources: Mapping[str, Callable[..., Any]],
    shares: Mapping[str, NonNegative],
) -> None:
    """Registers the sources named in `shares`, and a mixture of them.

    Other sources are not read, so their files need not exist.

    Args:
      name: name of the mixture.
      sources: task name -> function that registers the task, called with (name=), such as a partial
        `register_files`.
      shares: source -> its share of the tokens; shares sum to 1. A source with share 0 is only
        evaluated.

    Raises:
      ValueError: a source is unknown, a share is negative, or shares do not sum to 1.
    """
    where = f"the shares of {name!r}"
    mixing.normalised(shares, tuple(sources), where)
    total = math.fsum(shares.values())
    if abs(total - 1) > 1e-9:
        raise ValueError(
            f"{where} sum to {total:.6g}, not to 1: "
            f"{', '.join(f'{source} {share}' for source, share in shares.items())}"
        )
    for source in shares:
        sources[source](name=source)
    tasks.register_mixture(name, shares)


def register_tfds(
    *,
    name: str,
    tfds_name: str,
    vocabulary: Any,
    text_key: str = "text",
    splits: Mapping[str, str] | None = None,
    data_dir: str | None = None,
    add_bos: bool = False,
    add_eos: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Registers a task over a prepared TFDS set.

    Args:
      name: name of the task.
      tfds_name: name of the set with config and version: `my_set/config:1.0.0`.
      vocabulary: a SeqIO vocabulary.
      text_key: feature that holds the text.
      splits: split of the task -> split or slice of the set, such as
        `{'train': 'train[1%:]', 'validation': 'train[:1%]'}`; default the `train` and `validation`
        of the set.
      data_dir: directory of prepared TFDS sets; None for the TFDS default.
      add_bos: begin each document with BOS.
      add_eos: end each document with EOS.
      cache_dir: root of the caches; default $ESPALIER_CACHE or ~/.cache/espalier.

    Raises:
      ValueError: the set, the feature or a split does not exist.
      FileNotFoundError: the set is not prepared (when it is read).
    """
    source = tfds_texts(
        tfds_name=tfds_name,
        text_key=text_key,
        splits=splits,
        data_dir=data_dir,
        cache_dir=cache_dir,
    )
    tasks.register_source(
        name,
        source,
        origin="register_tfds",
        vocabulary=vocabulary,
        add_bos=add_bos,
        add_eos=add_eos,
    )


def tfds_texts(
    *,
    tfds_name: str,
    text_key: str = "text",
    splits: Mapping[str, str] | None = None,
    data_dir: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> tfds_source.TfdsSource:
    """Returns the texts of a TFDS set, for example to train a vocabulary.

    `register_tfds` describes the arguments and errors.
    """
    source = tfds_source.TfdsSource(
        tfds_name=tfds_name,
        text_key=text_key,
        wanted_splits=None if splits is None else dict(splits),
        data_dir=data_dir,
        cache=str(cache.cache_dir("files", override=cache_dir)),
    )
    source.check()
    return source


def import_mixtures(*, module: str) -> tuple[str, ...]:
    """Imports a module that registers SeqIO tasks and mixtures.

    Args:
      module: dotted name of a module that is installed or in the working directory.

    Returns:
      Sorted names of the tasks and mixtures that the import registered; empty if the module was
      already imported.

    Raises:
      ValueError: the module does not exist.
    """
    tasks.in_seqio()  # the module may mix tasks that are registered already
    before = tasks.names()
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists; a module that it imports does not
        raise ValueError(
            f"the module {module!r} of mixtures does not exist ({error.name!r} is neither in the working "
            "directory nor installed). Check the name, or set PYTHONPATH to its directory"
        ) from None
    new = tasks.names() - before
    seqio_tasks.remember(new, module)
    return tuple(sorted(new))
