"""Launch configurations: where and how a run is started, as ml_collections files (launch/submit/configs/).

A file's `get_config()` returns `as_config(settings)`, the settings of one back end. `--config.NAME=VALUE` replaces a
value and keeps its type. The settings know the back end that runs jobs.
"""

import abc
import dataclasses
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from espalier.common import spelling
from espalier.launch import environment
from espalier.launch.config import setting_flags
from espalier.launch.submit.base import SubmitError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# Modules of the back ends, each with a class `Settings`.
BACKENDS = {
    "local": "espalier.launch.submit.group",
    "slurm": "espalier.launch.submit.slurm",
    # A file xmanager.py would hide the library from the script beside it.
    "xmanager": "espalier.launch.submit.xmanager_backend",
    "jobset": "espalier.launch.submit.jobset",
    "tpu_vm": "espalier.launch.submit.tpu_vm",
    "dataflow": "espalier.launch.submit.beam.dataflow",
    "flink": "espalier.launch.submit.beam.flink",
}
_SECRET = re.compile("(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch(abc.ABC):
    """The settings that all back ends share.

    Attributes:
      python: Python on the machines that run the job; empty for this one.
      folder: working directory of the job there; empty for the present one.
      env: environment variables of the job, each 'NAME=VALUE'.
      secrets: environment variables with secrets, each 'NAME=FILE' (a file there, read when the job starts) or, on
        Kubernetes, 'NAME=SECRET/KEY'.
    """

    BACKEND: ClassVar[str]
    # Whether the job may run elsewhere, where this folder and this Python do not exist.
    ELSEWHERE: ClassVar[bool] = False
    # Whether jobs can wait for each other, in a folder that all of them share.
    SWEEPS: ClassVar[bool] = False
    # Whether the job ends with the process that submits it.
    FOREGROUND: ClassVar[bool] = False
    # Whether a path that the job's machines do not see is an error in all commands.
    SHARED_PATHS: ClassVar[bool] = False
    # Settings without a default, each with an example.
    REQUIRED: ClassVar[Mapping[str, str]] = {}

    python: str = ""
    folder: str = ""
    env: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("env", "secrets"):
            for entry in getattr(self, key):
                name, sign, value = entry.partition("=")
                if not sign or not _VARIABLE.fullmatch(name) or "\0" in value:
                    raise SubmitError(f"{key}: {entry!r} is not NAME=VALUE.")
        for name in self.variables:
            if _SECRET.search(name):
                raise SubmitError(
                    f"env: {name} looks like a secret, and scripts and manifests show env: put it into a file and "
                    f"give secrets=('{name}=FILE',), or let the job inherit it."
                )

    @property
    def variables(self) -> dict[str, str]:
        return dict(entry.partition("=")[::2] for entry in self.env)

    @property
    def secret_places(self) -> dict[str, str]:
        return dict(entry.partition("=")[::2] for entry in self.secrets)

    @property
    def interpreter(self) -> str:
        if self.ELSEWHERE:
            return self.python or "python"
        return os.path.expanduser(self.python) or sys.executable

    @property
    def directory(self) -> str:
        return (self.folder if self.ELSEWHERE else os.path.expanduser(self.folder)) or os.getcwd()

    @property
    def processes(self) -> int:
        """Number of processes of a run."""
        return 1

    @property
    def parts(self) -> tuple[tuple[int, str], ...]:
        """Numbers of what a run has and their names, such as ((2, 'slices'), (16, 'chips')); () if only the machines know."""
        return ()

    @property
    def devices(self) -> int | None:
        """Number of devices of a run, the product of `parts`; None if only the machines know."""
        return math.prod(number for number, _ in self.parts) if self.parts else None

    @property
    def in_container(self) -> bool:
        """Whether the job runs in a container, whose own folders are lost when it ends."""
        return False

    def unseen(self, path: str) -> str:
        """Returns why the job's machines do not share a path, absolute or in `folder`, with the remedy; '' if they do."""
        del path
        return ""

    def check(self, words: Sequence[str]) -> None:
        """Raises SubmitError for a command, by its words, that the job's machines cannot run."""
        del words

    def notes(self) -> list[str]:
        """Returns lines for the user on what the job has and uses."""
        if not self.parts:
            return ["devices: all that the machines have; the mesh is checked there"]
        counts = [*self.parts, (self.devices, self.parts[-1][1])]
        *parts, total = (f"{n} {name.removesuffix('s') if n == 1 else name}" for n, name in counts)
        return [f"devices: {' x '.join(parts)}" + (f" = {total}" if len(parts) > 1 else "")]

    @property
    def join_flags(self) -> tuple[str, ...]:
        """Flags with which the processes of a run join each other."""
        return ("--coordinator_address=auto",) if self.processes > 1 else ()

    def in_group(self, command: Sequence[str], *flags: str) -> list[str]:
        """Returns the words after Python by which launch/submit/group.py runs a command, with these flags and the secrets."""
        secrets = [f"--secret={name}={path}" for name, path in self.secret_places.items()]
        return ["-m", "espalier.launch.submit.group", *flags, *secrets, "--", *command]

    @abc.abstractmethod
    def submitter(self) -> Any:
        """Returns the back end, a `base.Submitter`, or a `base.Queue` unless FOREGROUND."""

    def changed(self, before: Mapping[str, Any]) -> list[str]:
        """Returns the names of settings that differ from those of an earlier submission, as JSON has kept them.

        A setting that the submission did not keep, because an earlier version made it, does not count as changed.
        """
        now = json.loads(json.dumps(dataclasses.asdict(self)))
        return [name for name in now if now[name] != before.get(name, now[name])]

    def at_least(self, low: int, *names: str) -> None:
        """Raises SubmitError for a number that is too small."""
        for name in names:
            if (value := getattr(self, name)) < low:
                raise SubmitError(f"{name} = {value}: give a number of at least {low}.")

    def matching(self, pattern: str, *names: str, like: str) -> None:
        """Raises SubmitError for a text that is not empty and has other characters than a back end reads safely."""
        for name in names:
            value = getattr(self, name)
            for text in (value,) if isinstance(value, str) else value:
                if text and not re.fullmatch(pattern, text, re.ASCII):
                    raise SubmitError(f"{name} = {text!r}: give a text like {like}.")


def as_config(settings: Launch) -> "ConfigDict":
    """Returns the ConfigDict of a launch configuration file."""
    from ml_collections import ConfigDict

    return ConfigDict({"backend": settings.BACKEND, **dataclasses.asdict(settings)})


def read(path: str, overrides: Iterable[str] = ()) -> Launch:
    """Returns the settings of a launch configuration file.

    Args:
      path: FILE.py, relative to here or to the root of the repository, or FILE.py:TEXT for a `get_config(text)`.
      overrides: 'NAME=VALUE', which replace values of the file.

    Raises:
      SubmitError: the file cannot be read or describes no back end, or a value is wrong.
    """
    try:
        values = _values(path, overrides)
        backend = values.pop("backend", None)
        if backend not in BACKENDS:
            hint = spelling.nearest(str(backend), BACKENDS)
            raise SubmitError(f"backend = {backend!r}; {hint}")
        kind: type[Launch] = importlib.import_module(BACKENDS[backend]).Settings
        fields = {field.name for field in dataclasses.fields(kind)}
        for name in values:
            if name not in fields:
                raise SubmitError(
                    f"{name}: {backend} has no such setting; {_nearest(name, fields)}"
                )
        settings = kind(**{name: _typed(kind, name, value) for name, value in values.items()})
        for name, example in kind.REQUIRED.items():
            if not getattr(settings, name):
                raise SubmitError(f"{name}: there is no default; give --config.{name}={example}.")
        return settings
    except SubmitError as error:
        raise SubmitError(f"{path}: {error}") from None


def _nearest(name: str, names: Iterable[str]) -> str:
    return spelling.nearest(name, sorted(names))


def _values(path: str, overrides: Iterable[str]) -> dict[str, Any]:
    """Returns the values of a file by name, with the overrides."""
    from absl import flags
    from ml_collections import config_flags

    file, _, text = path.partition(":")
    here = os.path.expanduser(file)
    shipped = os.path.join(environment.ROOT, file)
    full = here if os.path.isfile(here) or not os.path.isfile(shipped) else shipped
    if not os.path.isfile(full) or not full.endswith(".py"):
        raise SubmitError(
            "there is no such Python file: copy one of launch/submit/configs/ and give its path."
        )
    try:
        config = setting_flags.python_config(full, text)
    except setting_flags.PythonConfigError as error:
        raise SubmitError(str(error)) from error
    for override in overrides:
        name, sign, _ = override.partition("=")
        if name not in config:
            raise SubmitError(f"{name}: no such setting; {_nearest(name, config)}")
        if not sign:
            raise SubmitError(f"{name} has no value: give {name}=VALUE.")
    words = ["submit", *(f"--config.{override}" for override in overrides)]
    parser = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=parser, sys_argv=words)
    try:
        parser(words)
    except (flags.Error, TypeError, ValueError) as error:
        raise SubmitError(str(error)) from None
    return parser.config.to_dict()


def _typed(kind: type[Launch], name: str, value: Any) -> Any:
    """Returns a value as the settings declare it; raises SubmitError for another type."""
    default = next(field.default for field in dataclasses.fields(kind) if field.name == name)
    if isinstance(default, tuple):
        if isinstance(value, str):
            value = (value,)
        if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
            raise SubmitError(f"{name} = {value!r}: give a tuple of texts.")
        return tuple(value)
    if type(value) is not type(default):
        raise SubmitError(f"{name} = {value!r}: give a value of type {type(default).__name__}.")
    return value


def texts(values: Sequence[str]) -> list[str]:
    """Returns words that a text file or a program's arguments can have; raises SubmitError for others."""
    for value in values:
        if "\0" in value:
            raise SubmitError(f"{value!r} has the character NUL: no program takes it.")
    return list(values)
