"""XManager: writes a run as a JSON file, and runs launch/submit/xmanager_script.py, a launch script in XManager's style.

XManager needs an older protobuf than SeqIO's tokenizers, so it may live in an environment of its own (the extra
`xmanager`); the script is run by that environment's Python.
"""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import psutil

from espalier.launch import environment
from espalier.launch.submit.base import ADDRESS, Handle, Job, State, Status, SubmitError
from espalier.launch.submit.launch_config import Launch, texts

SCRIPT = os.path.join(environment.ROOT, "launch", "submit", "xmanager_script.py")
_EXECUTORS = ("local", "vertex", "kubernetes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Launch):
    """XManager: executor, image and accelerators.

    Attributes:
      executor: 'local' (processes of this machine), 'vertex' (Vertex AI) or 'kubernetes'.
      xmanager_python: Python of the environment with xmanager; empty for this one.
      image: of the container for Vertex AI and Kubernetes, with this project installed.
      accelerator: as XManager's JobRequirements names it, such as 'a100'; empty for none.
      accelerators: their number.
      restarts: times that the process is started again after status 75.
      logs: folder of the logs; empty for MODEL_DIR/logs.
    """

    BACKEND: ClassVar[str] = "xmanager"
    FOREGROUND: ClassVar[bool] = True

    executor: str = "local"
    xmanager_python: str = ""
    image: str = ""
    accelerator: str = ""
    accelerators: int = 0
    restarts: int = 3
    logs: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "accelerators", "restarts")
        self.matching(r"\w+", "accelerator", like="a100")
        if self.executor not in _EXECUTORS:
            raise SubmitError(f"executor = {self.executor!r}: choose from {', '.join(_EXECUTORS)}.")
        if (self.executor != "local") != bool(self.image):
            raise SubmitError("image: give one for Vertex AI and Kubernetes, and none for 'local'.")
        if bool(self.accelerator) != bool(self.accelerators):
            raise SubmitError("give both accelerator and accelerators, or none of them.")
        if self.executor != "local" and self.secrets:
            raise SubmitError(
                "secrets: XManager has no secrets for Vertex AI and Kubernetes: use a service account."
            )

    @property
    def interpreter(self) -> str:
        return self.python or (sys.executable if self.executor == "local" else "python")

    @property
    def parts(self) -> tuple[tuple[int, str], ...]:
        return ((self.accelerators, "accelerators"),) if self.accelerators else ()

    @property
    def in_container(self) -> bool:
        return self.executor != "local"

    def unseen(self, path: str) -> str:
        del path
        if not self.in_container:
            return ""
        return f"the container has no folder of this machine: {ADDRESS}"

    def notes(self) -> list[str]:
        python = self.xmanager_python or sys.executable
        whose = (
            "" if self.xmanager_python else ", this one; give another with --config.xmanager_python"
        )
        missing = not self.xmanager_python and importlib.util.find_spec("xmanager") is None
        lacks = ", and it has no xmanager: make xmanager" if missing else ""
        return [*super().notes(), f"xmanager_python: {python}{whose}{lacks}"]

    def submitter(self) -> "XManagerSubmitter":
        return XManagerSubmitter(self)


def experiment(settings: Settings, job: Job) -> dict[str, Any]:
    """Returns the description of a job that the script reads."""
    words = settings.in_group(texts(job.command), f"--restarts={settings.restarts}")
    if settings.executor != "local":  # the image has no entry point
        words.insert(0, settings.interpreter)
    if settings.executor == "vertex" and any("$(" in word for word in words):
        raise SubmitError("Vertex AI replaces $(NAME) in arguments: give values without '$('.")
    if settings.executor == "kubernetes":
        words = [word.replace("$", "$$") for word in words]
    return {
        "title": job.name,
        "executor": settings.executor,
        "program": settings.interpreter,
        "arguments": words,
        "environment": {**settings.variables, **job.environment},
        "folder": settings.directory,
        "image": settings.image,
        "requirements": {settings.accelerator: settings.accelerators}
        if settings.accelerator
        else {},
    }


class XManagerSubmitter:
    """One process with XManager's script for each job; see launch.submit.base.Submitter.

    With the local executor the script ends when the job does; with the others once the job is sent.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._jobs: dict[Handle, Job] = {}
        self._processes: dict[Handle, subprocess.Popen[bytes]] = {}
        self._began: dict[Handle, float] = {}
        self._dropped: set[Handle] = set()

    def submit(self, job: Job) -> Handle:
        if job.after:
            raise SubmitError("an XManager job cannot wait for another one here.")
        handle = os.path.abspath(job.log)
        self._jobs[handle] = job
        return handle

    def preview(self) -> str:
        parts = []
        for handle, job in self._jobs.items():
            text = json.dumps(experiment(self._settings, job), indent=2)
            parts.append(f"# {' '.join(self._command(handle))}\n{text}\n")
        return "\n".join(parts)

    def statuses(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        for handle in self._jobs:
            if handle not in self._processes and handle not in self._dropped:
                self._start(handle)
        return {handle: self._status(handle) for handle in handles}

    def cancel(self, handle: Handle) -> None:
        if handle not in self._processes:
            self._dropped.add(handle)
            return
        # XManager's own script would end without waiting for the job to save.
        for process in _descendants(self._processes[handle].pid):
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if words[1:3] == ["-m", "espalier.launch.submit.group"]:
                    process.terminate()
                    return
        self._processes[handle].terminate()

    def close(self) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                for each in (*_descendants(process.pid), process):
                    with contextlib.suppress(psutil.Error):
                        each.kill()
                process.wait()

    def _command(self, handle: Handle) -> list[str]:
        return [self._settings.xmanager_python or sys.executable, SCRIPT, f"--job={handle}.xm.json"]

    def _start(self, handle: Handle) -> None:
        job = self._jobs[handle]
        os.makedirs(os.path.dirname(handle), exist_ok=True)
        content = json.dumps(experiment(self._settings, job))
        pathlib.Path(f"{handle}.xm.json").write_text(content, encoding="utf-8")
        paths = [environment.IMPORTED_FROM, *filter(None, [os.environ.get("PYTHONPATH")])]
        with open(handle, "ab") as log:
            try:
                self._processes[handle] = subprocess.Popen(
                    self._command(handle),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                    start_new_session=True,
                )
            except OSError as error:
                raise SubmitError(
                    f"xmanager_python = {self._settings.xmanager_python!r} cannot be run: {error.strerror}."
                ) from None
        self._began[handle] = time.monotonic()

    def _status(self, handle: Handle) -> Status:
        if handle in self._dropped:
            return Status(state=State.DROPPED)
        code, seconds = self._processes[handle].poll(), time.monotonic() - self._began[handle]
        if code is None:
            return Status(state=State.RUNNING, seconds=seconds)
        return Status(state=State.ENDED, exit_status=code, seconds=seconds)


def _descendants(process: int) -> list[psutil.Process]:
    """Returns the children of a process, and theirs."""
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process).children(recursive=True)
    return []
