"""Embeds domains of data by their documents, so that a router can place experts of them (Nexus, 2408.15901).

Example, of domains that are generated (data/nexus/lag_domains.py), and one that is added later:

  python -m launch.prepare embed_domains --gin_file=t5x_configs/data/lag_domains.gin --output=/tmp/domains.json \\
    --domain general=task:lag_general --domain four=task:lag_4 --domain seven=task:lag_7
  python -m launch.prepare embed_domains --gin_file=t5x_configs/data/lag_domains.gin --extend=/tmp/domains.json \\
    --domain eleven=task:lag_11

and of files: --domain law='data/law/*.jsonl.zst'. A source is read whole, or as far as --limit goes, and documents are
drawn of it; of tasks it is the training split. A file that is extended keeps its encoder, its settings, its mean and its
old vectors, so that its encoder's flags are left out, or have to agree.
"""

if __name__ == "__main__":
    from launch import cli
    from launch.preparation import embed_flags

    def start_run(start):
        from launch.preparation import embed_domains

        embed_domains.embed(start, start.flags)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.preparation.embed_domains:register",
            command="prepare embed_domains",
            extra_flags=embed_flags.add,
            run=start_run,
            default_files=lambda flags: ["t5x_configs/runs/embed_domains.gin"],
            unused={"TASKS": "()"},
            part=True,
        )
    )

import argparse
import contextlib
import dataclasses
import itertools
import os
import pathlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tqdm

from data import cpu_tensorflow
from data.nexus import domain_embeddings, domain_encoders
from data.nexus.domain_embeddings import Embeddings, EmbeddingsError, Raw
from launch.inference import row_files
from launch.preparation import embed_flags

TASK = "task:"
_CHARACTERS = 64  # of a document are kept for each token that is to be read


def register(*, tasks: Sequence[Callable[[], Any]]) -> None:
    """Registers the SeqIO tasks of the gin configuration."""
    for call in tasks:
        call()


def embed(register_tasks: Callable[[], None], flags: argparse.Namespace) -> Embeddings:
    """The command.

    Args:
      register_tasks: registers what `task:NAME` may name.
      flags: as embed_flags.add has them.

    Returns:
      What was written.

    Raises:
      EmbeddingsError, DataError, FileNotFoundError, RowFileError, LoadError.
    """
    path = flags.output or flags.extend
    if not path:
        raise EmbeddingsError(
            "give --output=FILE for a new file, or --extend=FILE for one that is there"
        )
    row_files.check_output(path)
    before = _content(path)
    if flags.output and os.path.exists(path):
        raise EmbeddingsError(
            f"--output={path} is there already, and routers may have learned from it: --extend={path} adds "
            "domains to it; to make it anew, remove it first"
        )
    old = domain_embeddings.read(flags.extend) if flags.extend else None
    settings = embed_flags.settings(flags, old.encoder if old else None)
    reads = settings["kind"] not in embed_flags.CONTROLS
    domains = embed_flags.domains(flags, sources=reads)
    if old:
        domain_embeddings.check_new(old, domains)
        domain_embeddings.check_encoder(old, settings)
    texts: dict[str, list[str]] = {name: [] for name in domains}
    if reads:
        if any(source.startswith(TASK) for source in domains.values()):
            cpu_tensorflow.load()
            register_tasks()
        texts = {name: draw(name, source, settings, flags) for name, source in domains.items()}
    with _encoder(settings, flags) as encoder:
        if old:
            domain_embeddings.check_encoder(old, encoder.settings)
        raws = {}
        for index, name in enumerate(domains, len(old.names) if old else 0):
            try:
                raw_M = encoder.raw(_progress(texts[name], f"embed {name}"), index)
            except EmbeddingsError as error:
                raise EmbeddingsError(f"domain {name!r}: {error}") from None
            raws[name] = Raw(raw_M, len(texts[name]), domains[name] or None)
        if old:
            found = dataclasses.replace(domain_embeddings.extend(old, raws), path=path)
        else:
            found = domain_embeddings.create(path, encoder.settings, raws, centred=encoder.centred)
    if _content(path) != before:
        raise EmbeddingsError(
            f"{path} was written by another command meanwhile, whose domains would be lost: nothing is written; "
            "give this command again"
        )
    domain_embeddings.write(found)
    print(table(found))
    return found


def _content(path: str) -> bytes | None:
    file = pathlib.Path(path)
    return file.read_bytes() if file.is_file() else None


def draw(
    name: str, source: str, settings: Mapping[str, Any], flags: argparse.Namespace
) -> list[str]:
    """Documents of a source, drawn from those read with equal probability, cut where nothing more is read.

    Args:
      name: of the domain.
      source: files, or `task:` and a task's name.
      settings: of the encoder: how many documents, how many tokens of each, and the seed.
      flags: how documents lie in files, and how many of the first ones are drawn from.

    Raises:
      EmbeddingsError: there is no document.
    """
    found = (
        _of_task(source.removeprefix(TASK)) if source.startswith(TASK) else _of_files(source, flags)
    )
    rng = random.Random(settings["seed"])
    kept: list[str] = []
    limit = settings["tokens"] * _CHARACTERS
    texts = itertools.islice((text for text in found if text), flags.limit)
    for i, text in enumerate(_progress(texts, f"read {name}")):
        if i < settings["documents"]:
            kept.append(text[:limit])
        # Of i + 1 documents each is kept with the same probability.
        elif (at := rng.randrange(i + 1)) < settings["documents"]:
            kept[at] = text[:limit]
    if not kept:
        raise EmbeddingsError(f"domain {name!r}: {source} holds no document that is not empty")
    return kept


def _of_files(pattern: str, flags: argparse.Namespace) -> Iterator[str]:
    """Texts in files."""
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
    """Texts of a task's training split.

    Raises:
      EmbeddingsError: there is no such task or split, or it has no texts.
    """
    import seqio

    from data import tasks
    from data.text.sources import names

    known = seqio.TaskRegistry.names()
    if name not in known:
        hint = f"; {names.nearest(name, sorted(known))}" if known else ": none is registered"
        raise EmbeddingsError(
            f"{TASK}{name}: no such SeqIO task{hint} (--gin_file=FILE registers some)"
        )
    task = seqio.TaskRegistry.get(name)
    if "train" not in task.splits:
        raise EmbeddingsError(
            f"{TASK}{name} has no split 'train', only {', '.join(task.splits)}: give files"
        )
    if (own := tasks.sources().get(name)) is not None:  # ours need not be tokenised
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
    """The encoder that has these settings."""
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


def table(found: Embeddings) -> str:
    """The domains, and the cosine of each with the one most like it."""
    lines = [
        f"{found.path}: {len(found.names)} domains of {found.dim} numbers, {found.encoder['kind']}"
    ]
    cosines = found.vectors_NM @ found.vectors_NM.T
    for i, (name, raw) in enumerate(found.domains.items()):
        others = [(cosines[i, j], other) for j, other in enumerate(found.names) if j != i]
        nearest = "" if not others else "  nearest {1} ({0:+.2f})".format(*max(others))
        lines.append(f"  {name:16} {raw.documents:6,} documents{nearest}")
    return os.linesep.join(lines)
