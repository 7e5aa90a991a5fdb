"""TPU VM slices without Kubernetes: the commands that create, install, start, watch and delete, printed and never run.

They cost money from the first line on, so a person runs them one after another.
"""

import base64
import dataclasses
import shlex
from collections.abc import Mapping
from typing import ClassVar

from espalier.launch.submit.base import ADDRESS, Job, Printed, SubmitError, name_of, numbered
from espalier.launch.submit.launch_config import Launch, texts

# Software of a machine for each version of the TPU, as https://cloud.google.com/tpu/docs/runtimes lists it for JAX.
_RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Launch):
    """A TPU slice as virtual machines of Google Cloud.

    Attributes:
      project, zone: of Google Cloud.
      accelerator_type: such as 'v5litepod-16'.
      runtime_version: of the virtual machine's software; empty for the one that belongs to accelerator_type.
      slices: TPU slices that one run uses.
      spot: whether spot machines are asked for.
      chips: chips of a slice, one JAX device each, to check the mesh before the start; 0 for those that the accelerator's
        name tells.
      repository: from which every host clones this project, such as your fork of it.
      commit: branch, tag or commit of the repository; the same on every host.
      restarts: times that every host starts its process again after status 75.
      folder: where the project is installed on the hosts.
    """

    BACKEND: ClassVar[str] = "tpu_vm"
    ELSEWHERE: ClassVar[bool] = True
    REQUIRED: ClassVar[Mapping[str, str]] = {
        "project": "NAME, the project of Google Cloud",
        "repository": "URL, from which the hosts clone this project",
    }

    project: str = ""
    zone: str = "us-west4-a"
    accelerator_type: str = "v5litepod-16"
    runtime_version: str = ""
    slices: int = 1
    spot: bool = False
    chips: int = 0
    repository: str = ""
    commit: str = "main"
    restarts: int = 20
    folder: str = "espalier"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "slices")
        self.at_least(0, "restarts", "chips")
        self._check_runtime()
        named = self._named_chips()
        if self.chips and named and self.chips != named:
            raise SubmitError(
                f"chips = {self.chips}, but accelerator_type = {self.accelerator_type!r} has {named}: remove chips."
            )

    @property
    def processes(self) -> int:
        return 2  # more than one; their number is in the machines' metadata

    @property
    def parts(self) -> tuple[tuple[int, str], ...]:
        chips = self.chips or self._named_chips()
        return ((self.slices, "slices"), (chips, "chips")) if chips else ()

    def _check_runtime(self) -> None:
        """Raises SubmitError for software of another TPU, or none for a TPU that is not known."""
        kind = self.accelerator_type.partition("-")[0]
        own = _RUNTIMES.get(kind)
        if own is None and not self.runtime_version:
            raise SubmitError(
                f"accelerator_type = {self.accelerator_type!r}: the software of this TPU is not known (of {', '.join(_RUNTIMES)} it is): "
                "give runtime_version too."
            )
        if own and self.runtime_version in {*_RUNTIMES.values()} - {own}:
            raise SubmitError(
                f"runtime_version = {self.runtime_version!r} is of another TPU than accelerator_type = {self.accelerator_type!r}, "
                f"whose software is {own}: remove runtime_version."
            )

    @property
    def runtime(self) -> str:
        kind = self.accelerator_type.partition("-")[0]
        return self.runtime_version or _RUNTIMES[kind]

    def _named_chips(self) -> int:
        """Returns the chips that the name of a known TPU tells: a number of chips or, for v4 and v5p, of their two cores each."""
        kind, _, number = self.accelerator_type.partition("-")
        if kind not in _RUNTIMES or not number.isdecimal():
            return 0
        return int(number) // (2 if kind in ("v4", "v5p") else 1)

    def unseen(self, path: str) -> str:
        del path
        return f"the hosts of a slice share no folder: mount one there on every host before the start, or {ADDRESS}"

    @property
    def interpreter(self) -> str:
        return self.python or ".venv/bin/python"

    def submitter(self) -> Printed:
        return Printed(lambda job: commands(self, job), "the commands for a TPU VM")


def commands(settings: Settings, job: Job) -> str:
    """Returns the commands for one run, each with a comment before it."""
    name = name_of(job)
    where = [f"--project={settings.project}", f"--zone={settings.zone}"]
    machines = [name] if settings.slices == 1 else [f"{name}-{i}" for i in range(settings.slices)]
    log, script = f"{name}.log", _start(settings, job)
    queue = ["gcloud", "compute", "tpus", "queued-resources"]

    def on_hosts(script: str, host: str = "all") -> list[str]:
        words = ["gcloud", "compute", "tpus", "tpu-vm", "ssh"]
        return [
            shlex.join([*words, machine, *where, f"--worker={host}", f"--command={script}"])
            for machine in machines
        ]

    start = f"cd {shlex.quote(settings.folder)} && nohup bash start.sh >>{shlex.quote(log)} 2>&1 </dev/null &"
    steps = [
        ("Create (this is where costs begin).", [_create(settings, name, where)]),
        (
            "Wait until every machine is ACTIVE.",
            [shlex.join([*queue, "describe", name, *where])],
        ),
        ("Install, on every host.", on_hosts(_install(settings))),
        (
            f"Write the start script, on every host:\n{_comment(script)}",
            on_hosts(_write(settings, script)),
        ),
        (
            "Start, on every host at about the same time; slices in parallel.",
            _together(on_hosts(start)),
        ),
        (
            "Watch the first host; Ctrl-C ends only the watching.",
            on_hosts(f"tail -F {shlex.quote(f'{settings.folder}/{log}')}", "0")[:1],
        ),
        (
            "Stop: every host saves and ends. The same start goes on later.",
            on_hosts(f"kill -TERM $(cat {shlex.quote(f'{settings.folder}/start.pid')})"),
        ),
        (
            "Delete (this is where costs end).",
            [shlex.join([*queue, "delete", name, *where, "--force", "--quiet"])],
        ),
    ]
    return "\n".join(numbered(steps))


def _comment(script: str) -> str:
    """Returns a script as comments, for the reader of an encoded one."""
    return "\n".join(f"#    {line}" for line in script.rstrip("\n").split("\n"))


def _together(lines: list[str]) -> list[str]:
    return lines if len(lines) == 1 else [*(f"{line} &" for line in lines), "wait"]


def _create(settings: Settings, name: str, where: list[str]) -> str:
    nodes = [f"--node-id={name}"]
    if settings.slices > 1:
        nodes = [f"--node-count={settings.slices}", f"--node-prefix={name}"]
    return shlex.join(
        ["gcloud", "compute", "tpus", "queued-resources", "create", name, *where, *nodes]
        + [f"--accelerator-type={settings.accelerator_type}"]
        + [f"--runtime-version={settings.runtime}", *(["--spot"] if settings.spot else [])]
    )


def _install(settings: Settings) -> str:
    folder, commit = shlex.quote(settings.folder), shlex.quote(settings.commit)
    return (
        f"git clone {shlex.quote(settings.repository)} {folder} && cd {folder} && git checkout {commit} && "
        "make venv PYTHON=python3.11 && .venv/bin/pip install -c constraints/py311.txt 'jax[tpu]'"
    )


def _start(settings: Settings, job: Job) -> str:
    """Returns the start script of every host."""
    variables = {**settings.variables, **job.environment}
    group = settings.in_group(texts(job.command), f"--restarts={settings.restarts}")
    return "\n".join(
        [
            "echo $$ >start.pid",
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            f"exec {shlex.join([settings.interpreter, *group])}",
            "",
        ]
    )


def _write(settings: Settings, script: str) -> str:
    """Returns a command that writes the start script; encoded, so that nothing in it meets another shell."""
    code = base64.b64encode(script.encode()).decode()
    return f"echo {code} | base64 -d >{shlex.quote(f'{settings.folder}/start.sh')}"
