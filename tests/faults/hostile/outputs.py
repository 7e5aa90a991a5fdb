"""The row about outputs that are devices, pipes, links or folders, and about files that others put beside them."""

import functools
import json
import os
import pathlib
import stat
import threading
from collections.abc import Callable, Iterator

from tests.faults import calls
from tests.faults.hostile import checkpoint
from tests.faults.table import Bench, Case, Lost, NotTried, Row, Silent, Unclear

_ROWS = [{"tokens": [1, 2, 3]}, {"tokens": [4, 5]}]
_COMMANDS: dict[str, tuple[str, ...]] = {
    "score": ("--batch_size=2",),
    "generate": ("--max_new_tokens=2", "--batch_size=2"),
}
_VICTIM = "of another user"


def _null(folder: pathlib.Path) -> pathlib.Path:
    """Makes a device that takes anything, in the folder of the case alone."""
    path = folder / "device"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except OSError as error:
        raise NotTried(f"devices need root: {error}") from None
    return path


def _link(folder: pathlib.Path, target: str, *, exists: bool) -> pathlib.Path:
    if exists:
        (folder / target).write_text("old")
    (folder / "link").symlink_to(target)
    return folder / "link"


def _chain(folder: pathlib.Path) -> pathlib.Path:
    _link(folder, "target", exists=True)
    (folder / "chain").symlink_to("link")
    return folder / "chain"


def _planted(folder: pathlib.Path, name: str) -> pathlib.Path:
    (folder / "victim").write_text(_VICTIM)
    (folder / name).symlink_to("victim")
    return folder / "out.jsonl"


def _hard_link(folder: pathlib.Path) -> pathlib.Path:
    (folder / "victim").write_text(_VICTIM)
    os.link(folder / "victim", folder / "out.jsonl.partial")
    return folder / "out.jsonl"


# What an output is: the path, made in an empty folder.
_WRITTEN: dict[str, Callable[[pathlib.Path], pathlib.Path]] = {
    "a new file": lambda folder: folder / "out.jsonl",
    "a link to a file": lambda folder: _link(folder, "target", exists=True),
    "a link to nothing yet": lambda folder: _link(folder, "target", exists=False),
    "a chain of links": _chain,
    "a device": _null,
    "beside a planted link": lambda folder: _planted(folder, "out.jsonl.partial"),
    "beside a planted hard link": _hard_link,
}
_REFUSED: dict[str, Callable[[pathlib.Path], pathlib.Path]] = {
    "a folder": lambda folder: folder,
    "in no folder": lambda folder: folder / "none" / "out.jsonl",
    "in a file": lambda folder: _link(folder, "target", exists=True) / "out.jsonl",
    "a link to itself": lambda folder: _link(folder, "link", exists=False),
    "a name of 5,000 letters": lambda folder: folder / ("x" * 5000),
    "a name with a zero byte": lambda folder: folder / "a\0b",
}


def _cases(seed: int) -> Iterator[Case]:
    del seed
    for command in _COMMANDS:
        for name, make in _WRITTEN.items():
            yield Case(f"{command} to {name}", functools.partial(_written, command, make))
        for name, make in _REFUSED.items():
            yield Case(f"{command} to {name}", functools.partial(_refused, command, make))
        yield Case(f"{command} to a pipe", functools.partial(_piped, command))


def _flags(command: str, bench: Bench, output: os.PathLike) -> list[str]:
    inputs = bench.folder / "in.jsonl"
    inputs.write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    model = checkpoint.write(bench.folder / "hf")
    return [
        f"--checkpoint={model}",
        f"--inputs={inputs}",
        f"--output={output}",
        *_COMMANDS[command],
    ]


def _run(command: str, bench: Bench, output: os.PathLike) -> None:
    status, text = calls.call(command, _flags(command, bench, output))
    if status:
        raise Unclear(f"status {status}: ...{text[-400:]}")


def _rows(text: str) -> None:
    if len(rows := text.splitlines()) != len(_ROWS) or not all(map(json.loads, rows)):
        raise Lost(f"{len(rows)} rows of {len(_ROWS)} are written")


def _written(command: str, make: Callable[[pathlib.Path], pathlib.Path], bench: Bench) -> None:
    folder = bench.folder / "place"
    folder.mkdir()
    output = make(folder)
    before = output.lstat().st_mode if os.path.lexists(output) else stat.S_IFREG
    _run(command, bench, output)
    if stat.S_IFMT(output.lstat().st_mode) != stat.S_IFMT(before):
        raise Lost(f"{output.name} is another kind of file now")
    if not stat.S_ISCHR(before):
        _rows(output.read_text())
    victim = folder / "victim"
    if victim.exists() and victim.read_text() != _VICTIM:
        raise Lost("a file that a planted link names is overwritten")
    if left := [path.name for path in folder.iterdir() if path.name.endswith(".partial")]:
        raise Silent(f"left {left}")


def _refused(command: str, make: Callable[[pathlib.Path], pathlib.Path], bench: Bench) -> None:
    folder = bench.folder / "place"
    folder.mkdir()
    calls.refused(command, _flags(command, bench, make(folder)))


def _piped(command: str, bench: Bench) -> None:
    pipe, texts = bench.folder / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: texts.append(pipe.read_text()), daemon=True)
    reader.start()
    _run(command, bench, pipe)
    reader.join(10)
    if not texts or not stat.S_ISFIFO(pipe.lstat().st_mode):
        raise Lost("the reader of the pipe has got nothing")
    _rows(texts[0])


ROWS = (
    Row(
        30,
        "outputs that are devices, pipes, links or folders, with planted files beside them",
        "written where they lead, or refused; nothing else is changed",
        _cases,
        sample=3,
    ),
)
