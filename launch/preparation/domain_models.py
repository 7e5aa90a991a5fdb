"""Encoders of domains that use a model (see data/nexus/domain_encoders.py): one of our runs, or a sentence encoder.

Shapes: N documents, M width of an embedding.
"""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from data.nexus.domain_embeddings import EmbeddingsError
from launch.run import load_run
from launch.run.load_run import LoadedRun

_CHUNK = 256  # documents per call of a sentence encoder


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
        from trainers.scoring.scoring import MeanStates, Row

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


@contextlib.contextmanager
def model_states(
    checkpoint: str, settings: Mapping[str, Any], *, params: str, batch_size: int
) -> Iterator[ModelStates]:
    """Restores a run and enters its mesh.

    Args:
      checkpoint: run or step directory.
      settings: kind and all settings but the digest.
      params: see launch/run/load_run.py.
      batch_size: rows at a time.
    """
    with load_run.config_of(checkpoint).load(checkpoint, params=params) as run:
        yield ModelStates(run, settings, batch_size)


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
    """The mean vector of documents by a model of the package sentence-transformers.

    Args:
      folder: folder of the model; nothing is downloaded.
      settings: kind and all settings but the digest.
      batch_size: documents at a time.

    Raises:
      EmbeddingsError: there is no such folder, or the package is not installed.
    """

    centred = True

    def __init__(self, folder: str, settings: Mapping[str, Any], *, batch_size: int):
        if not os.path.isdir(folder):
            raise EmbeddingsError(
                f"--sentence_model={folder}: there is no such folder. Models are not downloaded: give the "
                "directory of one that sentence-transformers has saved"
            )
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise EmbeddingsError(
                "--encoder=sentences needs the package sentence-transformers, which is not installed: "
                "pip install 'espalier-lm[sentences]', or choose --encoder=ngrams or model"
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
        total, count, chunk = 0.0, 0, []
        for text in texts:
            chunk.append(text)
            if len(chunk) == _CHUNK:
                total, count, chunk = total + self._sum(chunk), count + len(chunk), []
        if chunk:
            total, count = total + self._sum(chunk), count + len(chunk)
        if not count:
            raise EmbeddingsError("there is no document: give documents that are not empty")
        return total / count

    def _sum(self, texts: list[str]) -> np.ndarray:
        vectors_NM = self._model.encode(
            texts, batch_size=self._batch_size, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(vectors_NM, np.float64).sum(0)


def _folder_digest(folder: str) -> str:
    """Returns the SHA-256 of a folder's files and their names, except hidden files."""
    digest = hashlib.sha256()
    root = pathlib.Path(folder)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        name = path.relative_to(root)
        if any(part.startswith(".") for part in name.parts):
            continue
        with open(path, "rb") as file:
            digest.update(
                f"{name.as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode()
            )
    return digest.hexdigest()
