"""The layout of saved steps on disk, including steps whose save was interrupted.

    <run>/checkpoints/<step>/
      state/          the arrays as plain nested dicts, written by Orbax (readable with Orbax alone)
      meta.json       step, metrics and the run's facts about itself
      manifest.json   checksums of every array and file; written last, which completes the step
      incomplete      a mark, present while the step is being written or deleted

A commit writes one file, so it is atomic on local disks and object stores. A step with the mark but without a
manifest was interrupted and is removed; a step with neither has lost its manifest and counts as damaged.
"""

import itertools
import json
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from etils import epath

from espalier.common import files, stages
from espalier.common.storage import mirror, paths
from espalier.trainers.checkpoints import agreement
from espalier.trainers.checkpoints.manifest import (
    DamagedCheckpointError,
    Manifest,
    check_files,
    is_inside,
)
from espalier.trainers.telemetry import marks, metrics
from espalier.trainers.telemetry.marks import is_count, is_number
from espalier.trainers.telemetry.metric_writers import MARKS

STATE = "state"
META = "meta.json"
MANIFEST = "manifest.json"
INCOMPLETE = "incomplete"
CHECKPOINTS = "checkpoints"
_TEMPORARY = f"{STATE}.orbax-checkpoint-tmp"
TENSORBOARD = "tensorboard"
_MOST_STEPS = 2**31  # the state counts them in 32 bits
_FIELDS = {"step", "metrics", "meta"}

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def absolute(path: str | os.PathLike) -> epath.Path:
    """Returns the absolute path, as Orbax requires; addresses of object stores are already absolute."""
    if paths.is_remote(path):
        paths.filesystem(os.fspath(path))  # sets up how epath reaches it
    return epath.Path(paths.absolute(path))


def write_file(path: epath.Path, data: bytes) -> None:
    """Writes a file atomically, also with respect to a power cut."""
    if paths.is_remote(path):
        paths.write(os.fspath(path), data)
        return
    files.write(path, data, synced=True)  # older steps are deleted once this one is complete
    files.sync(os.path.dirname(path))


def is_incomplete(path: epath.Path) -> bool:
    """Returns whether writing or deleting a step was interrupted; a step that cannot be read is damaged instead."""
    try:
        if (path / MANIFEST).exists():
            return False
        # Orbax may make its folder after a save that failed has removed the step.
        left = (entry.name.startswith(_TEMPORARY) for entry in path.iterdir())
        return (path / INCOMPLETE).exists() or all(left)
    except FileNotFoundError:  # the run deleted the step while another process reads
        return True
    except OSError:
        return False


def steps_on_disk(directory: epath.Path) -> dict[int, epath.Path]:
    """Returns all step directories by ascending step, including incomplete ones."""
    if not directory.exists():
        return {}
    steps = {int(p.name): p for p in directory.iterdir() if p.name.isdecimal() and p.is_dir()}
    return dict(sorted(steps.items()))


def complete_steps(directory: epath.Path) -> dict[int, epath.Path]:
    """Returns the complete steps by ascending step; they may still be damaged."""
    return {step: p for step, p in steps_on_disk(directory).items() if not is_incomplete(p)}


def file_names(path: epath.Path) -> list[str]:
    """Returns the files that a manifest covers, as paths below the step directory."""
    names: list[str] = []
    folders = [path / STATE]
    while folders:
        for entry in folders.pop().iterdir():
            if entry.is_dir():
                folders.append(entry)
            else:
                names.append(os.path.relpath(entry, path))
    return sorted([META, *names])


def write_record(path: epath.Path, record: Mapping[str, Any]) -> None:
    """Writes a step's meta.json."""
    text = json.dumps(record, sort_keys=True, indent=1).encode() + b"\n"
    write_file(path / META, text)


def complete(path: epath.Path, manifest: Manifest) -> None:
    """Writes the manifest, which completes the step."""
    write_file(path / MANIFEST, manifest.to_bytes())
    (path / INCOMPLETE).unlink()


def remove(path: epath.Path) -> None:
    """Deletes a step; an interrupted deletion leaves it marked as incomplete."""
    (path / INCOMPLETE).touch()
    (path / MANIFEST).unlink(missing_ok=True)
    for entry in path.iterdir():
        if entry.name != INCOMPLETE:
            entry.rmtree() if entry.is_dir() else entry.unlink()
    (path / INCOMPLETE).unlink()
    if paths.is_remote(path):  # a folder is gone with its last object
        return
    try:
        path.rmdir()
    except (OSError, ValueError):  # a process is still writing: the next start removes its files
        (path / INCOMPLETE).touch()
        raise


def set_aside(path: epath.Path) -> epath.Path:
    """Renames a step, so that its number can be reused and its files can still be inspected."""
    taken = {entry.name for entry in path.parent.iterdir()}
    names = (f"{path.name}.aside{i or ''}" for i in itertools.count())
    target = path.parent / next(name for name in names if name not in taken)
    if paths.is_remote(path):  # nothing can be renamed
        paths.copy_tree(os.fspath(path), os.fspath(target), last=MANIFEST)
        remove(path)
    else:
        path.rename(target)
    return target


def candidates(path: str | os.PathLike) -> list[epath.Path]:
    """Returns the step directories that `path` can refer to: itself, or all steps of a run, newest first.

    Args:
      path: a step directory, a run directory or its `checkpoints` directory.

    Raises:
      FileNotFoundError: it has no checkpoint.
    """
    folder = absolute(path)
    if paths.is_remote(path):
        paths.names(os.fspath(path))  # a missing bucket or a refusal is an error that says so
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder}: there is no such directory.")
    if any((folder / name).exists() for name in (MANIFEST, META, STATE, INCOMPLETE)):
        if is_incomplete(folder):
            raise FileNotFoundError(f"checkpoint {folder} is incomplete: its save was interrupted.")
        return [folder]
    for directory in (folder / CHECKPOINTS, folder):
        if steps := complete_steps(directory):
            return list(reversed(steps.values()))
    raise FileNotFoundError(
        f"{folder} holds no checkpoint: expected a step directory (with {MANIFEST}), or a run directory "
        f"with {CHECKPOINTS}/<step>."
    )


def resolve(path: str | os.PathLike) -> epath.Path:
    """Returns the first of `candidates`: the latest step of a run, even if it is damaged."""
    return candidates(path)[0]


def folder_of(step: epath.Path) -> epath.Path:
    """Returns the directory of the run that a step directory belongs to."""
    folder = step.parent
    return folder.parent if folder.name == CHECKPOINTS else folder


def files_of_run(step: epath.Path) -> epath.Path:
    """Returns a local folder with the files of a step's run: the run's own, or for an address an up-to-date copy of those
    that are beside its checkpoints.

    Raises:
      StoreError: the run's store refuses, or cannot be reached.
    """
    folder = folder_of(step)
    if not paths.is_remote(folder):
        return folder
    address = os.fspath(folder)
    steps = [name for name in paths.names(address) if name.partition(".")[0].isdecimal()]
    try:
        return epath.Path(mirror.local(address, without=(CHECKPOINTS, TENSORBOARD, *steps)))
    except FileNotFoundError:  # the run has checkpoints alone
        return epath.Path(mirror.place(address))


def newest_good(path: str | os.PathLike, read: Callable[[epath.Path], _T]) -> _T:
    """Returns the result of `read` for the newest good step of `candidates(path)`.

    Damaged steps, for which `read` raises DamagedCheckpointError, are skipped with a warning. No file is changed,
    because the run may belong to someone else and be in progress.

    Raises:
      FileNotFoundError: `path` has no checkpoint.
      DamagedCheckpointError: no step is good; the error of the newest step.
    """
    # All processes must try the same steps, while a run may be adding new ones.
    steps = agreement.gather([os.fspath(step) for step in candidates(path)])[0]
    damaged: list[DamagedCheckpointError] = []
    for step in map(epath.Path, steps):
        try:
            with stages.stage(f"restoring {step}"):
                result = read(step)
        except DamagedCheckpointError as error:
            damaged.append(error.with_traceback(None))  # it would hold the arrays in memory
            continue
        if damaged:
            _log.warning("%s Reading step %s.", " ".join(map(str, damaged)), step.name)
        return result
    raise damaged[0]


def read_manifest(path: epath.Path) -> Manifest:
    """Returns the manifest of a step; raises DamagedCheckpointError if it is missing, unreadable or damaged."""
    try:
        if not is_inside(path, MANIFEST):
            raise ValueError("is not a file of the checkpoint itself")
        return Manifest.from_bytes((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        problem = "is missing"
    except OSError as error:
        problem = f"cannot be read ({error})"
    except ValueError as error:
        problem = str(error)
    raise DamagedCheckpointError(path, {MANIFEST: problem})


def begins_otherwise(key: str, theirs: Any, ours: Any, *, encodes: bool) -> bool:
    """Returns whether documents of a record begin otherwise than a run's, by the fact `key`: "start_token" or "add_bos".

    A start token of None that an encoder-decoder (`encodes`) records is no difference: its targets follow one in any case.
    """
    unrecorded = encodes and key == "start_token" and theirs is None
    return theirs != ours and not unrecorded


def read_record(path: epath.Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """Returns the verified contents of a step's meta.json: `step`, `metrics` and `meta`.

    Raises:
      DamagedCheckpointError: the record or the manifest (read unless it is passed) is missing or damaged.
    """
    files = (manifest or read_manifest(path)).files
    if problems := check_files(path, {name: files[name] for name in files if name == META}):
        raise DamagedCheckpointError(path, problems)
    try:
        record = json.loads((path / META).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(path, {META: f"is not a record ({error})"}) from None
    try:
        check_record(record)
        if path.name.isdecimal() and int(path.name) != record["step"]:
            raise ValueError(f"is the record of step {record['step']}")
    except ValueError as error:
        raise DamagedCheckpointError(path, {META: str(error)}) from None
    return record


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """Returns the run's facts in the record of `resolve(path)`."""
    return read_record(resolve(path))["meta"]


def check_record(record: Any) -> None:
    """Raises ValueError, with the key and its value, unless `record` is what a save writes.

    A record with checksums that match may still have been written by another program, so each value that a run counts with
    is checked before anything is read.
    """
    if not isinstance(record, dict) or record.keys() != _FIELDS:
        raise ValueError(f"is not a record of {', '.join(sorted(_FIELDS))}")
    if not isinstance(record["meta"], dict) or not isinstance(record["metrics"], dict):
        raise ValueError("is not a record: metrics and meta are objects")
    _expect("step", record["step"], _is_step, "a number of steps")
    for name, value in record["metrics"].items():
        _expect(f"metrics.{name}", value, is_number, "a number")
    for name, (test, kind) in _FACTS.items():
        if name in record["meta"]:
            _expect(f"meta.{name}", record["meta"][name], test, kind)
    if record["meta"].get("skipped", 0) > record["step"]:
        raise ValueError(f"has meta.skipped {record['meta']['skipped']} of {record['step']} steps")
    for name, parse in {"window": metrics.Window().restore, MARKS: marks.from_json}.items():
        if name in record["meta"]:
            try:
                parse(record["meta"][name])
            except ValueError as error:
                raise ValueError(f"has meta.{name}, which {error}") from None


def _expect(key: str, value: Any, test: Callable[[Any], bool], kind: str) -> None:
    if not test(value):
        text = repr(value)
        raise ValueError(
            f"has {key} = {text[:40]}{'...' * (len(text) > 40)} in the place of {kind}"
        )


def _is_step(value: Any) -> bool:
    return is_count(value) and value < _MOST_STEPS


def _are_positions(value: Any) -> bool:
    """Returns whether a value is the positions of a stream, {source: {"rows": count, "order": digest}}."""
    return isinstance(value, dict) and all(
        isinstance(place, dict) and is_count(place.get("rows")) and "order" in place
        for place in value.values()
    )


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


# What a run reads from the facts of its own or a parent's checkpoint, and how an error names each.
_FACTS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        ("data_step", "skipped", "bad_in_a_row", "rollbacks"), (_is_step, "a number of steps")
    ),
    "learning_rate": (lambda value: value is None or is_number(value), "a number"),
    "positions": (_are_positions, "the rows read of each source"),
    "added": (lambda value: type(value) is str and value != "", "the beginning of a name"),
    "inference_part": (lambda value: type(value) is str, "a name"),
    "hooks_left_out": (lambda value: type(value) is bool, "true or false"),
    **dict.fromkeys(("initial", "hf", "upcycled"), (_is_object, "an object")),
}
