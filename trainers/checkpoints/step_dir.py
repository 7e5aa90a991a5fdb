"""The layout of saved steps on disk, and what may be on disk after a process was killed.

    <run>/checkpoints/<step>/
      state/          the arrays as plain nested dicts, written by Orbax (readable with Orbax alone)
      meta.json       step, metrics and what the run recorded about itself
      manifest.json   checksums of every array and file; written last: a step counts once it is there
      incomplete      a mark, present while the step is being written or deleted

Committing is writing one file, so it is atomic on local disks and on object stores alike. A step with
the mark and without a manifest was cut short and is cleaned up; one with neither has lost its manifest
and is treated as damaged.
"""

import contextlib
import itertools
import json
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar

from etils import epath

from trainers.checkpoints import agreement
from trainers.checkpoints.manifest import DamagedCheckpointError, Manifest, check_files

STATE = "state"
META = "meta.json"
MANIFEST = "manifest.json"
INCOMPLETE = "incomplete"
CHECKPOINTS = "checkpoints"

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def absolute(path: str | os.PathLike) -> epath.Path:
    """The path made absolute, as the libraries below ask for; object store addresses already are."""
    return epath.Path(path if "://" in os.fspath(path) else os.path.abspath(path))


def write_file(path: epath.Path, data: bytes) -> None:
    """Writes a file so that it is there in full or not at all, also after a power cut."""
    if "://" in os.fspath(path):  # Object stores put whole objects.
        path.write_bytes(data)
        return
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(os.path.dirname(os.fspath(path)), os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def is_incomplete(path: epath.Path) -> bool:
    """Whether a step was cut short while it was written or deleted."""
    if (path / MANIFEST).exists():
        return False
    try:
        return (path / INCOMPLETE).exists() or not any(path.iterdir())
    except FileNotFoundError:  # Deleted by the run while another process reads.
        return True


def steps_on_disk(directory: epath.Path) -> dict[int, epath.Path]:
    """All step directories by ascending step, whatever their condition."""
    if not directory.exists():
        return {}
    found = {int(p.name): p for p in directory.iterdir() if p.name.isdecimal() and p.is_dir()}
    return dict(sorted(found.items()))


def complete_steps(directory: epath.Path) -> dict[int, epath.Path]:
    """The steps that were not cut short, by ascending step; they may still be damaged."""
    return {step: p for step, p in steps_on_disk(directory).items() if not is_incomplete(p)}


def file_names(path: epath.Path) -> list[str]:
    """The files of a step that its manifest covers, as paths below it."""
    names = []
    folders = [path]
    while folders:
        for entry in folders.pop().iterdir():
            if entry.is_dir():
                folders.append(entry)
            else:
                names.append(os.path.relpath(os.fspath(entry), os.fspath(path)))
    return sorted(name for name in names if name == META or name.startswith(f"{STATE}/"))


def remove(path: epath.Path) -> None:
    """Deletes a step; cut short, it is left marked as incomplete."""
    (path / INCOMPLETE).touch()
    (path / MANIFEST).unlink(missing_ok=True)
    for entry in path.iterdir():
        if entry.name != INCOMPLETE:
            entry.rmtree() if entry.is_dir() else entry.unlink()
    (path / INCOMPLETE).unlink()
    try:
        path.rmdir()
    except (
        OSError,
        ValueError,
    ):  # A writer that was still at work: the next start removes the rest.
        (path / INCOMPLETE).touch()
        raise


def set_aside(path: epath.Path) -> epath.Path:
    """Renames a step so that it can still be looked at while its number is used again."""
    taken = {entry.name for entry in path.parent.iterdir()}
    names = (f"{path.name}.aside{i or ''}" for i in itertools.count())
    target = path.parent / next(name for name in names if name not in taken)
    path.rename(target)
    return target


def candidates(path: str | os.PathLike) -> list[epath.Path]:
    """The step directories that `path` can mean: itself alone, or those of a run, newest first.

    Args:
      path: a step directory, a run directory or its `checkpoints` directory.

    Raises:
      FileNotFoundError: there is no checkpoint there.
    """
    found = absolute(path)
    if not found.is_dir():
        raise FileNotFoundError(f"checkpoint {found}: there is no such directory.")
    if any((found / name).exists() for name in (MANIFEST, META, STATE, INCOMPLETE)):
        if is_incomplete(found):
            raise FileNotFoundError(f"checkpoint {found} is incomplete: its save was cut short.")
        return [found]
    for directory in (found / CHECKPOINTS, found):
        if steps := complete_steps(directory):
            return list(reversed(steps.values()))
    raise FileNotFoundError(
        f"{found} holds no checkpoint: expected a step directory (with {MANIFEST}), or a run directory "
        f"with {CHECKPOINTS}/<step>."
    )


def resolve(path: str | os.PathLike) -> epath.Path:
    """The step directory that `path` means: itself, or the latest step of a run, good or not.

    Raises:
      FileNotFoundError: there is no checkpoint there.
    """
    return candidates(path)[0]


def run_folder(path: str | os.PathLike) -> epath.Path:
    """The directory of the run that a checkpoint is of, which holds its configuration.

    Args:
      path: as for `resolve`.

    Raises:
      FileNotFoundError: there is no checkpoint there.
    """
    folder = resolve(path).parent
    return folder.parent if folder.name == CHECKPOINTS else folder


def newest_good(path: str | os.PathLike, read: Callable[[epath.Path], _T]) -> _T:
    """What `read` returns of the step directory that `path` means, or of the newest good step of a run.

    Damaged steps are passed over with a warning. Nothing on disk is changed: the run may be another's,
    and under way.

    Args:
      path: as for `candidates`.
      read: reads one step directory, and raises DamagedCheckpointError if it is not as it was saved.

    Raises:
      FileNotFoundError: there is no checkpoint there.
      DamagedCheckpointError: of the newest step, if none is good.
    """
    # The processes must go through the same steps, though a run may be adding to them.
    steps = agreement.gather([os.fspath(step) for step in candidates(path)])[0]
    damaged: list[DamagedCheckpointError] = []
    for step in map(epath.Path, steps):
        try:
            found = read(step)
        except DamagedCheckpointError as error:
            damaged.append(error.with_traceback(None))  # which would keep what has been read
            continue
        if damaged:
            _log.warning("%s Reading step %s.", " ".join(map(str, damaged)), step.name)
        return found
    raise damaged[0]


def read_manifest(path: epath.Path) -> Manifest:
    """The manifest of a step.

    Raises:
      DamagedCheckpointError: it is missing or not as it was written.
    """
    problem = "is missing"
    with contextlib.suppress(FileNotFoundError):
        try:
            return Manifest.from_bytes((path / MANIFEST).read_bytes())
        except ValueError as error:
            problem = str(error)
    raise DamagedCheckpointError(path, {MANIFEST: problem})


def read_record(path: epath.Path, manifest: Manifest) -> dict[str, Any]:
    """The verified contents of a step's meta.json: `step`, `metrics` and `meta`.

    Raises:
      DamagedCheckpointError: it is missing or not as it was written.
    """
    recorded = {name: entry for name, entry in manifest.files.items() if name == META}
    if problems := check_files(path, recorded):
        raise DamagedCheckpointError(path, problems)
    return json.loads((path / META).read_bytes())


def read_meta(path: str | os.PathLike) -> dict[str, Any]:
    """What a run recorded about itself with a checkpoint (a step or run directory).

    Raises:
      FileNotFoundError: there is no checkpoint there.
      DamagedCheckpointError: the record is not as it was written.
    """
    found = resolve(path)
    return read_record(found, read_manifest(found))["meta"]
