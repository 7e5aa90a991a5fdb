"""A run's directory: its files, and the check that a run continues only in its own directory.

config.gin, operative_config.gin   the configuration as loaded, and as used with its defaults
model.json                         the model, as data that is read without running anything
run.json                           commit, command, versions, environment, host, mesh, data
vocabulary.model, vocabulary.json  its SentencePiece vocabulary, if it has one
tokenizer/                         or the files of an imported tokenizer
parameters.txt                     every parameter with shape, axes and sharding
lifetime.json                      its time, over all starts
metrics.jsonl, tensorboard/, checkpoints/<step>/

A MODEL_DIR in an object store has the same files under the same names. Checkpoints are written to it directly; the other
files are written in a local folder, which is copied to the store before each checkpoint is committed, and at the end.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import IO, Any

from espalier.common import files
from espalier.common.storage import mirror, paths
from espalier.common.storage.lock import HeldError, StoreLock
from espalier.launch import environment
from espalier.launch.config import gin_source
from espalier.launch.config import text as config_text
from espalier.launch.run import model_record
from espalier.trainers.checkpoints import step_dir

# Settings that a run may change when it continues: its length, its outputs, its devices, and the place of its vocabulary
# (the vocabulary itself is compared by its digest).
# Names as in config_text.first_difference: macros, bindings, or classes with all their parameters.
MAY_CHANGE = (
    "MODEL_DIR", "TRAIN_STEPS", "TRAIN_TOKENS", "TRAIN_EPOCHS", "EVAL_PERIOD", "EVAL_STEPS", "CHECKPOINT_PERIOD",
    "LOG_PERIOD", "INITIAL_CHECKPOINT_PATH", "INITIAL_SCOPE", "INITIAL_DATA", "INITIAL_TRANSFORM",
    "INITIAL_MOMENTS", "INDICATORS_STOP", "MESH", "LOCAL_CHECKPOINT_DIR", "LOCAL_CHECKPOINT_PERIOD", "GRACE_SECONDS",
    "VOCABULARY", "TOKENIZER", "run_vocabulary.of", "run_vocabulary.load", "huggingface.path", "from_file.path",
    "train.model_dir", "train.total_steps", "train.total_tokens", "train.total_epochs", "train.eval_period",
    "train.eval_steps", "train.eval_tasks", "train.checkpoint_period", "train.checkpointer",
    "train.log_period", "train.step_timeout", "train.initial", "train.writers", "train.hooks", "hooks.named", "train.profile",
    "InitialCheckpoint.path", "InitialCheckpoint.scope", "InitialCheckpoint.data",
    "InitialCheckpoint.transform", "InitialCheckpoint.moments", "InitialCheckpoint.computed",
    "Anomaly", "Checkpointer", "LocalTier", "PreferenceIndicators.stop", "ProfilerWindow", "Recipe.mesh",
    "Recipe.rules", "TrackioWriter", "WandbWriter",
    # Checkpoints of other dtypes are refused when they are restored, with the remedy.
    "Recipe.rounding", "param_dtype",
)  # fmt: skip

# The files and folders that a start reads or writes, by name. Others are written anew.
_FILES = ("config.gin", "operative_config.gin", "run.json", "parameters.txt", "metrics.jsonl", "lifetime.json",
          "vocabulary.model", "vocabulary.json", ".lock")  # fmt: skip
_FOLDERS = ("checkpoints", "tensorboard", "tokenizer")


class RunDirectoryError(ValueError):
    """The directory cannot be used, is damaged, or belongs to another run."""


@dataclasses.dataclass(frozen=True)
class RunDir:
    """A run's directory.

    Only the `writer` process writes; all may read. The writer holds a lock until it is closed, so that
    another run in the same directory fails to start.

    Attributes:
      path: the local folder of the files: the directory itself, or its mirror.
      writer: whether this process writes.
      lock: held by the writer.
      store: copies the files to an address; None for a local directory.
    """

    path: str
    writer: bool = True
    lock: IO[str] | StoreLock | None = None
    store: mirror.Mirror | None = None

    def close(self) -> None:
        """Copies the files to the store, if they are in one, and releases the lock."""
        try:
            if self.lock is not None:
                self.publish()
        finally:
            if self.lock is not None:
                self.lock.close()
            if self.store is not None and not self.writer:
                shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Copies the files to the store, so that another host can continue from here; nothing for a local directory.

        Raises:
          LostLockError: another process has taken the run.
          StoreError: the store refuses, or cannot be reached.
        """
        if self.writer and self.store is not None:
            self._check_lock()
            self.store.push()

    def _check_lock(self) -> None:
        if isinstance(self.lock, StoreLock):
            self.lock.check()

    @property
    def address(self) -> str:
        """The directory as all hosts know it: MODEL_DIR."""
        return self.path if self.store is None else self.store.address

    @property
    def checkpoints(self) -> str:
        return paths.join(self.address, step_dir.CHECKPOINTS)

    @property
    def metrics(self) -> str:
        return self.file("metrics.jsonl")

    @property
    def started(self) -> bool:
        """Whether there is a checkpoint or a row of metrics of a step; before that, any run may use the directory."""
        return self.has_checkpoints or _has_steps(self.metrics)

    @property
    def has_checkpoints(self) -> bool:
        if self.store is not None:
            return bool(paths.names(self.checkpoints))
        return os.path.isdir(self.checkpoints) and bool(os.listdir(self.checkpoints))

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def write(self, name: str, text: str) -> None:
        """Writes a small text file atomically."""
        if self.writer:
            files.write(self.file(name), text, synced=True)  # a run goes on by its records

    def write_through(self, name: str, text: str) -> None:
        """Writes a small text file, and copies it to the store at once; raises as `publish`."""
        self.write(name, text)
        if self.writer and self.store is not None:
            self._check_lock()
            self.store.push_file(name)

    def record(self, **facts: Any) -> None:
        """Adds facts to run.json that are known only after the start (mesh, data, parameter count).

        Raises:
          RunDirectoryError: `data_fingerprint`, or one of `held_out_fingerprints`, differs from its value at an earlier start
            of this run.
        """
        run = read_run(self.path)
        starts = (*run.get("earlier", []), run)
        recorded = [text for s in starts if (text := s.get("data_fingerprint")) is not None]
        new = facts.get("data_fingerprint")
        if new is not None and recorded and recorded[-1] != new:
            raise RunDirectoryError(
                f"The data of the run in {self.address} has changed: its fingerprint was "
                f"{recorded[-1]} and is now {new}. Continuing would repeat or lose examples. Restore "
                f"the data, vocabulary and preprocessing, {train_on(self.address)}."
            )
        known = {k: v for s in starts for k, v in s.get("held_out_fingerprints", {}).items()}
        for name, digest in facts.get("held_out_fingerprints", {}).items():
            if known.get(name, digest) != digest:
                raise RunDirectoryError(
                    f"The held-out data of {name} of the run in {self.address} have changed: losses before and after would be of "
                    f"different texts under one name. Restore their files, {train_on(self.address)}."
                )
            known[name] = digest
        if known:
            facts["held_out_fingerprints"] = known
        self.write("run.json", _json({**run, **facts}))


def train_on(run: str | os.PathLike) -> str:
    """Returns how to continue a run whose data have changed, for an error."""
    path = os.fspath(run)
    # Gin files are local.
    config = "" if paths.is_remote(path) else f"--gin_file={os.path.join(path, 'config.gin')} "
    return (
        "or train on from its weights, with its vocabulary, in another MODEL_DIR: "
        f"{config}--gin.INITIAL_CHECKPOINT_PATH='\"{path}\"'"
    )


def prepare(
    path: str, config: str, *, may_change: Iterable[str] = MAY_CHANGE, writer: bool = True
) -> RunDir:
    """Creates the directory, or checks that the run in it has the same configuration.

    Args:
      path: the directory (MODEL_DIR).
      config: text of the whole configuration.
      may_change: macros and bindings that a continued run may change.
      writer: whether this process writes; one per run.

    Raises:
      RunDirectoryError: the directory holds a run of another or an unknown configuration; the path is
        empty or an address of an unknown kind, or it cannot be read and written; another process is
        training in it.
      StoreError: the store of an address refuses, has no such bucket, or cannot be reached.
    """
    if not path.strip() or "\0" in path:
        raise RunDirectoryError(
            f"MODEL_DIR = {path!r} is no path: give the run a directory of its own."
        )
    here = os.listdir() if os.path.realpath(path) == os.getcwd() else []
    if here and not {*here} & {*_FILES}:
        raise RunDirectoryError(
            f"MODEL_DIR = {path!r} is the working directory, whose files are no run's: give the run a directory of its own."
        )
    run = (_open_address if paths.is_remote(path) else _open_folder)(path, writer)
    try:
        _check_entries(run)
        _continue(run, config, tuple(may_change))
        run.publish()
    except BaseException:
        if run.lock is not None:
            run.lock.close()
        raise
    return run


def _open_address(address: str, writer: bool) -> RunDir:
    """Locks a directory in an object store for the writer, and copies its files to a local folder of this process.

    Raises:
      RunDirectoryError: the address is a whole bucket, or another process holds it.
      StoreError: the store refuses, has no such bucket, or cannot be reached.
    """
    address = paths.absolute(address)
    if not paths.split(address)[2]:
        raise RunDirectoryError(
            f"MODEL_DIR = {address!r} is a whole bucket: give the run a folder of its own, {address}/NAME."
        )
    try:
        held = StoreLock(address) if writer else None
    except HeldError as error:
        raise RunDirectoryError(
            f"{address} is in use: {error} is training there. Stop it, or use another MODEL_DIR."
        ) from None
    name = "" if writer else f".{os.getpid()}"
    try:
        copies = mirror.Mirror(
            address, writer=writer, without=(step_dir.CHECKPOINTS, "logs"), name=name
        )
    except BaseException:
        if held is not None:
            held.close()
        raise
    return RunDir(copies.path, writer, held, copies)


def _open_folder(path: str, writer: bool) -> RunDir:
    """Makes and locks a local directory for the writer.

    Raises:
      RunDirectoryError: the directory cannot be made or locked, or it is an address of an unknown kind.
    """
    if "://" in path:
        raise RunDirectoryError(
            f"MODEL_DIR = {path!r} is an address of an unknown kind: give a folder, or {' or '.join(paths.SCHEMES)}BUCKET/NAME."
        )
    path = os.path.abspath(os.path.expanduser(path))
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # what makes no directory: a name that is too long, links in a circle
        return RunDir(path, writer, files.lock_folder(path) if writer else None)
    except BlockingIOError as error:
        raise RunDirectoryError(
            f"{path} is in use: {error} is training there. Stop it, or use another MODEL_DIR."
        ) from None
    except OSError as error:
        raise RunDirectoryError(
            f"MODEL_DIR = {path!r} cannot be used: {error.strerror}: {error.filename!r}. Give a directory "
            "that can be made and written, or remove what is in its place."
        ) from None


def _check_entries(run: RunDir) -> None:
    """Raises RunDirectoryError for an entry of the wrong kind, or one that cannot be read and written."""
    remedy = "or use another MODEL_DIR"
    for name in (*_FILES, *_FOLDERS):
        path, kind = run.file(name), "folder" if name in _FOLDERS else "file"
        if not os.path.lexists(path):
            continue
        if not (os.path.isdir(path) if kind == "folder" else os.path.isfile(path)):
            what = "a dangling link" if not os.path.exists(path) else f"not a {kind}"
            raise RunDirectoryError(
                f"{path} is {what}, but the run needs a {kind} there: move it away, {remedy}."
            )
        rights = os.R_OK | (os.W_OK if run.writer else 0) | (os.X_OK if kind == "folder" else 0)
        if not os.access(path, rights):
            raise RunDirectoryError(
                f"{path} cannot be read and written by this user: change its permissions, {remedy}."
            )


def _continue(run: RunDir, config: str, may_change: tuple[str, ...]) -> None:
    """Checks that the directory belongs to this run, and describes the new start."""
    path = run.address
    old = _read(run.file("config.gin")) if run.started else None
    if old is None and run.has_checkpoints:
        raise RunDirectoryError(
            f"{path} holds checkpoints but no config.gin, so their run is unknown. Use another "
            "MODEL_DIR, or put the run's config.gin back."
        )
    remedy = "Use another MODEL_DIR, or put the run's config.gin back."
    try:
        difference = old is not None and config_text.first_difference(old, config, may_change)
    except config_text.UnreadableConfigError as error:
        raise RunDirectoryError(
            f"{path}/config.gin is damaged, so the run in the directory is unknown: {error}. {remedy}"
        ) from None
    previous = read_run(run.path) if run.started else {}
    if old is not None and difference:
        if previous.get("config_sha256") not in (None, _sha256(old)):
            raise RunDirectoryError(
                f"{path}/config.gin is damaged or was edited: it does not match its checksum in run.json, "
                f"and {difference}. {remedy}"
            )
        raise RunDirectoryError(
            f"{path} holds a run of another configuration: {difference}. Use another MODEL_DIR, "
            f"set the value back, or delete the directory. (A continued run may change "
            f"{', '.join(name for name in may_change if name.isupper())}.)"
        )
    if run.writer:
        facts = {**environment.describe(), "config_sha256": _sha256(config)}
        if previous:
            facts["earlier"] = [*previous.pop("earlier", []), previous]
        run.write("config.gin", config)
        model_record.write(run.path)
        run.write("run.json", _json(facts))


def read_run(path: str) -> dict[str, Any]:
    """Returns the contents of run.json; empty if there is none. Raises RunDirectoryError if it is damaged."""
    text = _read(os.path.join(path, "run.json"))
    try:
        facts = {} if text is None else json.loads(text)
        starts = [facts, *facts.get("earlier", [])]
        if all(isinstance(start, dict) for start in starts):
            return facts
        reason = "it is not a description of a run"
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error)
    raise RunDirectoryError(
        f"{path}/run.json is damaged ({reason}). Delete it; it only describes the run."
    )


def mesh_facts(mesh: Any) -> dict[str, Any]:
    """Returns the mesh as run.json records it."""
    return {
        "axes": dict(zip(mesh.axis_names, mesh.devices.shape, strict=True)),
        "devices": mesh.devices.size,
        "device_kind": mesh.devices.flat[0].device_kind,
        "processes": len({device.process_index for device in mesh.devices.flat}),
    }


def _has_steps(metrics: str) -> bool:
    """Returns whether a file of metrics has rows besides those of step 0; what cannot be read counts as one."""
    try:
        with open(metrics, encoding="utf-8") as file:
            return any(json.loads(line)["step"] != 0 for line in file)
    except FileNotFoundError:
        return False
    except (ValueError, TypeError, KeyError):
        return True


def _json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=2, default=str) + "\n"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: str) -> str | None:
    """Returns a file's text, None without the file; raises RunDirectoryError if it is not UTF-8."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except UnicodeDecodeError as error:
        raise RunDirectoryError(
            f"{path} is damaged: {gin_source.why_unreadable(error)}. Put a copy of it back."
        ) from None
