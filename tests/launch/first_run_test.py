"""docs/start/first_run.md runs as shown, with a smaller model and fewer updates, and prints lines like those of the page."""

import pathlib
import re
import shlex

import pytest

from espalier.data import tasks

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "start" / "first_run.md"
SMALL = ["--gin.config.TransformerConfig.embed_dim=16", "--gin.config.TransformerConfig.mlp_dim=16"]
FEWER = {
    "TRAIN_STEPS=400": "TRAIN_STEPS=4",
    "PERIOD=100": "PERIOD=2",
    "LOG_PERIOD=50": "LOG_PERIOD=1",
    "'targets': 128": "'targets': 32",
    "BATCH_SIZE=16": "BATCH_SIZE=8",
    "max_new_tokens=60": "max_new_tokens=4",
}
OMITTED = "..."  # a line of the page for lines that it does not show
STOPPED = ("WARNING", "stopped by")  # what a signal makes a run print
ERROR = "error: a vocabulary of"


def blocks(language):
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands():
    """The words of every command of the page but the first, in order."""
    text = PAGE.read_text(encoding="utf-8").replace("\\\n", " ")
    words = [
        shlex.split(line) for line in re.findall(r"^(?:\$ )?espalier (.*)$", text, re.MULTILINE)
    ]
    return [[fewer(word) for word in line] for line in words]


def fewer(word):
    for shown, less in FEWER.items():
        word = word.replace(shown, less)
    return word


def shown_lines():
    """The lines of output that the page shows, but for what a model writes, a signal causes, and the rows of starts."""
    texts = [line for block in blocks("") for line in block.splitlines()]
    written = {
        after
        for before, after in zip(texts, texts[1:], strict=False)
        if before.startswith("$ espalier generate")
    }
    return [
        line
        for line in texts
        if line not in written and not line.startswith(("$ ", "2026", ERROR, OMITTED, *STOPPED))
    ]


def form(line):
    """A line without its numbers, times, digests, widths of columns and folders."""
    for pattern, name in (
        (r"\b[0-9a-f]{12}\b", "DIGEST"),
        (r"\S*runs/", "runs/"),
        (r"\b\d[\d,.]*\b", "N"),
        (r"\bN (s|min|h)\b", "TIME"),
        (r"[━─]+|\s+", " "),
    ):
        line = re.sub(pattern, name, line)
    return line.strip()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the file of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    (make_stories,) = blocks("python")
    exec(compile(make_stories, "make_stories.py", "exec"), {"__name__": "__main__"})
    return tmp_path


def test_a_first_run_is_trained_resumed_evaluated_and_compared(folder, command, capsys):
    train, *others = commands()
    assert train[0] == "train" and [words[0] for words in others].count("train") == 1
    first = [word.replace("TRAIN_STEPS=4", "TRAIN_STEPS=3") for word in [*train, *SMALL]]
    assert command(*first, "--gin.VOCAB_SIZE=5000", "--gin.MODEL_DIR=runs/large") == 2
    (shown,) = (x for block in blocks("") for x in block.splitlines() if x.startswith(ERROR))
    assert form(shown) in [form(line) for line in capsys.readouterr().err.splitlines()]
    printed = []
    for words in (first, [*train, *SMALL], *others):
        assert command(*words) == 0, capsys.readouterr().err
        tasks.clear()
        printed += [form(line) for line in capsys.readouterr().out.splitlines()]
    assert [line for line in shown_lines() if form(line) not in printed] == []
    assert (folder / "report" / "report.html").is_file()
