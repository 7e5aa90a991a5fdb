"""The copy of the vocabulary in a run's directory, with which texts can be decoded without the data.

The data's own vocabulary is identified by its training text, which changes with packages and files.

    vocabulary.model   a copy of the SentencePiece model, or
    tokenizer/         copies of the tokenizer files of a Hugging Face checkpoint
    vocabulary.json    digest of the vocabulary, number of extra ids, and checksums of the files; or, for a vocabulary without
                       files, its kind ("bytes" or "characters") and symbols

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
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from espalier.common import checkpoint_files, files
from espalier.common.ranges import Count
from espalier.common.storage import mirror
from espalier.data.stream import rows
from espalier.data.tokenizers import chat_template, hf_tokenizer, spm_tokenizer, vocabularies
from espalier.data.tokenizers.chat_template import ChatTemplate
from espalier.launch.config import gin_source
from espalier.launch.run import phase
from espalier.trainers.checkpoints import step_dir

_log = logging.getLogger(__name__)

MODEL = "vocabulary.model"
RECORD = gin_source.VOCABULARY_RECORD
TOKENIZER = "tokenizer"
BYTES = "bytes"

_named: set[str] = set()  # the paths that `of` has printed
_KINDS = {"bytes": "ByteVocabulary", "characters": "CharacterVocabulary"}
_MAX_EXTRA_IDS = 100_000

_GIN = """from __gin__ import dynamic_registration
from espalier.launch.run import run_vocabulary

VOCABULARY = @run_vocabulary.load()
run_vocabulary.load.folder = {folder!r}
"""


def save(folder: str | os.PathLike, vocabulary: Any, template: ChatTemplate | None = None) -> None:
    """Copies a SeqIO vocabulary into a run's directory, with the chat template of its data if it has tokenizer files.

    Does nothing for a vocabulary whose class is not in data/tokenizers/vocabularies.py.
    """
    digest, extra_ids = rows.vocabulary_digest(vocabulary), vocabulary.extra_ids
    for kind, settings in (
        ("bytes", {"extra_ids": extra_ids}),
        ("characters", {"symbols": getattr(vocabulary, "symbols", None)}),
    ):
        record = {"kind": kind, **settings, "digest": digest}
        if _KINDS[kind] == type(vocabulary).__name__ and digest == rows.vocabulary_digest(
            _without_files(record)
        ):
            files.write_json(pathlib.Path(folder, RECORD), record, synced=True)
            return
    if (tokenizer := getattr(vocabulary, "files", None)) is not None:
        options = {"extra_ids": extra_ids, "special_in_text": vocabulary.special_in_text}
        own = os.path.realpath(tokenizer.path) == os.path.realpath(os.path.join(folder, TOKENIZER))
        again = vocabularies.huggingface(path=tokenizer.path, **options)
        if not own and rows.vocabulary_digest(again) == digest:
            save_files(folder, tokenizer.path, **options, template=template)
        return
    source = getattr(vocabulary, "sentencepiece_model_file", None)
    if source is None or _intact_digest(folder) == digest:
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
    special_in_text: bool | None = None,
    template: ChatTemplate | None = None,
) -> str:
    """Copies the tokenizer of a Hugging Face checkpoint into a run's directory, and returns its digest.

    Args:
      folder: the run's directory.
      hf_dir: directory of the tokenizer's files.
      extra_ids, special_in_text: see `vocabularies.huggingface`.
      template: the chat template of the copy; None for the template of the files.

    Raises:
      FileNotFoundError: there is no tokenizer.
      CheckpointFileError: its files are damaged or inconsistent.
    """
    options: dict[str, Any] = {"extra_ids": extra_ids, "special_in_text": special_in_text}
    vocabulary = vocabularies.huggingface(path=hf_dir, **options)
    digest = rows.vocabulary_digest(vocabulary)
    if not hasattr(vocabulary, "files"):  # a SentencePiece model alone
        save(folder, vocabulary)
        return digest
    if _intact_digest(folder) == digest:
        return digest
    options["special_in_text"] = vocabulary.special_in_text
    partial = pathlib.Path(folder, f".{TOKENIZER}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    hf_tokenizer.copy(hf_dir, partial)
    own = vocabulary.chat_template
    if template is not None and template.templates != (own and own.templates):
        chat_template.write(partial, template)
    if vocabulary.eos_ids and not (partial / hf_tokenizer.GENERATION).exists():
        # The ids may come from the model's config.json, which is not one of the tokenizer's files.
        ends = {"eos_token_id": list(vocabulary.eos_ids)}
        files.write_json(partial / hf_tokenizer.GENERATION, ends, synced=True)
    _replace(partial, pathlib.Path(folder, TOKENIZER), {**options, "digest": digest})
    return digest


def _replace(partial: pathlib.Path, final: pathlib.Path, record: dict[str, Any]) -> None:
    """Moves a vocabulary into its place, then writes its record: a vocabulary without a record is ignored."""
    record_path = final.parent / RECORD
    record_path.unlink(missing_ok=True)
    if final.is_dir():
        shutil.rmtree(final)
    partial.replace(final)
    content = {**record, "path": final.name, "files": _checksums(final)}
    files.write_json(record_path, content, synced=True)  # the run goes on with this vocabulary


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies the vocabulary of one run's directory, if there is one, into another."""
    source, target = pathlib.Path(source), pathlib.Path(target)
    if (source / TOKENIZER).is_dir():
        (target / TOKENIZER).mkdir(exist_ok=True)
        hf_tokenizer.copy(source / TOKENIZER, target / TOKENIZER)
    for name in (MODEL, RECORD):  # the record last: without it a copy is ignored
        content = checkpoint_files.read(source, name)
        if content is not None:
            (target / name).write_bytes(content)


def of(*, path: str, extra_ids: Count | None = None, special_in_text: bool | None = None):
    """Returns the vocabulary of a run, of a Hugging Face checkpoint or of a SentencePiece model; prints where it is from.

    Args:
      path: a run's directory, a directory with tokenizer.json or tokenizer.model, a .model file, or 'bytes'.
      extra_ids, special_in_text: see `vocabularies.huggingface`; a run's vocabulary has its own.

    Raises:
      FileNotFoundError: there is no vocabulary.
      ValueError: its files are damaged, or a run's vocabulary has other settings.
    """
    more: dict[str, Any] = {"extra_ids": extra_ids, "special_in_text": special_in_text}
    more = {name: value for name, value in more.items() if value is not None}
    if special_in_text is not None and (path == BYTES or path.endswith(".model")):
        raise ValueError(f"{path}: special_in_text = {special_in_text} needs a tokenizer.json.")
    if path == BYTES:
        vocabulary = vocabularies.byte(**more)
    elif path.endswith(".model"):
        vocabulary = vocabularies.from_file(path=path, **more)
    else:
        suffixes = vocabularies.SUFFIXES
        folder = mirror.local(path, without=(step_dir.CHECKPOINTS,), suffixes=suffixes)
        if os.path.isfile(os.path.join(folder, RECORD)):
            vocabulary = load(folder=folder)
            if differ := [name for name in more if more[name] != getattr(vocabulary, name, None)]:
                raise ValueError(
                    f"{path} is a run, whose vocabulary has {differ[0]} = {getattr(vocabulary, differ[0], None)}, not "
                    f"{more[differ[0]]}: give its {MODEL} or {TOKENIZER}/ to use that otherwise."
                )
        else:
            vocabulary = vocabularies.huggingface(path=folder, **more)
    if path not in _named:
        _named.add(path)
        print(f"vocabulary of {vocabulary.vocab_size:,} ids: {path}", file=sys.stderr)
    return vocabulary


def load(*, folder: str):
    """Returns the vocabulary that `save` wrote to a run's directory.

    Raises:
      FileNotFoundError: its files are missing.
      ValueError: it is damaged, or there is none.
    """
    if (record := _read_record(folder)) is None:
        raise ValueError(
            f"{os.path.join(folder, RECORD)} is damaged or missing: put the run's copy back."
        )
    if "kind" in record:
        return _without_files(record)
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


def _without_files(record: Mapping[str, Any]) -> Any:
    """Returns the vocabulary of a record with a kind."""
    if record["kind"] == "bytes":
        return vocabularies.byte(extra_ids=record["extra_ids"])
    return vocabularies.characters(symbols=record["symbols"])


def export_files(run_dir: str | os.PathLike, to_dir: str | os.PathLike) -> str | None:
    """Writes the tokenizer of a run into an existing directory, for other programs.

    The files of an imported tokenizer are copied. A SentencePiece model becomes `tokenizer.model` and, if
    the library `tokenizers` can run it with the same ids, `tokenizer.json` with `tokenizer_config.json`. The ids of BOS, EOS and
    padding of a vocabulary of this project become `generation_config.json`.

    Returns:
      A sentence about missing or different files and the reason; None if nothing is missing.
    """
    run_dir, to_dir = pathlib.Path(run_dir), pathlib.Path(to_dir)
    record = _read_record(run_dir)
    if record is None or "kind" in record:
        if record:
            _write_special_ids(_without_files(record), to_dir)
        return (
            f"{run_dir} has no vocabulary with files, like all runs on bytes: no tokenizer files were "
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
        hf_tokenizer.copy(run_dir / TOKENIZER, to_dir)
        return missing
    model = (run_dir / MODEL).read_bytes()
    (to_dir / hf_tokenizer.SENTENCEPIECE).write_bytes(model)
    _write_special_ids(load(folder=os.fspath(run_dir)), to_dir)
    try:
        differs = spm_tokenizer.write(model, to_dir)
    except spm_tokenizer.ConversionError as error:
        return f"only {hf_tokenizer.SENTENCEPIECE} was written: {error}"
    return "; ".join(part for part in (missing, differs) if part) or None


def _write_special_ids(vocabulary: Any, folder: pathlib.Path) -> None:
    ids = {name: getattr(vocabulary, f"{name}_id") for name in ("bos", "eos", "pad")}
    known = {f"{name}_token_id": id for name, id in ids.items() if id not in (None, -1)}
    # Not synced: an export that a power cut stops is repeated.
    files.write_json(folder / hf_tokenizer.GENERATION, known, synced=False, indent=2, end="\n")


def is_usable(folder: str | os.PathLike, checkpoint: str | os.PathLike | None = None) -> bool:
    """Returns whether a run's directory has the intact vocabulary of a checkpoint; warns if it should have.

    Args:
      folder: a run's directory.
      checkpoint: the run or one of its step directories; None to compare with no checkpoint.
    """
    digest = _intact_digest(folder)
    trained = None if checkpoint is None else phase.trained_digest(checkpoint)
    if digest is None or digest != (trained or digest):
        _warn_of_damage(folder, digest)
        return False
    return True


def gin_files(folder: str | os.PathLike, checkpoint: str | os.PathLike | None = None) -> list[str]:
    """Returns the path of a gin file that sets VOCABULARY to the run directory's copy, or no path.

    It is a file so that later files and bindings can replace VOCABULARY. It is deleted when the process ends.
    No path is returned unless the copy `is_usable`.
    """
    if not is_usable(folder, checkpoint):
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
        if _is_record(record):
            return record
    return None


def _is_record(record: Any) -> bool:
    """Returns whether the fields of a record have the right types and lead to nothing outside of the run's directory."""
    if not isinstance(record, dict) or not isinstance(record.get("digest"), str):
        return False
    if record.get("kind") == "characters":
        return isinstance(record.get("symbols"), str)
    extra_ids = record.get("extra_ids")
    if type(extra_ids) is not int or not 0 <= extra_ids <= _MAX_EXTRA_IDS:
        return False
    in_files = record.get("path") in (MODEL, TOKENIZER) and isinstance(record.get("files"), dict)
    return record.get("kind") == "bytes" or (
        in_files and type(record.get("special_in_text", True)) is bool
    )


def _is_intact(folder: str | os.PathLike, record: dict[str, Any]) -> bool:
    if "kind" in record:
        return True
    path = pathlib.Path(folder, record["path"])
    # A link could lead out of the run's directory.
    linked = any(p.is_symlink() for p in (path, *path.rglob("*")))
    return not linked and _checksums(path) == record["files"]


def _checksums(path: pathlib.Path) -> dict[str, str]:
    """Returns the checksum of a file, or of all files in a directory, by name."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return {
        file.relative_to(path.parent).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file()
    }
