"""The vocabulary kept with a run, so that its texts stay readable without the data it is made from.

A trained vocabulary is found by what it was trained from, which changes with packages and files. The
run's directory therefore holds the SentencePiece model itself, and what else makes the vocabulary:

    vocabulary.model   the model, as its file was
    vocabulary.json    number of extra ids, digest of the vocabulary, checksum of the model
"""

import atexit
import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from data import cache_dir, rows, vocabularies
from launch import gin_source
from trainers import step_dir

MODEL = "vocabulary.model"
RECORD = "vocabulary.json"

_GIN = """from __gin__ import dynamic_registration
from launch import run_vocabulary

VOCABULARY = @run_vocabulary.load()
run_vocabulary.load.folder = {folder!r}
"""


def save(folder: str | os.PathLike, vocabulary: Any) -> None:
    """Keeps a SeqIO vocabulary in a run's directory.

    Does nothing for one without a SentencePiece model, such as bytes, and for one that its model and
    its number of extra ids alone do not make, such as an object of another class.
    """
    source = getattr(vocabulary, "sentencepiece_model_file", None)
    if source is None:
        return
    digest, extra_ids = rows.vocabulary_digest(vocabulary), vocabulary.extra_ids
    if rows.vocabulary_digest(vocabularies.from_file(path=source, extra_ids=extra_ids)) != digest:
        return
    model = pathlib.Path(source).read_bytes()
    partial = pathlib.Path(folder, f".{MODEL}.tmp")
    partial.write_bytes(model)
    partial.replace(pathlib.Path(folder, MODEL))
    record = {"extra_ids": extra_ids, "digest": digest, "sha256": hashlib.sha256(model).hexdigest()}
    cache_dir.write_json(pathlib.Path(folder, RECORD), record)  # last: without it nothing is kept


def load(*, folder: str):
    """The vocabulary that `save` has kept in a run's directory.

    Raises:
      FileNotFoundError: there is none.
    """
    record = json.loads(pathlib.Path(folder, RECORD).read_bytes())
    return vocabularies.from_file(path=os.path.join(folder, MODEL), extra_ids=record["extra_ids"])


def gin_files(
    folder: str | os.PathLike, checkpoint: str | os.PathLike, *, before: Sequence[str]
) -> list[str]:
    """A gin file that makes the kept vocabulary VOCABULARY, if it is intact and the checkpoint's.

    A file, so that all that reads VOCABULARY gets it, and what is given after it wins. It is gone when
    the process ends.

    Args:
      folder: a run's directory.
      checkpoint: the run or one of its step directories.
      before: the gin files read before this one. There is none if they do not read VOCABULARY, for gin
        refuses macros that nothing reads.
    """
    texts = (pathlib.Path(gin_source.find(path, ()) or path).read_text("utf-8") for path in before)
    if not any("%VOCABULARY" in text for text in texts):
        return []
    try:
        record = json.loads(pathlib.Path(folder, RECORD).read_bytes())
        checksum = hashlib.sha256(pathlib.Path(folder, MODEL).read_bytes()).hexdigest()
    except (OSError, ValueError):
        return []
    if record["sha256"] != checksum or record["digest"] != _trained(checkpoint):
        return []
    handle, path = tempfile.mkstemp(prefix="vocabulary_", suffix=".gin")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(_GIN.format(folder=os.path.abspath(folder)))
    atexit.register(pathlib.Path(path).unlink, missing_ok=True)
    return [path]


def _trained(checkpoint: str | os.PathLike) -> str | None:
    """Digest of the vocabulary that a checkpoint was trained with."""
    for step in step_dir.candidates(checkpoint):
        # Whether a step is good is found out, and said, when it is restored.
        with contextlib.suppress(step_dir.DamagedCheckpointError):
            return step_dir.read_meta(step).get("vocabulary")
    return None
