"""The vocabulary kept with a run, so that its texts stay readable without the data it is made from.

A trained vocabulary is found by what it was trained from, which changes with packages and files. The
run's directory therefore holds the SentencePiece model itself, or the tokenizer files of the Hugging
Face checkpoint, and what else makes the vocabulary:

    vocabulary.model   the SentencePiece model, as its file was, or
    tokenizer/         the checkpoint's files, as they were
    vocabulary.json    number of extra ids, digest of the vocabulary, checksums of the files

`save` keeps the vocabulary of a run's data. `save_files` keeps the tokenizer of a checkpoint that is
imported and returns the digest that belongs into the checkpoint's meta as `vocabulary`. `export_files`
writes what transformers loads with the same ids.
"""

import atexit
import contextlib
import hashlib
import json
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

MODEL = "vocabulary.model"
RECORD = "vocabulary.json"
TOKENIZER = "tokenizer"

_GIN = """from __gin__ import dynamic_registration
from launch.run import run_vocabulary

VOCABULARY = @run_vocabulary.load()
run_vocabulary.load.folder = {folder!r}
"""


def save(folder: str | os.PathLike, vocabulary: Any) -> None:
    """Keeps a SeqIO vocabulary in a run's directory.

    Does nothing for one without files, such as bytes, and for one that its files and its number of extra
    ids alone do not make, such as an object of another class.
    """
    digest, extra_ids = rows.vocabulary_digest(vocabulary), vocabulary.extra_ids
    if (files := getattr(vocabulary, "files", None)) is not None:
        again = {"extra_ids": extra_ids, "special_in_text": vocabulary.special_in_text}
        kept = os.path.realpath(files.path) == os.path.realpath(os.path.join(folder, TOKENIZER))
        if (
            not kept
            and rows.vocabulary_digest(vocabularies.huggingface(path=files.path, **again)) == digest
        ):
            save_files(folder, files.path, **again)
        return
    source = getattr(vocabulary, "sentencepiece_model_file", None)
    if source is None:
        return
    if rows.vocabulary_digest(vocabularies.from_file(path=source, extra_ids=extra_ids)) != digest:
        return
    model = pathlib.Path(source).read_bytes()
    partial = pathlib.Path(folder, f".{MODEL}.tmp")
    partial.write_bytes(model)
    partial.replace(pathlib.Path(folder, MODEL))
    record = {"extra_ids": extra_ids, "digest": digest, "sha256": hashlib.sha256(model).hexdigest()}
    cache_dir.write_json(pathlib.Path(folder, RECORD), record)  # last: without it nothing is kept


def save_files(
    folder: str | os.PathLike,
    hf_dir: str | os.PathLike,
    *,
    extra_ids: int = 0,
    special_in_text: bool = True,
) -> str:
    """Keeps the tokenizer of a Hugging Face checkpoint in a run's directory.

    Args:
      folder: the run's directory.
      hf_dir: the checkpoint's, or another with its tokenizer files.
      extra_ids: as for `vocabularies.huggingface`.
      special_in_text: likewise.

    Returns:
      The vocabulary's digest.

    Raises:
      FileNotFoundError: there is no tokenizer.
      TokenizerError: its files are damaged or do not fit together.
    """
    found = vocabularies.huggingface(
        path=hf_dir, extra_ids=extra_ids, special_in_text=special_in_text
    )
    digest = rows.vocabulary_digest(found)
    if not hasattr(found, "files"):  # a SentencePiece model alone
        save(folder, found)
        return digest
    if _digest_kept(folder) == digest:
        return digest
    partial = pathlib.Path(folder, f".{TOKENIZER}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in hf_tokenizer.FILES:
        source = pathlib.Path(hf_dir, name)
        if source.is_dir():
            shutil.copytree(source, partial / name)
        elif source.exists():
            shutil.copyfile(source, partial / name)
    if found.eos_ids and not (partial / hf_tokenizer.GENERATION).exists():
        # They may be from the model's config.json, which does not belong to the tokenizer.
        ends = {"eos_token_id": list(found.eos_ids)}
        cache_dir.write_json(partial / hf_tokenizer.GENERATION, ends)
    final = pathlib.Path(folder, TOKENIZER)
    pathlib.Path(folder, RECORD).unlink(missing_ok=True)
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    record = {
        "extra_ids": extra_ids,
        "special_in_text": special_in_text,
        "digest": digest,
        "files": _checksums(final),
    }
    cache_dir.write_json(pathlib.Path(folder, RECORD), record)  # last: without it nothing is kept
    return digest


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Keeps what one run's directory holds of its vocabulary, if anything, in another's."""
    for name in (MODEL, TOKENIZER, RECORD):  # the record last: without it nothing is kept
        path = pathlib.Path(source, name)
        if path.is_dir():
            shutil.copytree(path, pathlib.Path(target, name))
        elif path.exists():
            shutil.copyfile(path, pathlib.Path(target, name))


def load(*, folder: str):
    """The vocabulary that `save` has kept in a run's directory.

    Raises:
      FileNotFoundError: there is none.
    """
    record = json.loads(pathlib.Path(folder, RECORD).read_bytes())
    if "files" in record:
        return vocabularies.huggingface(
            path=os.path.join(folder, TOKENIZER),
            extra_ids=record["extra_ids"],
            special_in_text=record["special_in_text"],
        )
    return vocabularies.from_file(path=os.path.join(folder, MODEL), extra_ids=record["extra_ids"])


def export_files(run_dir: str | os.PathLike, to_dir: str | os.PathLike) -> str | None:
    """Writes the tokenizer of a run for other programs.

    The files of an imported tokenizer are copied. A SentencePiece model becomes `tokenizer.model` and, if
    the library `tokenizers` can run it with the same ids, `tokenizer.json` with `tokenizer_config.json`.

    Args:
      run_dir: a run's directory.
      to_dir: an existing directory.

    Returns:
      What is missing there, or differs, and why; None where nothing does.
    """
    run_dir, to_dir = pathlib.Path(run_dir), pathlib.Path(to_dir)
    try:
        record = json.loads((run_dir / RECORD).read_bytes())
    except (OSError, ValueError):
        return (
            f"{run_dir} keeps no vocabulary ({RECORD}), as runs on bytes do: no tokenizer files were "
            "written, and other programs can use the model with token ids alone"
        )
    if not _is_intact(run_dir, record):
        return (
            f"the vocabulary in {run_dir} is not as it was written (checksums differ from {RECORD}): no "
            "tokenizer files were written"
        )
    missing = None
    if record["extra_ids"]:
        missing = (
            f"the {record['extra_ids']} extra ids of {run_dir} are not in the tokenizer's files"
        )
    if "files" in record:
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
    kept = _digest_kept(folder)
    if kept is None or kept != _trained(checkpoint):
        return []
    handle, path = tempfile.mkstemp(prefix="vocabulary_", suffix=".gin")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(_GIN.format(folder=os.path.abspath(folder)))
    atexit.register(pathlib.Path(path).unlink, missing_ok=True)
    return [path]


def _digest_kept(folder: str | os.PathLike) -> str | None:
    """Digest of the vocabulary that is kept there, intact."""
    try:
        record = json.loads(pathlib.Path(folder, RECORD).read_bytes())
    except (OSError, ValueError):
        return None
    return record["digest"] if _is_intact(folder, record) else None


def _is_intact(folder: str | os.PathLike, record: dict[str, Any]) -> bool:
    """Whether the kept files are as they were written."""
    if "files" in record:
        return _checksums(pathlib.Path(folder, TOKENIZER)) == record["files"]
    path = pathlib.Path(folder, MODEL)
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == record["sha256"]


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    """Checksums of all files in a directory, by name."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _trained(checkpoint: str | os.PathLike) -> str | None:
    """Digest of the vocabulary that a checkpoint was trained with."""
    for step in step_dir.candidates(checkpoint):
        # Whether a step is good is found out, and said, when it is restored.
        with contextlib.suppress(step_dir.DamagedCheckpointError):
            return step_dir.read_meta(step).get("vocabulary")
    return None
