"""The local tier of a run's checkpoints: frequent saves on a disk of each host, beside the shared ones.

    <directory>/<run>-<digest of its path>/<token>.<process>of<processes>/<step>/

Each process writes and reads its own part (local_step.py), and nobody waits for another host. A step counts only if every
process holds it, whole and verified, for the same number of processes. The shared directory names the token of the
start that wrote last; a start takes over the steps up to its own beginning under a new token. So no step is read that
a host kept of an earlier start, while the run went on elsewhere.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from espalier.common.ranges import Positive, Size
from espalier.trainers.checkpoints import agreement, local_step, restore, step_dir
from espalier.trainers.checkpoints.manifest import ArrayEntry, DamagedCheckpointError

TOKEN = "local_tier.json"  # in the shared directory of steps: {"token", "directory"}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalTier:
    """Where and how often a run also saves on a disk of each host.

    Attributes:
      directory: a folder on a fast disk of the host, for any number of runs; hosts do not share it.
      period: updates between saves there.
      keep_last: number of steps to keep there.
      grace_seconds: time for the saves after a signal. The local one comes first; if the last shared save took longer than
        the remaining time, none is begun. None: the shared save is always made.
    """

    directory: str
    period: Size = 100
    keep_last: Size = 2
    grace_seconds: Positive | None = None

    def __post_init__(self):
        if not self.directory or "://" in self.directory:
            raise ValueError(
                f"LocalTier.directory = {self.directory!r}: give a folder on a disk of the host, such as /tmp/checkpoints."
            )


class LocalSteps:
    """The steps of one run in this process's folder of the local tier."""

    def __init__(self, settings: LocalTier, shared: epath.Path):
        """Opens the folder of the run that saves in `shared`, and reads which steps are there.

        Args:
          settings: place, period and number of steps.
          shared: the run's directory of shared steps.

        Raises:
          OSError: the folder cannot be made.
        """
        self._settings, self._shared = settings, shared
        digest = hashlib.blake2b(os.fspath(shared).encode(), digest_size=6).hexdigest()
        root = os.path.abspath(os.path.expanduser(settings.directory))
        name = step_dir.folder_of(shared / "0").name
        self._root = epath.Path(root) / f"{name}-{digest}"
        self._root.mkdir(parents=True, exist_ok=True)
        token = self._recorded_token() if agreement.is_primary() else None
        self._folder = self._folder_of(agreement.gather(token)[0])
        self._began = False
        self._good = True
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="local_tier")
        self._pending: concurrent.futures.Future[None] | None = None
        self._steps: set[int] = set()
        if self._folder is not None:
            self._steps = set(step_dir.complete_steps(self._folder))

    def _recorded_token(self) -> str | None:
        try:
            recorded = json.loads((self._shared / TOKEN).read_bytes())
            # A copy of the directory does not take over the steps of the original.
            if recorded["directory"] == os.fspath(self._shared):
                return uuid.UUID(recorded["token"]).hex
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass  # local steps are only a shorter way
        return None

    def _folder_of(self, token: str | None) -> epath.Path | None:
        if token is None:
            return None
        return self._root / f"{token}.{jax.process_index()}of{jax.process_count()}"

    def is_due(self, step: int) -> bool:
        """Returns whether the period asks for a save."""
        return step % self._settings.period == 0

    def steps(self) -> list[int]:
        """Returns the steps that all processes hold, ascending. Every process must call it."""
        self.wait()
        held = agreement.gather(sorted(self._steps))
        return sorted(set.intersection(*map(set, held)))

    def in_part(self, above: int) -> str:
        """Returns a sentence on steps after `above` that only some processes hold, or ''. Every process must call it."""
        held = agreement.gather(sorted(step for step in self._steps if step > above))
        partial = set.union(*map(set, held)) - set.intersection(*map(set, held))
        if not partial:
            return ""
        holders = sum(max(partial) in steps for steps in held)
        return f"local step {max(partial)} is held by {holders} of {len(held)} processes only"

    def restore(
        self, step: int, abstract_state: Any, expected_meta: Mapping[str, Any] | None
    ) -> tuple[restore.Restored | None, str]:
        """Returns a step of `steps()` and '', or None and why it is not used. Every process must call it.

        Raises:
          CheckpointMismatchError, RunMismatchError: see `restore_state`.
        """
        assert self._folder is not None
        restored, problem = None, ""
        try:
            restored = restore.read_step(
                self._folder / str(step),
                abstract_state,
                expected_meta=expected_meta,
                read=local_step.read_verified,
            )
        except (DamagedCheckpointError, local_step.LayoutError) as error:
            problem = str(error)
            self._steps.discard(step)
        problems = list(filter(None, agreement.gather(problem)))
        return (None, problems[0]) if problems else (restored, "")

    def begin(self, last: int | None) -> None:
        """Takes over the steps up to `last` under a new token, and deletes all others. Every process must call it.

        Args:
          last: the step that the run goes on from; None for a new run.
        """
        self.wait()
        kept = {step for step in self._steps if last is not None and step <= last}
        if self._folder is not None and self._folder.exists():
            for step, path in step_dir.steps_on_disk(self._folder).items():
                if step not in kept:
                    path.rmtree()
        self._steps = kept
        if self._began:
            return
        self._began = True
        token = agreement.gather(uuid.uuid4().hex)[0]
        folder = self._folder_of(token)
        assert folder is not None
        if kept and self._folder is not None:
            self._folder.rename(folder)
        else:
            folder.mkdir(exist_ok=True)
        self._folder = folder
        agreement.gather(None)  # the token is recorded once all folders have it
        if agreement.is_primary():
            self._shared.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"token": token, "directory": os.fspath(self._shared)})
            step_dir.write_file(self._shared / TOKEN, text.encode())
        for other in self._root.iterdir():
            if not other.name.startswith(token):  # of earlier starts
                shutil.rmtree(other, ignore_errors=True)

    def save(
        self, record: Mapping[str, Any], arrays: Mapping[str, jax.Array], *, wait: bool = False
    ) -> bool:
        """Saves this process's part of a state, which may be donated when this returns.

        A save that fails is a warning: the shared ones go on.

        Args:
          record: the contents of meta.json.
          arrays: the state's arrays by name.
          wait: whether the save is finished here, not in a thread. Every process must then call it.

        Returns:
          With `wait`, whether every process holds the step now.
        """
        self.wait()
        if not self._began:
            self.begin(None)
        step = record["step"]
        if step not in self._steps:
            entries = {name: ArrayEntry(x.shape, x.dtype.name, 0) for name, x in arrays.items()}
            blocks = {name: local_step.blocks_of(array) for name, array in arrays.items()}
            self._pending = self._pool.submit(self._write, step, record, entries, blocks)
        if not wait:
            return False
        self.wait()
        return all(agreement.gather(step in self._steps))

    def _write(self, step: int, *contents: Any) -> None:
        assert self._folder is not None
        path = self._folder / str(step)
        try:
            local_step.write(path, *contents)
            self._steps.add(step)
            self._good = True
            for old in sorted(self._steps)[: -self._settings.keep_last]:
                self._steps.discard(old)
                step_dir.remove(self._folder / str(old))
        except (OSError, ValueError) as error:
            if step not in self._steps:
                with contextlib.suppress(OSError):
                    path.rmtree()
            if self._good:
                text = "the local tier cannot be used (%s: %s); shared checkpoints go on."
                _log.warning(text, type(error).__name__, error)
            self._good = False

    def wait(self) -> None:
        """Waits until the last save has ended."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits for the last save and frees the thread."""
        self.wait()
        self._pool.shutdown()
