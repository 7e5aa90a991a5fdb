"""Draws documents of domains and embeds them: the work of `launch.prepare embed_domains`."""

import argparse
import contextlib
import dataclasses
import itertools
import os
import pathlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import tqdm

from data import cpu_tensorflow
from data.nexus import domain_embeddings, domain_encoders
from data.nexus.domain_embeddings import Embeddings, EmbeddingsError, Raw
from data.text import spelling

TASK = "task:"
_CHARACTERS = 64  # characters of a document that are stored per token to read


def embed(
    path: str,
    before: bytes | None,
    sources: Mapping[str, str],
    settings: Mapping[str, Any],
    *,
    old: Embeddings | None,
    reads: bool,
    flags: argparse.Namespace,
    register_tasks: Callable[[], None],
) -> Embeddings:
    """Embeds domains, writes their file and prints a table.

    Args:
      path: path of the file.
      before: its content when `old` was read; None if there was no file.
      sources: files or `task:NAME` by domain; empty if the encoder reads no documents.
      settings: kind and settings of the encoder.
      old: the embeddings to extend; None for a new file.
      reads: whether the encoder reads documents.
      flags: flags with the format of files, the limit of documents, and the encoder's batch size.
      register_tasks: registers the tasks for `task:NAME`.

    Returns:
      The file's content.

    Raises:
      EmbeddingsError, DataError, FileNotFoundError, LoadError.
    """
    if old:
        domain_embeddings.check_new(old, sources)
        domain_embeddings.check_encoder(old, settings)
    texts: dict[str, list[str]] = {name: [] for name in sources}
    if reads:
        if any(source.startswith(TASK) for source in sources.values()):
            cpu_tensorflow.load()
            register_tasks()
        texts = {name: draw(name, source, settings, flags) for name, source in sources.items()}
    with _encoder(settings, flags) as encoder:
        if old:
            domain_embeddings.check_encoder(old, encoder.settings)
        raws = {}
        for index, name in enumerate(sources, len(old.names) if old else 0):
            try:
                raw_M = encoder.raw(_progress(texts[name], f"embed {name}"), index)
            except EmbeddingsError as error:
                raise EmbeddingsError(f"domain {name!r}: {error}") from None
            raws[name] = Raw(raw_M, len(texts[name]), sources[name] or None)
        if old:
            embeddings = dataclasses.replace(domain_embeddings.extend(old, raws), path=path)
        else:
            embeddings = domain_embeddings.create(
                path, encoder.settings, raws, centred=encoder.centred
            )
    if content(path) != before:
        raise EmbeddingsError(
            f"{path} was written by another command meanwhile, whose domains would be lost: nothing is written; "
            "give this command again"
        )
    domain_embeddings.write(embeddings)
    print(table(embeddings))
    return embeddings


def content(path: str) -> bytes | None:
    """Returns the bytes of a file, or None if it does not exist."""
    file = pathlib.Path(path)
    return file.read_bytes() if file.is_file() else None


def draw(
    name: str, source: str, settings: Mapping[str, Any], flags: argparse.Namespace
) -> list[str]:
    """Returns a uniform sample of a source's documents, each cut after the characters that the encoder can read.

    Args:
      name: name of the domain.
      source: files, or `task:` and a task's name.
      settings: the encoder's settings, with numbers of documents and tokens per document, and the seed.
      flags: flags with the format of files and the limit of documents.

    Raises:
      EmbeddingsError: there is no document.
    """
    documents = (
        _of_task(source.removeprefix(TASK)) if source.startswith(TASK) else _of_files(source, flags)
    )
    rng = random.Random(settings["seed"])
    drawn: list[str] = []
    limit = settings["tokens"] * _CHARACTERS
    texts = itertools.islice((text for text in documents if text), flags.limit)
    for i, text in enumerate(_progress(texts, f"read {name}")):
        if i < settings["documents"]:
            drawn.append(text[:limit])
        # Reservoir sampling: each of the first i + 1 documents has the same probability.
        elif (at := rng.randrange(i + 1)) < settings["documents"]:
            drawn[at] = text[:limit]
    if not drawn:
        raise EmbeddingsError(f"domain {name!r}: {source} holds no document that is not empty")
    return drawn


def _of_files(pattern: str, flags: argparse.Namespace) -> Iterator[str]:
    """Yields the texts in files."""
    from data.text import document_files

    files = document_files.find(
        name="--domain",
        files=pattern,
        validation_fraction=0.0,
        text_key=flags.text_key,
        document_per=flags.document_per,
    )
    return (document.text for document in files.documents("--domain", "train"))


def _of_task(name: str) -> Iterator[str]:
    """Yields the texts of a task's training split.

    Raises:
      EmbeddingsError: there is no such task or split, or it has no texts.
    """
    import seqio

    from data import tasks

    registered = seqio.TaskRegistry.names()
    if name not in registered:
        raise EmbeddingsError(
            f"{TASK}{name}: no such SeqIO task; {spelling.nearest(name, sorted(registered))} "
            "(--gin_file=FILE registers some)"
        )
    task = seqio.TaskRegistry.get(name)
    if "train" not in task.splits:
        raise EmbeddingsError(
            f"{TASK}{name} has no split 'train', only {', '.join(task.splits)}: give files"
        )
    if (
        own := tasks.sources().get(name)
    ) is not None:  # texts of this project's sources, without tokenising them
        key, dataset = "text", own.get_dataset("train", shuffle=False)
    else:
        key = "targets_pretokenized"
        dataset = task.get_dataset(sequence_length=None, split="train", shuffle=False)
    if key not in dataset.element_spec:
        raise EmbeddingsError(
            f"{TASK}{name} yields no text ({key!r}): give the files it is made of"
        )
    return (row[key].decode("utf-8") for row in dataset.as_numpy_iterator())


@contextlib.contextmanager
def _encoder(
    settings: Mapping[str, Any], flags: argparse.Namespace
) -> Iterator[domain_encoders.Encoder]:
    """Yields the encoder with these settings."""
    own = {key: value for key, value in settings.items() if key not in ("kind", "digest")}
    kinds = {
        "ngrams": domain_encoders.Ngrams,
        "random": domain_encoders.Random,
        "one_hot": domain_encoders.OneHot,
    }
    if settings["kind"] in kinds:
        yield kinds[settings["kind"]](**own)
        return
    from launch.preparation import domain_models

    own = {"kind": settings["kind"], **own}
    if settings["kind"] == "sentences":
        yield domain_models.Sentences(own["sentence_model"], own, batch_size=flags.batch_size)
        return
    with domain_models.model_states(
        own["checkpoint"], own, params=own["params"], batch_size=flags.batch_size
    ) as encoder:
        yield encoder


def _progress(texts: Iterable[str], what: str) -> Iterable[str]:
    return tqdm.tqdm(texts, desc=what, unit="doc", file=sys.stderr, disable=None)


def table(embeddings: Embeddings) -> str:
    """Returns a table of the domains, each with its most similar domain and their cosine."""
    lines = [
        f"{embeddings.path}: {len(embeddings.names)} domains of {embeddings.dim} numbers, {embeddings.encoder['kind']}"
    ]
    cosines = embeddings.vectors_NM @ embeddings.vectors_NM.T
    for i, (name, raw) in enumerate(embeddings.domains.items()):
        similarities = [
            (cosines[i, j], other) for j, other in enumerate(embeddings.names) if j != i
        ]
        nearest = "" if not similarities else "  nearest {1} ({0:+.2f})".format(*max(similarities))
        lines.append(f"  {name:16} {raw.documents:6,} documents{nearest}")
    return os.linesep.join(lines)
