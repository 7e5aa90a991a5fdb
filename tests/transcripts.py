"""Fenced blocks of the documentation, and whether the code can print what they show.

A block is code in a language that it names, or commands, gin, a list of files, or a transcript. Each line of a transcript is
compared with the string literals of the code: each of its words must be in a literal that the line matches, or be a value: a
number, a path, a name of the code, or a word of the page's own commands and code. So a message that has changed is reported where
a page still shows it, and nothing has to run. What another program prints, and what a model writes, is not compared.
"""

import ast
import collections
import functools
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("espalier", "model", "trainers", "data", "launch")
LANGUAGES = (
    "python",
    "json",
    "yaml",
    "bash",
    "sh",
    "gin",
    "make",
    "dockerfile",
    "mermaid",
    "{toctree}",
)
OUTPUT = ("", "text", "console", "output")  # the other names of blocks
PROMPT = "$ "
# Names of devices, axes, stages, splits, arms and ends of runs, which are values and also words of messages.
VALUES = {"done", "cpu", "data", "fsdp", "expert", "context", "tensor", "init", "compile", "full"}
VALUES |= {"text", "english", "code", "then", "balanced", "files", "generated", "starts"}
VALUES |= {"N"}  # a rate or time that a page does not promise
UNITS = {"s", "min", "h", "GB", "per", "pair", "pairs", "image", "images", "mean"}
OMITTED = "..."  # a line of a transcript, for lines that are not shown

_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1``` *$", re.DOTALL | re.MULTILINE)
_COMMAND = re.compile(
    r"(\$ )?(\.\.\. |\w+=\S+ )*((\.venv[\w-]*/bin/)?(espalier|python3?|pip|pytest|ruff|detect-secrets)|"
    r"make|uv|docker|git|cd|ls|cat|export|source|sbatch|squeue|kubectl|gcloud|gsutil|tensorboard|curl|--[\w.]+)\b"
)
_GIN = re.compile(r"(from|import|include) |[\w./]+ = |#|\.\.\.")
_LISTED = re.compile(r"[├└│─ ]*[\w.*{}<>-]+(/[\w.*{},<>-]*)*(  +\S.*)?")
_PATH = re.compile(
    r"[^\s(]*[/_=\d.@\\]\S*\w"
)  # paths, numbers, settings and names with _, which are values
_BOX = re.compile("[\u2500-\u257f]+")
_SAMPLE = re.compile("sample of .*, continuing ")  # what a model has written follows
# Lines of every run of training; a start that continues one has another `life` before its first step.
_STAGE = re.compile(
    r"^((mesh|data|tokens|epochs|start|estimate)(?=  )|parameters(?= )|(step|held|done)(?= (\d+ of|out at|at) )|"
    r"(loss|time|life|read)(?=: )|\.\.\.$)",
    re.MULTILINE,
)
# Commands after which the page shows what another program prints, or what a model has written.
_OTHERS = re.compile(
    r"\$ (?!(\S*/)?espalier )|\$ (\S*/)?espalier generate (?!.*--output)", re.DOTALL
)
WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_RARE = 8
# Places of a name that is a literal alone: the first word of a line, and a column.
_LABEL = re.compile(r"(?:^ *|(?<=  ))([^\W\d_]+)(?= *$|  )|^([^\W\d_]+)(?=  |:)")
_GAP = "\0"  # in a literal, the place of a value
_FIELD = re.compile(r"\{[\w.!:<>,%+ -]*\}|%[\d.]*[sdfgr]")


class Block(NamedTuple):
    """A fenced block: its page, the line of its first line, its language and its text without indentation."""

    page: str
    line: int
    language: str
    text: str


def pages() -> list[str]:
    """Returns the pages whose blocks are checked; those of results are written by a program."""
    found = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    names = [path.relative_to(ROOT).as_posix() for path in found]
    return [name for name in names if not name.startswith("docs/reproductions/")]


def blocks(page: str) -> Iterator[Block]:
    """Yields the fenced blocks of a page."""
    text = (ROOT / page).read_text("utf-8")
    for match in _FENCE.finditer(text):
        lines = match[3].splitlines()
        body = "\n".join(line.removeprefix(match[1]) for line in lines)
        yield Block(page, text.count("\n", 0, match.start()) + 2, match[2].strip(), body)


def kind(block: Block) -> str:
    """Returns 'code', 'commands', 'gin', 'files' or 'transcript'; 'unknown' for a language that is in no list here."""
    if block.language not in OUTPUT:
        return "code" if block.language in LANGUAGES else "unknown"
    joined = re.sub(r"\\\n\s*", " ", block.text)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    if all(_COMMAND.match(line) for line in lines):
        return "commands"
    if PROMPT in block.text or block.language:
        return "transcript"
    if any(" = " in line for line in lines) and all(_GIN.match(line) for line in lines):
        return "gin"
    if all(_LISTED.fullmatch(line) for line in lines) and re.search(r"/|\.\w", lines[0]):
        return "files"
    return "transcript"


def transcripts(page: str) -> list[Block]:
    """Returns the blocks of a page that show what a command prints."""
    return [block for block in blocks(page) if kind(block) == "transcript"]


def printed_lines(block: Block) -> Iterator[tuple[int, str, str]]:
    """Yields (number of the line in the page, the line, the command before it) of what is printed; commands are left out."""
    command, continued = "", False
    for number, line in enumerate(block.text.splitlines(), block.line):
        if continued or line.startswith(PROMPT):
            command = f"{command}\n{line}" if continued else line
            continued = line.endswith("\\") or command.count("'") % 2 == 1
        elif line.strip() and line.strip() != OMITTED:
            yield number, line, command


def _literals() -> Iterator[str]:
    """Yields names of the code and macros, and string literals but docstrings, with `_GAP` where a value is inserted."""
    for path in (ROOT / "t5x_configs").rglob("*.gin"):
        yield from re.findall("^([A-Z][A-Z_]+) = ", path.read_text("utf-8"), re.MULTILINE)
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            inside = set()
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    yield node.name
                elif isinstance(node, ast.JoinedStr):
                    inside.update(map(id, node.values))
                    yield "".join(_part(value) for value in node.values)
                elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                    inside.add(id(node.value))  # a docstring
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield _FIELD.sub(_GAP, node.value if id(node) not in inside else "")


def _part(value: ast.expr) -> str:
    return value.value if isinstance(value, ast.Constant) else _GAP


class Printable(NamedTuple):
    """What the code can print: patterns by one of their words, and words that are a literal alone."""

    patterns: dict[str, list[list[re.Pattern[str]]]]
    labels: frozenset[str]
    names: frozenset[str]


@functools.cache
def printable() -> Printable:
    """Returns what the code can print."""
    lines = {" ".join(line.split()) for text in _literals() for line in text.split("\n")}
    words = {line: WORD.findall(line) for line in lines}
    counts = collections.Counter(word for found in words.values() for word in set(found))
    patterns = collections.defaultdict(list)
    for line, found in words.items():
        if len(found) > 1 or (found and _GAP in line):
            rarest = min(found, key=lambda word: counts[word])
            patterns[rarest].append(_parts(line))
    alone = {line for line in lines if WORD.fullmatch(line)}
    rare = {word for word in alone if counts[word] <= _RARE}
    return Printable(dict(patterns), frozenset(alone), frozenset(rare))


def _parts(line: str) -> list[re.Pattern[str]]:
    """Returns patterns of the fixed parts of a literal, whose words end where no value follows at once."""
    patterns = []
    for part in filter(str.strip, re.split(f"(?<={_GAP})|(?={_GAP})", line)):
        if part != _GAP:
            fixed = re.escape(part).replace(r"\ ", r"\s+")
            patterns.append((r"(?<!\w)" if part[0].isalnum() else "") + fixed)
            if part[-1].isalnum() and not line.endswith(part + _GAP) and part + _GAP not in line:
                patterns[-1] += r"(?!\w)"
    return [re.compile(pattern) for pattern in patterns]


def _covered(parts: list[re.Pattern[str]], line: str) -> Iterator[tuple[int, int]]:
    """Yields the spans in a line of the fixed parts of a literal, where it has all of them in their order."""
    for first in parts[0].finditer(line):
        spans, place = [first.span()], first.end()
        for part in parts[1:]:
            if (match := part.search(line, place)) is None:
                return
            spans.append(match.span())
            place = match.end()
        yield from spans


def unknown_words(block: Block) -> dict[int, list[str]]:
    """Returns, by line of the page, the words of a transcript that the code cannot print there."""
    shown = list(printed_lines(block))
    known = printable().names | _own_words(block.page) | VALUES
    if block.text.startswith("{"):  # JSON, whose keys are literals
        known |= printable().labels | {"null", "true", "false"}
    boxed = any(_BOX.match(line) for _, line, _ in shown)
    text = _BOX.sub(lambda box: " " * len(box[0]), "\n".join(line for _, line, _ in shown))
    # A line that a page breaks continues with spaces, and a cell of a table in the cell below.
    whole = text.replace("\n", " ") if boxed else re.sub(r"\n(?= )", " ", text)
    covered, start = set(), 0
    for line in whole.split("\n"):
        for word in set(WORD.findall(line)):
            for parts in printable().patterns.get(word, ()):
                for first, last in _covered(parts, line):
                    covered.update(range(start + first, start + last))
        start += len(line) + 1
    plain = _PATH.sub(lambda path: " " * len(path[0]), text)
    result, start, written = {}, 0, False
    for number, line, command in shown:
        part = plain[start : start + len(line)]
        places = {
            match.start(match.lastindex)
            for match in _LABEL.finditer(text[start : start + len(line)])
        }
        lost = []
        for match in WORD.finditer(part):
            label = match.start() in places and match[0] in printable().labels
            if not label and start + match.start() not in covered and match[0] not in known:
                lost.append(match[0])
        start += len(line) + 1
        written = written or bool(_SAMPLE.match(line))
        if lost and not written and not _OTHERS.match(command):
            result[number] = lost
    return result


@functools.cache
def _own_words(page: str) -> frozenset[str]:
    """Returns the words of a page's commands and code, which are names of files, data and runs."""
    texts = []
    for block in blocks(page):
        lines = [line for line in block.text.splitlines() if line.startswith((PROMPT, "  "))]
        texts.append("\n".join(lines) if kind(block) == "transcript" else block.text)
    return frozenset(WORD.findall("\n".join(texts)))


def stages(printed: str) -> list[str]:
    """Returns the first words of the lines that each run of training prints, in their order, and `OMITTED` where it stands."""
    return [match[0] for match in _STAGE.finditer(printed)]


def omitted_stages(block: Block, order: list[str]) -> list[str]:
    """Returns the lines of a run of training that a transcript leaves out without saying so, by their first words.

    `order` has the lines of a real run. Lines of progress may be left out.
    """
    omitted = []
    for session in re.split(r"^(?=\$ )", block.text, flags=re.MULTILINE):
        begin = (
            -1 if session.startswith(PROMPT) and " train " in session.partition("\n")[0] else None
        )
        shown = [stage for stage in stages(session) if stage in (*order, OMITTED)]
        for stage in [*shown, "end"] if len(shown) > 1 else ():
            if stage == OMITTED:
                begin = None
                continue
            place = len(order) if stage == "end" else order.index(stage)
            if stage != "end" or (begin is not None and "done" in order[: begin + 1]):
                omitted += order[begin + 1 : place] if begin is not None else []
            begin = place
    return [stage for stage in omitted if stage not in ("step", "held")]


def other_words(block: Block, printed: str) -> list[str]:
    """Returns words of a transcript's lines of training that no such line of a real run has, and that are no names of the page.

    Lines on the start, the time and the life of a run are left out: their words depend on what happened to the run.
    """
    known = _own_words(block.page) | VALUES | UNITS
    real: dict[str, set[str]] = {}
    for match in _STAGE.finditer(printed):
        line = printed[match.start() :].partition("\n")[0]
        real.setdefault(match[0], set()).update(WORD.findall(line))
    other = []
    for match in _STAGE.finditer(block.text):
        line = _PATH.sub("", block.text[match.start() :].partition("\n")[0])
        if match[0] not in (OMITTED, "start", "time", "life"):
            other += [word for word in WORD.findall(line) if word not in real[match[0]] | known]
    return other
