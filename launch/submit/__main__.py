"""Starts a run on this machine, a SLURM cluster, XManager, GKE or a TPU slice, with the flags of `train`.

Example: the script of a SLURM job, sent to nobody:

  espalier submit --config=launch/submit/configs/slurm.py --config.nodes=4 --dry_run \\
    --gin_file=t5x_configs/models/tiny.gin --gin_file=t5x_configs/data/bytes.gin \\
    --gin_file=t5x_configs/runs/pretrain.gin \\
    --gin.MODEL_DIR=/tmp/espalier_tiny --gin.MIXTURE_OR_TASK_NAME=python --gin.TRAIN_STEPS=50

The configuration is checked here before anything is sent. After `--`, words are another command, such as
`-- evaluate loss --checkpoint=DIR`; it needs --config.logs. docs/scale/clusters.md has one command for each back end.
"""

import argparse
import ast
import contextlib
import glob
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espalier.common import stages
from espalier.launch import cli, environment
from espalier.launch.submit.base import Job, State, Status, SubmitError, Submitter

if TYPE_CHECKING:
    from espalier.launch.submit.launch_config import Launch

ENTRY = "espalier.launch.train:train"
_FOLLOW_SECONDS = 0.5

# Names of macros, and of flags of commands that read a model, whose values are paths.
_NAMES = re.compile(
    r"(^|_)(DIR|DIRECTORY|PATH|FILES?|OUTPUT|TOKENIZER)$|^--(\w+_)?(checkpoint|adapter|factors|inputs|output|documents|queries|out)$"
)


def check_paths(
    settings: "Launch", macros: Iterable[tuple[str, Any]], gin_files: Sequence[str]
) -> None:
    """Warns, on standard error, of every path that the job's machines do not share.

    Args:
      settings: the launch configuration.
      macros: names and final values of the configuration's macros, or of a command's flags. Absolute paths count under any
        name, and relative ones under names such as FILES and TOKENIZER, unless this project has them.
      gin_files: gin files of the command line.

    Raises:
      SubmitError: MODEL_DIR would be lost with a container, or all paths must be shared.
    """
    unseen: dict[str, list[str]] = {}  # by reason
    for name, value in [*macros, ("--gin_file", gin_files)]:
        for path in _paths(name, value):
            if reason := settings.unseen(os.path.join(settings.directory, path)):
                unseen.setdefault(reason, []).append(f"{name} = {path!r}")
                if settings.SHARED_PATHS or name == "MODEL_DIR" and settings.in_container:
                    raise SubmitError(f"{name} = {path!r}: {reason}.")
    for reason, named in unseen.items():
        print(f"warning: {', '.join(named)}: {reason}.", file=sys.stderr)


def _paths(name: str, value: Any) -> Iterator[str]:
    """Yields the local paths in a value, which may have parts."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _paths(name, part)
    if not isinstance(value, str) or not value or "://" in value:
        return
    if (
        os.path.isabs(value)
        or (name == "--gin_file" or _NAMES.search(name))
        and not glob.glob(os.path.join(environment.ROOT, value))
    ):
        yield value


def _flag_values(words: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yields (name, value) of the flags of a command, and of its bindings; gin files are read where the command starts."""
    following = [*words[1:], ""]
    for word, after in zip(words, following, strict=True):
        name, sign, value = word.partition("=")
        if not name.startswith("--") or name in ("--gin_file", "--gin_search_paths"):
            continue
        value = value if sign or after.startswith("-") else after
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
        yield name.removeprefix("--gin."), value


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    program = cli.program_name("espalier.launch.submit")
    usage = f"{program} --config=FILE.py [--config.NAME=VALUE ...] [flags] [flags of train, or -- COMMAND]"
    parser = cli.make_parser(__doc__ or "", program, usage=usage)
    _add_flags(parser)
    words = sys.argv[1:] if argv is None else list(argv)
    words, dashes, command = _split(words)
    settings = [word for word in words if word.startswith("--config.")]
    flags, rest = parser.parse_known_args([word for word in words if word not in settings])
    if dashes and rest:
        parser.error(f"unknown flags before --: {' '.join(rest)}")
    if dashes and not command:
        parser.error("give a command after --, such as evaluate loss --checkpoint=DIR")
    overrides = [word.removeprefix("--config.") for word in settings]
    gin_words = command if command and command[0].startswith("-") else rest
    other = command if gin_words is rest else []

    def call() -> int:
        with stages.shown(program, header=argv is None):
            return submit(flags, overrides, gin_words, other)

    return cli.status_of(call)


def _split(words: list[str]) -> tuple[list[str], bool, list[str]]:
    """Returns the words before and after '--', and whether it is there."""
    if "--" not in words:
        return words, False, []
    place = words.index("--")
    return words[:place], True, words[place + 1 :]


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py",
        help="the launch configuration, a Python file such as launch/submit/configs/slurm.py",
    )
    parser.add_argument(
        "--config.NAME",
        dest="_setting",
        metavar="VALUE",
        help="set NAME of the launch configuration, such as --config.nodes=4",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry_run", action="store_true", help="print the script or manifest, and send nothing"
    )
    what.add_argument("--status", action="store_true", help="show the state of the submitted job")
    what.add_argument(
        "--cancel", action="store_true", help="let the submitted job save its work and end"
    )


def submit(
    flags: argparse.Namespace, overrides: Sequence[str], gin_words: list[str], command: list[str]
) -> int:
    """Submits a job, or shows or cancels it; returns the exit status.

    Args:
      flags: see `_add_flags`.
      overrides: 'NAME=VALUE' for the launch configuration.
      gin_words: flags of `train`; unused if there is a command.
      command: words of another command, without 'espalier'.
    """
    from espalier.launch.submit import launch_config

    settings = launch_config.read(flags.config, overrides)
    settings.check(command or ["train", *gin_words])
    with stages.stage("checking the configuration"):
        job = _other_job(settings, command) if command else _train_job(settings, gin_words)
    if not (flags.status or flags.cancel):
        for note in settings.notes():
            print(note, file=sys.stderr)
    submitter = settings.submitter()
    if settings.FOREGROUND:
        if flags.status or flags.cancel:
            raise SubmitError(
                "a job on this machine runs in the `espalier submit` that started it, and ends with it: Ctrl-C there saves its work. "
                "--status and --cancel are for jobs of a queue."
            )
        if not flags.dry_run:
            with stages.quiet():  # its processes speak
                return _follow(submitter, job)
    if flags.status or flags.cancel:
        handle = submitter.handle(job)
        if flags.cancel:
            submitter.cancel(handle)
        print(f"{job.name}: {_text(submitter.statuses([handle])[handle])}")
        return 0
    handle = submitter.submit(job)
    if flags.dry_run:
        print(submitter.preview(), end="")
        return 0
    print(f"{job.name}: {_text(submitter.statuses([handle])[handle])}")
    if not settings.ELSEWHERE:
        print(f"log {job.log}")
    print("The same command with --status shows its state, with --cancel ends it.")
    return 0


def _text(status: Status) -> str:
    ended = f" with status {status.exit_status}" if status.exit_status is not None else ""
    seconds = f", {status.seconds:.0f} s" if status.seconds else ""
    return f"{status.state.value}{ended}{seconds}"


def _train_job(settings: "Launch", words: list[str]) -> Job:
    """Returns the job that trains, after checks of its configuration.

    Raises:
      ConfigError: with all problems of the gin configuration.
      SubmitError: the run does not fit the machines, or is lost with them.
    """
    import jax

    from espalier.launch.config import gin_config
    from espalier.launch.precompile import precompile

    flags, bindings = cli.read_gin_flags(words, "the flags of train")
    if flags.coordinator_address:
        raise SubmitError("--coordinator_address is for one process: the back end sets it.")
    paths = list(filter(None, ",".join(flags.gin_search_paths).split(",")))
    config = gin_config.load(flags.gin_file, bindings, paths, entry=ENTRY)
    # Not by JAX_PLATFORMS, which the job would inherit: it needs the devices that this process must not take.
    jax.config.update("jax_platforms", "cpu")
    check_paths(settings, config.macros.items(), flags.gin_file)
    arguments = config.arguments()
    if settings.devices is not None:
        try:
            program = precompile.resolved(arguments["recipe"], settings.devices)
        except ValueError as error:
            raise SubmitError(
                f"the launch configuration has {settings.devices} devices: {error}"
            ) from None
        _warn_of_tensor(settings, program.mesh.shape)
    folder = str(arguments["model_dir"])
    return _job(settings, ["train", *words], os.path.basename(folder.rstrip("/")), folder)


def _warn_of_tensor(settings: "Launch", mesh: Mapping[str, int]) -> None:
    """Warns, on standard error, of a mesh whose innermost axis leaves the fast links of a node or slice."""
    if len(settings.parts) < 2:
        return
    (parts, outer), (within, inner) = settings.parts
    if parts > 1 and within % mesh["tensor"]:
        print(
            f"warning: MESH = {dict(mesh)}: 'tensor' = {mesh['tensor']} does not divide the {within} {inner} of one of the {outer}, so every "
            f"layer waits for the network between {outer}: keep it within one, and give the other devices to 'fsdp' or 'data'.",
            file=sys.stderr,
        )


def _other_job(settings: "Launch", command: list[str]) -> Job:
    from espalier.common import spelling

    names = [name for name in cli.command_names() if name != "submit"]
    if command[0] not in names:
        raise SubmitError(f"no command {command[0]!r}; {spelling.nearest(command[0], names)}")
    check_paths(settings, _flag_values(command), [])
    if settings.processes > 1:
        words = [word for word in command[:2] if not word.startswith("-")]
        ask = (sys.executable, "-m", f"espalier.launch.{words[0]}", *words[1:], "--help")
        help_text = subprocess.run(ask, capture_output=True, text=True).stdout
        if "--coordinator_address" not in help_text:
            raise SubmitError(
                f"{' '.join(words)} runs in one process, and the launch configuration starts several: give it one node with "
                "one process."
            )
    return _job(settings, command, command[0], None)


def _job(settings: "Launch", words: list[str], name: str, folder: str | None) -> Job:
    """Returns the job of a command of this project."""

    logs = getattr(settings, "logs", "")
    if folder and not logs and not settings.ELSEWHERE and "://" in folder:
        raise SubmitError(
            f"MODEL_DIR = {folder!r} is an address: give a folder for the logs, --config.logs=DIR."
        )
    if folder and not logs:
        there = "" if settings.ELSEWHERE else settings.directory
        logs = os.path.join(there, os.path.expanduser(folder), "logs")
    if not logs and not settings.ELSEWHERE:
        raise SubmitError("logs: a command without MODEL_DIR needs --config.logs=DIR.")
    log = os.path.join(os.path.abspath(os.path.expanduser(logs)), "log.txt")
    command = (
        settings.interpreter,
        "-m",
        f"espalier.launch.{words[0]}",
        *words[1:],
        *settings.join_flags,
    )
    environment: dict[str, str] = {}
    if settings.BACKEND == "local":
        command, environment = settings.group_command(command, log), settings.variables
    return Job(name=name or "espalier", command=command, log=log, environment=environment)


def _follow(submitter: Submitter, job: Job) -> int:
    """Runs a job on this machine, copies its log to the terminal, and returns its exit status."""
    from espalier.launch.sweep.driver import stop_signals

    os.makedirs(os.path.dirname(job.log), exist_ok=True)
    place = os.path.getsize(job.log) if os.path.exists(job.log) else 0
    handle = submitter.submit(job)
    print(f"log {job.log}", flush=True)
    cancelled = False
    try:
        with stop_signals() as signals:
            while True:
                status = submitter.statuses([handle])[handle]
                place = _copy(job.log, place)
                if status.state in (State.ENDED, State.DROPPED):
                    return _exit_status(status)
                if signals and not cancelled:
                    cancelled = True
                    submitter.cancel(handle)
                if len(signals) > 1:
                    submitter.close()
                time.sleep(_FOLLOW_SECONDS)
    finally:
        submitter.close()


def _copy(log: str, place: int) -> int:
    """Writes what a log has after a position to standard output; returns the new position."""
    if not os.path.exists(log):
        return place
    with open(log, "rb") as file:
        file.seek(place)
        sys.stdout.buffer.write(file.read())
        sys.stdout.flush()
        return file.tell()


def _exit_status(status: Status) -> int:
    code: Any = status.exit_status
    if code is None:
        return cli.INTERRUPTED
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    raise SystemExit(main())
