"""The copy of the vocabulary in a run's directory, with which texts can be decoded without the data.

The data's own vocabulary is identified by its training text, which changes with packages and files.

    vocabulary.model   a copy of the SentencePiece model, or
    tokenizer/         copies of the tokenizer files of a Hugging Face checkpoint
    vocabulary.json    number of extra ids, digest of the vocabulary, checksums of the files

The checkpoints' meta records the digest as `vocabulary`.
"""

import atexit
import contextlib
import hashlib
import json
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

from data.cache import cache_dir
from data.stream import rows
from data.tokenizers import hf_tokenizer, spm_tokenizer, vocabularies
from launch.config import gin_source
from trainers.checkpoints import step_dir

_log = logging.getLogger(__name__)

MODEL = "vocabulary.model"
RECORD = "vocabulary.json"
TOKENIZER = "tokenizer"

_GIN = """from __gin__ import dynamic_registration
from launch.run import run_vocabulary

VOCABULARY = @run_vocabulary.load()
run_vocabulary.load.folder = {folder!r}
"""


def save(folder: str | os.PathLike, vocabulary: Any) -> None:
    """Copies a SeqIO vocabulary into a run's directory.

    Does nothing for a vocabulary without files, such as bytes, or one of another class, which its files and
    the number of extra ids do not determine.
    """
    digest, extra_ids = rows.vocabulary_digest(vocabulary), vocabulary.extra_ids
    if (files := getattr(vocabulary, "files", None)) is not None:
        options = {"extra_ids": extra_ids, "special_in_text": vocabulary.special_in_text}
        own = os.path.realpath(files.path) == os.path.realpath(os.path.join(folder, TOKENIZER))
        again = vocabularies.huggingface(path=files.path, **options)
        if not own and rows.vocabulary_digest(again) == digest:
            save_files(folder, files.path, **options)
        return
    source = getattr(vocabulary, "sentencepiece_model_file", None)
    if source is None:
        return
    if rows.vocabulary_digest(vocabularies.from_file(path=source, extra_ids=extra_ids)) != digest:
        return
    partial = pathlib.Path(folder, f".{MODEL}.tmp")
    partial.write_bytes(pathlib.Path(source).read_bytes())
    _replace(partial, pathlib.Path(folder, MODEL), {"extra_ids": extra_ids, "digest": digest})


def save_files(
    folder: str | os.PathLike,
    hf_dir: str | os.PathLike,
    *,
    extra_ids: int = 0,
    special_in_text: bool = True,
) -> str:
    """Copies the tokenizer of a Hugging Face checkpoint into a run's directory, and returns its digest.

    Args:
      folder: the run's directory.
      hf_dir: directory of the tokenizer's files.
      extra_ids, special_in_text: see `vocabularies.huggingface`.

    Raises:
      FileNotFoundError: there is no tokenizer.
      TokenizerError: its files are damaged or inconsistent.
    """
    options = {"extra_ids": extra_ids, "special_in_text": special_in_text}
    vocabulary = vocabularies.huggingface(path=hf_dir, **options)
    digest = rows.vocabulary_digest(vocabulary)
    if not hasattr(vocabulary, "files"):  # a SentencePiece model alone
        save(folder, vocabulary)
        return digest
    if _intact_digest(folder) == digest:
        return digest
    partial = pathlib.Path(folder, f".{TOKENIZER}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in hf_tokenizer.FILES:
        _copy(pathlib.Path(hf_dir, name), partial / name)
    if vocabulary.eos_ids and not (partial / hf_tokenizer.GENERATION).exists():
        # The ids may come from the model's config.json, which is not one of the tokenizer's files.
        ends = {"eos_token_id": list(vocabulary.eos_ids)}
        cache_dir.write_json(partial / hf_tokenizer.GENERATION, ends)
    _replace(partial, pathlib.Path(folder, TOKENIZER), {**options, "digest": digest})
    return digest


def _replace(partial: pathlib.Path, final: pathlib.Path, record: dict[str, Any]) -> None:
    """Moves a vocabulary into its place, then writes its record: a vocabulary without a record is ignored."""
    record_path = final.parent / RECORD
    record_path.unlink(missing_ok=True)
    if final.is_dir():
        shutil.rmtree(final)
    partial.replace(final)
    cache_dir.write_json(record_path, {**record, "path": final.name, "files": _checksums(final)})


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies the vocabulary of one run's directory, if there is one, into another."""
    for name in (MODEL, TOKENIZER, RECORD):  # the record last: without it a copy is ignored
        _copy(pathlib.Path(source, name), pathlib.Path(target, name))


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a file or a folder, if it exists."""
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copyfile(source, target)


def load(*, folder: str):
    """Returns the vocabulary that `save` wrote to a run's directory.

    Raises:
      FileNotFoundError: there is none.
      ValueError: its record is damaged.
    """
    record = json.loads(pathlib.Path(folder, RECORD).read_bytes())
    path = os.path.join(folder, record["path"])
    if record["path"] == MODEL:
        vocabulary = vocabularies.from_file(path=path, extra_ids=record["extra_ids"])
    else:
        vocabulary = vocabularies.huggingface(
            path=path, extra_ids=record["extra_ids"], special_in_text=record["special_in_text"]
        )
    if rows.vocabulary_digest(vocabulary) != record["digest"]:
        raise ValueError(f"{os.path.join(folder, RECORD)} is damaged: put the run's copy back.")
    return vocabulary


def export_files(run_dir: str | os.PathLike, to_dir: str | os.PathLike) -> str | None:
    """Writes the tokenizer of a run into an existing directory, for other programs.

    The files of an imported tokenizer are copied. A SentencePiece model becomes `tokenizer.model` and, if
    the library `tokenizers` can run it with the same ids, `tokenizer.json` with `tokenizer_config.json`.

    Returns:
      A sentence about missing or different files and the reason; None if nothing is missing.
    """
    run_dir, to_dir = pathlib.Path(run_dir), pathlib.Path(to_dir)
    record = _read_record(run_dir)
    if record is None:
        return (
            f"{run_dir} has no vocabulary ({RECORD}), like all runs on bytes: no tokenizer files were "
            "written, and other programs can use the model only with token ids"
        )
    if not _is_intact(run_dir, record):
        return (
            f"the vocabulary in {run_dir} was changed (checksums differ from {RECORD}): no "
            "tokenizer files were written"
        )
    extra = record["extra_ids"]
    missing = (
        f"the {extra} extra ids of {run_dir} are not in the tokenizer's files" if extra else None
    )
    if record["path"] == TOKENIZER:
        shutil.copytree(run_dir / TOKENIZER, to_dir, dirs_exist_ok=True)
        return missing
    model = (run_dir / MODEL).read_bytes()
    (to_dir / hf_tokenizer.SENTENCEPIECE).write_bytes(model)
    try:
        differs = spm_tokenizer.write(model, to_dir)
    except spm_tokenizer.ConversionError as error:
        return f"only {hf_tokenizer.SENTENCEPIECE} was written: {error}"
    return "; ".join(part for part in (missing, differs) if part) or None


def gin_files(
    folder: str | os.PathLike, checkpoint: str | os.PathLike, *, before: Sequence[str]
) -> list[str]:
    """Returns the path of a gin file that sets VOCABULARY to the run directory's copy, or no path.

    It is a file so that later files and bindings can replace VOCABULARY. It is deleted when the process ends.
    No path is returned if the copy is not intact, if the checkpoint was trained with another vocabulary, or if
    no file reads VOCABULARY, because unread macros are errors.

    Args:
      folder: a run's directory.
      checkpoint: the run or one of its step directories.
      before: the gin files read before this one.
    """
    texts = (pathlib.Path(gin_source.find(path, ()) or path).read_bytes() for path in before)
    if not any(b"%VOCABULARY" in text for text in texts):
        return []
    digest = _intact_digest(folder)
    if digest is None or digest != _trained_digest(checkpoint):
        _warn_of_damage(folder, digest)
        return []
    handle, path = tempfile.mkstemp(prefix="vocabulary_", suffix=".gin")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(_GIN.format(folder=os.path.abspath(folder)))
    atexit.register(pathlib.Path(path).unlink, missing_ok=True)
    return [path]


def _warn_of_damage(folder: str | os.PathLike, digest: str | None) -> None:
    """Warns of a vocabulary in a run's directory that is not used, by the name of its file."""
    record = _read_record(folder)
    names = [name for name in (MODEL, TOKENIZER, RECORD) if pathlib.Path(folder, name).exists()]
    if digest is not None:
        problem = f"{RECORD} names another vocabulary than the checkpoint was trained with"
    elif record is not None:
        problem = (
            f"{record['path']} is damaged or missing: it does not match its checksum in {RECORD}"
        )
    elif names:
        problem = f"{RECORD} is damaged or missing, so {', '.join(names)} cannot be trusted"
    else:  # a run without a vocabulary of its own
        return
    _log.warning("%s: %s. The vocabulary of the data is used instead.", folder, problem)


def _intact_digest(folder: str | os.PathLike) -> str | None:
    """Returns the digest of the vocabulary in a run's directory; None unless its files are intact."""
    record = _read_record(folder)
    return record["digest"] if record is not None and _is_intact(folder, record) else None


def _read_record(folder: str | os.PathLike) -> dict[str, Any] | None:
    """Returns vocabulary.json of a run's directory; None if it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        record = json.loads(pathlib.Path(folder, RECORD).read_bytes())
        if isinstance(record, dict) and {"path", "digest", "extra_ids", "files"} <= record.keys():
            return record
    return None


def _is_intact(folder: str | os.PathLike, record: dict[str, Any]) -> bool:
    return _checksums(pathlib.Path(folder, record["path"])) == record["files"]


def _checksums(path: pathlib.Path) -> dict[str, str]:
    """Returns the checksum of a file, or of all files in a directory, by name."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {
        file.relative_to(path.parent).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }


def _trained_digest(checkpoint: str | os.PathLike) -> str | None:
    """Returns the digest of the vocabulary that a checkpoint was trained with."""
    for step in step_dir.candidates(checkpoint):
        # A damaged step is reported when it is restored.
        with contextlib.suppress(step_dir.DamagedCheckpointError):
            return step_dir.read_meta(step).get("vocabulary")
    return None
