"""Draws documents of domains and embeds them: the work of `espalier prepare embed_domains`.

Shapes: N documents, M width of an embedding.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import pathlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from espalier.common import files, spelling
from espalier.common.bars import Bar
from espalier.common.storage import paths
from espalier.data.nexus import domain_embeddings, domain_encoders
from espalier.data.nexus.domain_embeddings import PLACES, Embeddings, EmbeddingsError, Raw
from espalier.launch.inference import row_files
from espalier.launch.load import load_run
from espalier.launch.load.load_run import LoadedRun

TASK = "task:"
_CHARACTERS = 64  # characters of a document that are stored per token to read
_CHUNK = 256  # documents per call of a sentence encoder


def embed(
    flags: Any,
    kind: str | None,
    chosen: Mapping[str, Any],
    *,
    encoders: Mapping[str, Mapping[str, Any]],
    register_tasks: Callable[[], Any],
) -> Embeddings:
    """Embeds domains, writes their file and prints a table; returns the file's content.

    Args:
      flags: the DomainFlags: files, domains and the format of their documents.
      kind: kind of encoder; None for ngrams or the encoder of the file to extend.
      chosen: the encoder's settings that the user has set.
      encoders: the settings of each kind of encoder with their defaults.
      register_tasks: registers the tasks for `task:NAME`.

    Raises:
      EmbeddingsError, DataError, FileNotFoundError, RowFileError, LoadError.
    """
    if flags.extend and (flags.mean, flags.length) != (None, None):
        raise EmbeddingsError(
            "--mean and --length are of a new file; --extend keeps those of its file"
        )
    path = flags.output or flags.extend
    if not path:
        raise EmbeddingsError(
            "give --output=FILE for a new file, or --extend=FILE for an existing one"
        )
    row_files.check_output(path)
    before = _content(path)
    if flags.output and paths.exists(path):
        raise EmbeddingsError(
            f"--output={path} exists already, and routers may have learned from it: --extend={path} adds "
            "domains to it; to write a new one, delete it first"
        )
    old = domain_embeddings.read(flags.extend) if flags.extend else None
    kind = kind or (old.encoder["kind"] if old else "ngrams")
    settings = _settings(kind, encoders[kind], chosen, old.encoder if old else None)
    reads = "documents" in settings
    sources = _sources(flags, needed=reads)
    if old:
        domain_embeddings.check_new(old, sources)
        domain_embeddings.check_encoder(old, settings)
    texts: dict[str, list[str]] = {name: [] for name in sources}
    if reads:
        if any(source.startswith(TASK) for source in sources.values()):
            register_tasks()
        texts = {name: draw(name, source, settings, flags) for name, source in sources.items()}
    with _encoder(settings, flags.batch_size) as encoder:
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
            centred = encoder.centred if flags.mean is None else flags.mean == "domains"
            placed = {"centred": centred, "length": 1.0 if flags.length is None else flags.length}
            embeddings = domain_embeddings.create(path, encoder.settings, raws, **placed)
    if _content(path) != before:
        raise EmbeddingsError(
            f"{path} was written by another command meanwhile, whose domains would be lost: nothing is written; "
            "repeat this command"
        )
    domain_embeddings.write(embeddings)
    print(_table(embeddings))
    return embeddings


def _content(path: str) -> bytes | None:
    file = pathlib.Path(path)
    return file.read_bytes() if file.is_file() else None


def _sources(flags: Any, *, needed: bool) -> dict[str, str]:
    """Returns the sources by name; a source is '' if the encoder reads no documents (`needed` is False).

    Raises:
      EmbeddingsError: a name without a source, a repeated name, or a limit that is not used.
    """
    if flags.limit is not None and not needed:
        raise EmbeddingsError("--limit is for encoders that read documents: remove it")
    by_name: dict[str, str] = {}
    for text in flags.domain or ():
        name, _, source = text.partition("=")
        if not name or (needed and not source):
            raise EmbeddingsError(f"--domain={text}: expected NAME=SOURCE, such as law=law.jsonl")
        if name in by_name:
            raise EmbeddingsError(
                f"--domain={name} occurs twice: give one pattern that matches all of its files"
            )
        by_name[name] = source if needed else ""
    return by_name


def _settings(
    kind: str,
    defaults: Mapping[str, Any],
    chosen: Mapping[str, Any],
    frozen: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Returns kind and settings of the encoder; `frozen` is the encoder of the file to extend.

    Raises:
      EmbeddingsError: a setting of another encoder, out of range, missing, or different from the file's.
    """
    if wrong := [name for name in chosen if name not in defaults]:
        raise EmbeddingsError(
            f"--{wrong[0]} does not apply to --encoder={kind}, which has "
            f"{', '.join(f'--{name}' for name in defaults)}: remove it"
        )
    begun = frozen if frozen and frozen["kind"] == kind else {"kind": kind, **defaults}
    settings = {**begun, **chosen}
    for name in PLACES:
        if name in settings and settings[name] is None:
            raise EmbeddingsError(f"--encoder={kind} needs --{name}=DIR")
    for name in ("order", "dim", "documents", "tokens"):
        if settings.get(name, 1) < 1:
            raise EmbeddingsError(f"--{name}={settings[name]} must be at least 1")
    if settings.get("seed", 0) < 0:
        raise EmbeddingsError(f"--seed={settings['seed']} must not be negative")
    return settings


def draw(name: str, source: str, settings: Mapping[str, Any], flags: Any) -> list[str]:
    """Returns a uniform sample of the documents of a domain's source, each cut after the characters that the encoder reads.

    Args:
      name: name of the domain.
      source: files, or `task:` and a task's name.
      settings: the encoder's settings: documents, tokens per document, and seed.
      flags: format of files and limit of documents.

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
        raise EmbeddingsError(f"domain {name!r}: {source} has no document with text")
    return drawn


def _of_files(pattern: str, flags: Any) -> Iterator[str]:
    """Yields the texts in files."""
    from espalier.data.text import document_files

    domain_files = document_files.find(
        name="--domain",
        files=pattern,
        validation_fraction=0.0,
        text_key=flags.text_key,
        document_per=flags.document_per,
    )
    return (document.text for document in domain_files.documents("--domain", "train"))


def _of_task(name: str) -> Iterator[str]:
    """Yields the texts of a task's training split.

    Raises:
      EmbeddingsError: there is no such task or split, or it has no texts.
    """
    from espalier.data import tasks
    from espalier.data.task import Task

    known = tasks.names()
    if name not in known or [*tasks.members(name)] != [name]:
        raise EmbeddingsError(
            f"{TASK}{name}: no such task; {spelling.nearest(name, sorted(known))} "
            "(--gin_file=FILE registers some)"
        )
    task = tasks.find(name)
    if "train" not in task.splits:
        raise EmbeddingsError(
            f"{TASK}{name} has no split 'train', only {', '.join(task.splits)}: give files"
        )
    # Texts of this project's tasks are not tokenised.
    key = "text" if isinstance(task, Task) else "targets_pretokenized"
    rows = task.examples("train") if isinstance(task, Task) else task.records("train")
    first = next(rows, {})
    if key not in first:
        raise EmbeddingsError(f"{TASK}{name} yields no text ({key!r}): give its files")
    texts = (row[key] for row in itertools.chain([first], rows))
    return (text.decode() if isinstance(text, bytes) else text for text in texts)


@contextlib.contextmanager
def _encoder(settings: Mapping[str, Any], batch_size: int) -> Iterator[domain_encoders.Encoder]:
    """Yields the encoder with these settings; a run's mesh is active meanwhile."""
    kind = settings["kind"]
    own = {key: value for key, value in settings.items() if key not in ("kind", "digest")}
    kinds = {
        "ngrams": domain_encoders.Ngrams,
        "random": domain_encoders.Random,
        "one_hot": domain_encoders.OneHot,
    }
    if kind in kinds:
        yield kinds[kind](**own)
    elif kind == "sentences":
        yield Sentences(own["sentence_model"], {"kind": kind, **own}, batch_size)
    else:
        checkpoint = own["checkpoint"]
        with load_run.config_of(checkpoint).load(checkpoint, params=own["params"]) as run:
            yield ModelStates(run, {"kind": kind, **own}, batch_size)


def _progress(texts: Iterable[str], what: str) -> Iterable[str]:
    return Bar(texts, desc=what, unit="doc", file=sys.stderr)


def _table(embeddings: Embeddings) -> str:
    """Returns a table of the domains, each with its most similar domain and their cosine."""
    lines = [
        f"{embeddings.path}: {len(embeddings.names)} domains of {embeddings.dim} numbers, {embeddings.encoder['kind']}",
        "  nearest by the cosine of centred vectors (two domains alone are always at -1)",
    ]
    cosines = embeddings.vectors_NM @ embeddings.vectors_NM.T / embeddings.length**2
    for i, (name, raw) in enumerate(embeddings.domains.items()):
        similarities = [
            (cosines[i, j], other) for j, other in enumerate(embeddings.names) if j != i
        ]
        nearest = "" if not similarities else "  nearest {1} ({0:+.2f})".format(*max(similarities))
        lines.append(f"  {name:16} {raw.documents:6,} documents{nearest}")
    return os.linesep.join(lines)


class ModelStates:
    """The mean of a run's final hidden states over the tokens of a document, and over documents."""

    centred = True

    def __init__(self, run: LoadedRun, settings: Mapping[str, Any], batch_size: int):
        self._run = run
        self._batch_size = batch_size
        self.settings = {**settings, "digest": _params_digest(run.params)}

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """See Encoder.

        Raises:
          EmbeddingsError: no document has a token.
          LoadError: the run has no vocabulary.
        """
        from espalier.trainers.scoring.scoring import MeanStates, Row

        run, rows = self._run, []
        before = run.context([])
        for text in texts:
            tokens = run.after_bos(run.encode(text, "a document"))[: self.settings["tokens"]]
            if (limit := run.model.max_length) is not None:
                tokens = tokens[: limit - len(before)]
            if tokens:
                rows.append(Row(context=before, targets=tokens))
        if not rows:
            raise EmbeddingsError("no document has a token: give documents that are not empty")
        size = run.batch_size(self._batch_size, len(rows))
        states = MeanStates(run.model, run.params, batch_size=size, sharding=run.row_sharding)
        return np.mean(list(states.stream(rows)), axis=0, dtype=np.float64)


def _params_digest(params: Any) -> str:
    """Returns the SHA-256 of parameters and their names."""
    import jax

    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        values = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {values.dtype} {values.shape}\n".encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()


class Sentences:
    """The mean vector of documents by a model in a folder, by the package sentence-transformers.

    Raises:
      EmbeddingsError: there is no such folder, or the package is not installed.
    """

    centred = True

    def __init__(self, folder: str, settings: Mapping[str, Any], batch_size: int):
        if not os.path.isdir(folder):
            raise EmbeddingsError(
                f"--sentence_model={folder}: there is no such folder. Models are not downloaded: give the "
                "folder of a model saved by sentence-transformers"
            )
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise EmbeddingsError(
                "--encoder=sentences needs the package sentence-transformers, which is not installed: "
                "pip install -e '.[sentences]', or choose --encoder=ngrams or model"
            ) from None
        self.settings = {**settings, "digest": _folder_digest(folder)}
        self._batch_size = batch_size
        self._model = SentenceTransformer(folder, local_files_only=True, trust_remote_code=False)
        longest = self._model.max_seq_length
        self._model.max_seq_length = min(longest or settings["tokens"], settings["tokens"])

    def raw(self, texts: Iterable[str], index: int) -> np.ndarray:
        """See Encoder.

        Raises:
          EmbeddingsError: there is no document.
        """
        total, count, remaining = 0.0, 0, iter(texts)
        while chunk := [*itertools.islice(remaining, _CHUNK)]:
            vectors_NM = self._model.encode(
                chunk, batch_size=self._batch_size, convert_to_numpy=True, show_progress_bar=False
            )
            total, count = total + np.asarray(vectors_NM, np.float64).sum(0), count + len(chunk)
        if not count:
            raise EmbeddingsError("it has no document: give documents that are not empty")
        return total / count


def _folder_digest(folder: str) -> str:
    """Returns the SHA-256 of a folder's files and their names, except hidden files."""
    digest = hashlib.sha256()
    root = pathlib.Path(folder)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            continue
        digest.update(f"{name.as_posix()} {files.sha256(path)}\n".encode())
    return digest.hexdigest()
