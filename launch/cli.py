"""The common parts of all commands: flags, environment, configuration, and errors that name a remedy.

A command is a module `launch/<name>.py`, or a folder `launch/<name>` with a `__main__.py`. A sub-command is a module in a
folder of launch that gives `<name> <sub-command>` as its name. Its docstring is its help text, with an example that can be run.
Its function `main(argv=None)` returns the exit status, and is made by `command` or `gin_command` of this module. Functions
import modules that need jax only when they run: --help is fast, and jax starts with the environment variables that are set here.
"""

import argparse
import ast
import contextlib
import dataclasses
import os
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espalier.common import stages
from espalier.launch import environment, input_errors
from espalier.launch.processes import hosts, peers, supervisor

if TYPE_CHECKING:  # gin is imported only once the flags have been read
    from espalier.launch.config.build import Configuration

USAGE_ERROR = 2
INTERRUPTED = os.EX_TEMPFAIL  # 75: the same command continues the work
CONSOLE = "espalier"  # the script that runs every command
BINDINGS = "gin_bindings"  # where flags that set a macro put it, as 'NAME=VALUE'
# Flags for paths whose help text shows no DIR, FILE or PATH.
_PATH_FLAGS = ("checkpoint", "inputs", "output", "out", "to", "problems", "solutions")
# Flags whose paths may be addresses of object stores (espalier/common/storage/paths.py); see also `take_addresses`.
_ADDRESS_FLAGS = (
    "checkpoint",
    "inputs",
    "output",
    "to",
    "to_hf",
    "from_hf",
    "from_gguf",
    "base",
    "adapter",
)
Main = Callable[[Sequence[str] | None], int]  # of a module, called with arguments or with none
_PROGRAM = re.compile("^if __name__ == ", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Start:
    """The flags, the loaded configuration and the words of a command; a call calls the entry function.

    Its arguments are from the configuration; keywords win over it.
    """

    flags: argparse.Namespace
    config: "Configuration"
    words: Sequence[str] = ()

    def __call__(self, **overrides: Any) -> Any:
        assert self.config.entry is not None
        return self.config.entry(**overrides)


def main(
    doc: str,
    entry: str,
    *,
    extra_flags: Callable[[argparse.ArgumentParser], None] | None = None,
    run: Callable[[Start], Any] | None = None,
    default_files: Callable[[argparse.Namespace], Sequence[str]] | None = None,
    command: str | None = None,
    unused: Mapping[str, str] | None = None,
    part: bool = False,
    arguments: Sequence[str] | None = None,
    needs_file: bool = True,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs an entry point: flags, environment, gin, then the entry function. Returns the exit status, see `status_of`.

    Args:
      doc: help text; the first line is the description, the rest follows the flags.
      entry: 'package.module:function', the keyword-only function that gin configures. It is imported by
        this name, never as `__main__`, after the flags are parsed.
      extra_flags: adds the command's own flags to the parser.
      run: called with the `Start` instead of the entry function.
      default_files: returns, from the flags, gin files to read before the files of --gin_file, such as the
        recorded model of a checkpoint's run (launch/config/model_file.py).
      command: name of the command, if it is not the module of `entry`.
      unused: see `gin_config.load`.
      part: see `gin_config.load`.
      arguments: see `gin_config.load`.
      needs_file: whether the usage shows --gin_file as required.
      argv: arguments instead of the process's own; the process is then not restarted.
    """
    program = program_name(f"espalier.launch.{command}" if command else entry.partition(":")[0])
    file = "--gin_file=FILE" if needs_file else "[--gin_file=FILE]"
    usage = f"{program} {file} [--gin.NAME=VALUE ...] [flags]"
    parser = make_parser(doc, program, usage=usage)
    _add_gin_flags(parser)
    if extra_flags is not None:
        extra_flags(parser)
    if any(action.dest == "checkpoint" and action.required for action in parser._actions):
        parser.usage = usage.replace(file, "--checkpoint=DIR")
    words = sys.argv[1:] if argv is None else list(argv)
    flags, bindings = _parse(parser, words)

    def call() -> Any:
        if (
            argv is None
            and flags.coordinator_address
            and (status := supervisor.supervise()) is not None
        ):
            return status
        with (
            prepared(program, own=argv is None),
            peers.joined(
                flags.coordinator_address,
                flags.process_count,
                flags.process_index,
                initialization_timeout=flags.initialization_timeout,
                heartbeat_timeout=flags.heartbeat_timeout,
                status_of=lambda error: 1 if input_errors.reason(error) is None else USAGE_ERROR,
            ),
        ):
            return start_work()

    def start_work() -> Any:
        from espalier.launch.config import gin_config

        with stages.stage("reading the configuration"):
            defaults = list(default_files(flags)) if default_files else []
            search_paths = ",".join(flags.gin_search_paths).split(",")
            config = gin_config.load(
                flags.gin_file,
                bindings,
                list(filter(None, search_paths)),
                entry=entry,
                unused=unused,
                defaults=defaults,
                part=part,
                arguments=arguments,
            )
        if flags.coordinator_address:
            hosts.check_start(config.text)
        for warning in config.warnings:
            # Files of another entry point have bindings without effect here, which is expected.
            if warning.place.source not in defaults:
                print(f"warning: {warning}", file=sys.stderr)
        start = Start(flags, config, words)
        with config.in_use():
            return start() if run is None else run(start)

    return status_of(call)


def run_command(
    doc: str,
    command: str,
    work: Callable[[argparse.Namespace], Any],
    *,
    add_flags: Callable[[argparse.ArgumentParser], None],
    usage: str | None = None,
    huge_pages: bool = True,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a command without gin configuration: flags, environment, then the work. Returns the exit status.

    Args:
      doc: help text, as in `main`.
      command: name of the command, such as 'sweep' or 'evaluate skills'.
      work: called with the flags. Its result decides the exit status, see `status_of`.
      add_flags: adds the command's flags to the parser.
      usage: usage text instead of argparse's.
      huge_pages: whether the process restarts with malloc on huge pages, for XLA on CPU.
      argv: arguments instead of the process's own; the process is then not restarted.
    """
    program = program_name(f"espalier.launch.{command}")
    parser = make_parser(doc, program, usage=usage)
    add_flags(parser)
    flags = parser.parse_args(argv)

    def call() -> Any:
        with prepared(program, own=argv is None, huge_pages=huge_pages):
            return work(flags)

    return status_of(call)


def gin_command(doc: str, entry: str, **options: Any) -> Main:
    """Returns the function `main` of a module whose command gin configures; `main` describes the arguments."""

    def run(argv: Sequence[str] | None = None) -> int:
        return main(doc, entry, argv=argv, **options)

    return run


def command(
    doc: str,
    name: str,
    work: Callable[..., Any],
    *,
    add_flags: Callable[[argparse.ArgumentParser], None] | None = None,
    addresses: Sequence[str] = (),
    **options: Any,
) -> Main:
    """Returns the function `main` of a module whose command has no gin configuration; `run_command` describes the arguments.

    Without `add_flags`, `work` is a keyword-only function, and its parameters are the flags (launch/config/setting_flags.py);
    `addresses` names those that may be addresses of object stores.
    """
    from espalier.launch.config import setting_flags

    def run(argv: Sequence[str] | None = None) -> int:
        if add_flags is not None:
            return run_command(doc, name, work, add_flags=add_flags, argv=argv, **options)
        call = lambda flags: work(**setting_flags.given(flags, work))  # noqa: E731
        return run_command(doc, name, call, add_flags=own_flags, argv=argv, **options)

    def own_flags(parser: argparse.ArgumentParser) -> None:
        take_addresses(parser, *addresses)
        setting_flags.add(parser, work)

    return run


@contextlib.contextmanager
def prepared(program: str, *, own: bool = True, huge_pages: bool = True) -> Iterator[None]:
    """Context manager of a command's work: the environment is set, and the command shows signs of life.

    Args:
      program: name of the command.
      own: whether the process is the command's own: then it may be restarted, and says that it starts.
      huge_pages: see `run_command`.
    """
    if own and huge_pages:
        environment.restart_with_huge_pages()
    with stages.shown(program, header=own):
        environment.prepare()
        yield


def status_of(call: Callable[[], Any]) -> int:
    """Calls `call` and returns the exit status, by the same rules for all commands.

    An integer result is the status. It is 75 for a mapping with a true 'interrupted', 0 for any other result, and 2
    after an error in the input, which is printed. Any other error is a bug, and is raised.
    """
    try:
        result = call()
    except Exception as error:
        if input_errors.reason(error) is None:
            raise
        input_errors.report(error)
        return INTERRUPTED if isinstance(error, peers.JoinError) else USAGE_ERROR
    if type(result) is int:
        return result
    interrupted = isinstance(result, Mapping) and result.get("interrupted")
    return INTERRUPTED if interrupted else 0


def subcommand(doc: str, commands: Mapping[str, str], *, default: str | None = None) -> int:
    """Runs the sub-command that the first argument names, as a program with the remaining arguments.

    Args:
      doc: help text of the command.
      commands: modules by sub-command.
      default: module that runs when the first argument is a flag.

    Returns:
      The exit status: 2 for an unknown sub-command; a sub-command exits with its own status.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if default is not None and name is not None and name.startswith("-"):
        runpy.run_module(default, run_name="__main__", alter_sys=True)
        return 0
    main = sys.modules["__main__"].__spec__
    program = program_name(main.name) if main is not None else os.path.basename(sys.argv[0])
    return _dispatch(program, commands, doc.strip())


def console() -> int:
    """The `espalier` script: `espalier train ...` is `python -m launch.train ...` in a checkout, and `python -m launch` is the script."""
    if not sys.flags.safe_path:  # modules of the working directory come last
        sys.path.append(os.getcwd())
    help_text = f"usage: {CONSOLE} COMMAND [flags]     ({CONSOLE} COMMAND --help for its flags)"
    return _dispatch(CONSOLE, {name: module_of(name) for name in command_names()}, help_text)


def _dispatch(program: str, commands: Mapping[str, str], help_text: str) -> int:
    """Runs the module of the command that the first argument names, or lists the commands."""
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name is not None and name in commands:
        del sys.argv[1]
        runpy.run_module(commands[name], run_name="__main__", alter_sys=True)
        return 0
    if name in (None, "-h", "--help"):
        width = max(map(len, commands))
        lines = [f"  {key:<{width}}  {summary(module)}" for key, module in commands.items()]
        _write_help("\n".join([help_text, "", *lines]))
        return 0 if name else USAGE_ERROR
    from espalier.common import spelling

    print(f"{program}: no command {name!r}; {spelling.nearest(name, commands)}", file=sys.stderr)
    return USAGE_ERROR


def command_names() -> list[str]:
    """Returns the names of the modules and folders here that are commands."""
    folders = [path.parent.name for path in _path("espalier.launch").glob("*/__main__.py")]
    return sorted([*modules_with("espalier.launch", _PROGRAM.pattern), *folders])


def module_of(command: str) -> str:
    """Returns the name of a command's module."""
    module = f"espalier.launch.{command}"
    return f"{module}.__main__" if _path(module).is_dir() else module


def modules_with(package: str, pattern: str) -> list[str]:
    """Returns the names of a package's modules with a match in their source, without importing them."""
    files = sorted(_path(package).glob("*.py"))
    return [f.stem for f in files if re.search(pattern, f.read_text("utf-8"), re.MULTILINE)]


def sub_commands(command: str) -> dict[str, str]:
    """Returns the modules of a command's sub-commands by name, without importing them.

    They are the programs in the folders of launch that give `COMMAND NAME` as their name.
    """
    modules = {}
    for path in pathlib.Path(environment.ROOT, "launch").glob("*/*.py"):
        text = path.read_text("utf-8")
        if (match := re.search(rf'"{command} (\w+)"', text)) and _PROGRAM.search(text):
            modules[match[1]] = f"espalier.launch.{path.parent.name}.{path.stem}"
    return dict(sorted(modules.items()))


def _path(module: str) -> pathlib.Path:
    return pathlib.Path(environment.ROOT, *module.removeprefix("espalier.").split("."))


def summary(module: str) -> str:
    """Returns the first line of a module's docstring, without importing the module."""
    path = _path(module).with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]


def papers_with(pattern: str) -> list[tuple[str, str]]:
    """Returns (paper, module) of the modules of launch/papers/PAPER with a match in their source, without importing them."""
    folders = sorted(pathlib.Path(environment.ROOT, "launch", "papers").iterdir())
    packages = [
        (path.name, f"espalier.launch.papers.{path.name}") for path in folders if path.is_dir()
    ]
    return [
        (paper, f"{package}.{module}")
        for paper, package in packages
        for module in modules_with(package, pattern)
    ]


def _write_help(text: str) -> None:
    """Prints a help text, without an error if its reader, such as `head`, closes the pipe before its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # Python flushes again at its end


class _Parser(argparse.ArgumentParser):
    """A parser that refuses an empty path, which would mean the working directory, or fail after the work.

    It refuses an address where only a folder of this machine can be used: it would become a folder named `gs:`.
    """

    address_flags: Sequence[str] = _ADDRESS_FLAGS

    def print_help(self, file=None):
        if file is None:
            _write_help(self.format_help().rstrip("\n"))
        else:
            super().print_help(file)

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            is_path = action.dest in _PATH_FLAGS or re.search("DIR|FILE|PATH", str(action.metavar))
            values = getattr(parsed, action.dest, None)
            paths = values if isinstance(values, list) else [values]
            flag = "/".join(action.option_strings)
            if is_path and "" in paths:
                self.error(f"argument {flag}: the path is empty")
            # A pathlib.Path has one slash after the colon.
            addresses = [m for p in paths if (m := re.match("(gs|s3):/+(.*)", str(p)))]
            if is_path and flag and addresses and action.dest not in self.address_flags:
                self.error(
                    f"argument {flag}: {'://'.join(addresses[0].groups())} is an address; give a path of this machine"
                )
        return parsed, rest


def take_addresses(parser: argparse.ArgumentParser, *names: str) -> None:
    """Lets more flags of a command, by their names without dashes, be addresses of object stores."""
    if isinstance(parser, _Parser):
        parser.address_flags = (*parser.address_flags, *names)


def make_parser(doc: str, program: str, *, usage: str | None = None) -> argparse.ArgumentParser:
    """Returns a parser with a module's docstring as help text: the first line before the flags, the rest after them."""
    description, _, rest = doc.strip().partition("\n")
    return _Parser(
        prog=program,
        usage=usage,
        description=description,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def program_name(module: str) -> str:
    """Returns the program's name in help texts: `espalier NAME`, or of a module that is no command `python -m MODULE`."""
    module = module.removesuffix(".__main__")
    name = module.removeprefix("espalier.launch.")
    return f"{CONSOLE} {name}" if name != module and "." not in name else f"python -m {module}"


def _add_gin_flags(parser: argparse.ArgumentParser) -> None:
    config = parser.add_argument_group("configuration")
    config.add_argument(
        "--gin_file",
        action="append",
        default=[],
        metavar="FILE",
        help="a gin file: an absolute path, or one relative to this folder, a search path or the root of the repository; "
        "repeatable, and later files win",
    )
    config.add_argument(
        "--gin.NAME",
        dest="_binding",
        metavar="VALUE",
        help="sets the macro or binding NAME last, in gin syntax: --gin.TRAIN_STEPS=100, "
        "--gin.MODEL_DIR='\"/tmp/run\"'; a plain path or name needs no quotes",
    )
    config.add_argument(
        "--gin_search_paths",
        action="append",
        default=[],
        metavar="DIR,DIR",
        help="search relative gin files in these folders too; repeatable",
    )
    processes = parser.add_argument_group("several processes")
    processes.add_argument(
        "--coordinator_address",
        metavar="HOST:PORT",
        help="address of process 0, which all processes connect to; 'auto' on TPU pods, SLURM and Open MPI",
    )
    processes.add_argument(
        "--process_count", type=int, metavar="N", help="number of processes of the run"
    )
    processes.add_argument(
        "--process_index", type=int, metavar="I", help="index of this process, from 0"
    )
    processes.add_argument(
        "--initialization_timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="seconds to wait until all processes have started (default 300)",
    )
    processes.add_argument(
        "--heartbeat_timeout",
        type=int,
        default=100,
        metavar="SECONDS",
        help="seconds without a sign of life after which a process counts as lost and all others end (default 100)",
    )


def read_gin_flags(
    words: Sequence[str],
    program: str,
    extra_flags: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags of a command that gin configures, and its 'NAME=VALUE' bindings.

    Args:
      words: words of its command line.
      program: name for the message of a wrong flag, after which this process ends with status 2.
      extra_flags: see `main`.
    """
    parser = make_parser("", program, usage="--gin_file=FILE [--gin.NAME=VALUE ...]")
    _add_gin_flags(parser)
    extra_flags(parser)
    return _parse(parser, list(words))


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[Any, list[str]]:
    """Returns the flags, and the 'NAME=VALUE' bindings in order."""
    bindings = [a.removeprefix("--gin.") for a in argv if a.startswith("--gin.")]
    flags = parser.parse_args([a for a in argv if not a.startswith("--gin.")])
    for binding in bindings:
        if "=" not in binding:
            parser.error(f"--gin.{binding} needs a value: --gin.{binding}=VALUE")
    processes = [flags.coordinator_address, flags.process_count, flags.process_index]
    complete = None not in processes or processes in ([None] * 3, ["auto", None, None])
    if not complete:
        parser.error(
            "--coordinator_address, --process_count and --process_index go together "
            "(or use only --coordinator_address=auto)"
        )
    return flags, [*(getattr(flags, BINDINGS, None) or ()), *bindings]
