"""What pages show of the output of commands is what the code prints; see tests/transcripts.py.

Errors of the configuration and the order of what a run of training prints: tests/launch/shown_output_test.py and train_test.py.
"""

import pytest

from tests import transcripts
from tests.transcripts import Block

# Lines that are not compared, by page: the beginning of each, and why.
NOT_COMPARED: dict[str, dict[str, str]] = {}
# Pages whose transcripts are made by another test, exactly.
MADE_BY = {"docs/reference/configuration_errors.md": "tests/launch/shown_output_test.py"}
REMEDY = (
    "Show what the command prints today ('...' stands for lines that are not shown). If the line is text of a model or of another "
    "program, show the command before it ('$ COMMAND'), or add its beginning and a reason to NOT_COMPARED in tests/transcripts_test.py."
)
KINDS = (
    f"Blocks are code in one of {', '.join(transcripts.LANGUAGES)}; or have no language (or text, console, output) and are commands, "
    "gin, a list of files or a transcript. Add a language to LANGUAGES in tests/transcripts.py if a page needs it."
)


@pytest.mark.parametrize("page", transcripts.pages())
def test_a_page_shows_what_the_code_prints(page):
    unknown = [
        f"{page}:{block.line}: a block in {block.language!r}"
        for block in transcripts.blocks(page)
        if transcripts.kind(block) == "unknown"
    ]
    assert not unknown, "\n".join([*unknown, KINDS])
    lines = (transcripts.ROOT / page).read_text("utf-8").splitlines()
    excused = tuple(NOT_COMPARED.get(page, ()))
    lost = [
        f"{page}:{number}: no message of the code has {', '.join(words)}: {lines[number - 1]}"
        for block in transcripts.transcripts(page)
        if page not in MADE_BY
        for number, words in transcripts.unknown_words(block).items()
        if not lines[number - 1].strip().startswith(excused or "\0")
    ]
    assert not lost, "\n".join([*lost, REMEDY])


def test_lines_that_are_not_compared_are_on_their_pages():
    for page, lines in NOT_COMPARED.items():
        text = (transcripts.ROOT / page).read_text("utf-8")
        assert [line for line in lines if line not in text] == []


def block(text, language=""):
    return Block("README.md", 1, language, text)


def test_a_message_that_the_code_no_longer_prints_is_reported():
    shown = """$ espalier train --gin_file=x.gin
mesh       data 1 x fsdp 1 x expert 1 x context 1 x tensor 1 (1 x cpu), rules fsdp
parameters 1,311,232, of which 1,311,232 are trained
held out at step 20: files 3.363 (4.857 bits per byte) nats per token
done at step 20; the run is in /tmp/run
time: init 29 s, compile 6 s, step 3 min, checkpoint 8 s; 75% in steps"""
    assert transcripts.unknown_words(block(shown)) == {}
    changes = {
        "of which": "whereof",
        "held out": "set aside",
        "the run is in": "results lie in",
        "in steps": "busily",
    }
    for number, (now, before) in zip((3, 4, 5, 6), changes.items(), strict=True):
        assert set(transcripts.unknown_words(block(shown.replace(now, before)))) == {number}


def test_what_other_programs_and_models_write_is_not_compared():
    for command in (
        "ls runs",
        "espalier generate --checkpoint=x",
        "espalier generate \\\n  --chat",
    ):
        assert transcripts.unknown_words(block(f"$ {command}\nthe walrus sneezed")) == {}
    told = transcripts.unknown_words(block("$ espalier score --output=x\nthe walrus sneezed"))
    assert told == {2: ["the", "walrus", "sneezed"]}


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("commands", "make venv  # installs\nJAX_PLATFORMS=cpu espalier train \\\n  --gin_file=x"),
        ("gin", "transformer.Block.mlp = @mlp.Mlp\n..."),
        ("files", "runs/text/\n  metrics.jsonl   a row per logged step"),
        ("transcript", "$ ls\nruns"),
        ("transcript", "error: 1 problem in the gin configuration:"),
    ],
)
def test_kinds_of_blocks(kind, text):
    assert transcripts.kind(block(text)) == kind


def test_a_language_must_be_known():
    assert transcripts.kind(block("x", "python")) == "code"
    assert transcripts.kind(block("x", "cobol")) == "unknown"
