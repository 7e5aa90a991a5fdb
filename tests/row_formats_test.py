"""Each example of docs/reference/row_formats.md is accepted by the code that reads such rows."""

import json
import pathlib
import re

import pytest

from espalier.data.aya_expanse import prompts as pool_prompts
from espalier.data.chats import tasks as chats
from espalier.data.languages import parallel
from espalier.data.preference import constructed, records
from espalier.data.prompts import tasks as prompts
from espalier.data.t5.examples import ExampleFiles
from espalier.data.text import code_problems, documents
from espalier.data.tokenizers import vocabularies
from espalier.launch.evaluate import safety
from espalier.launch.evaluate.judges import answers
from espalier.launch.inference.generate import with_prompt_key
from espalier.launch.inference.texts import PROMPT_KEYS
from espalier.launch.influence import labels, outputs
from espalier.launch.prepare import best_of_n

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "reference" / "row_formats.md"


def examples():
    """The rows of each section that shows some, by its title."""
    sections = re.split(r"^###? ", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    shown = {
        section.partition("\n")[0]: re.findall(r"```json\n(.*?)```", section, re.DOTALL)
        for section in sections
    }
    return {title: "".join(blocks).splitlines() for title, blocks in shown.items() if blocks}


def one_by_one(check):
    """A check of a file of rows that checks each row."""
    return lambda path: [check(row, "here") for _, row in documents.read_json_lines(path)]


def inputs_with_targets(path):
    source = ExampleFiles.find(
        name="examples",
        files=str(path),
        validation_files=None,
        validation_fraction=0.0,
        on_bad_row="error",
        data_root=None,
        cache_dir=path.parent,
        vocabulary=vocabularies.byte(),
        keys=("inputs", "targets"),
        inputs_eos=True,
    )
    return [
        example
        for piece in source.pieces("train")
        for example in source.read_examples(piece, "train")
    ]


def texts(row, _):
    assert len(with_prompt_key(row).keys() & set(PROMPT_KEYS)) == 1
    return row


def pairs_of_ratings(path):
    return list(constructed.of_ratings(placed(path), seed=0))


def placed(path):
    return [("here", row) for _, row in documents.read_json_lines(path)]


CHECKS = {
    "Documents": lambda path: list(documents.read(path, documents.Format())),
    "Conversations, completions, texts": one_by_one(lambda row, where: chats.parse(row, where, "")),
    "Preference pairs": one_by_one(lambda row, where: records.parse(row, where, "")),
    "Rated responses": pairs_of_ratings,
    "Prompts": one_by_one(lambda row, where: prompts._record(row, where, "")),
    "Inputs with targets": inputs_with_targets,
    "Texts to continue or score": one_by_one(texts),
    "Influence queries": one_by_one(labels.query),
    "Answers": one_by_one(lambda row, where: answers.answer(row, where, True)),
    "Prompts with labels": lambda path: safety.read(placed(path), answered=False),
    "Samples to rank": lambda path: [
        row for group in best_of_n.grouped(placed(path)) for row in group
    ],
    "Prompts for teachers": lambda path: pool_prompts.read(placed(path)),
    "Programming problems and solutions": lambda path: code_problems.load(path).problems,
    "Aligned texts": lambda path: parallel.read(str(path), ["cs"])["cs"],
    "Influence scores": lambda path: list(outputs.read_rows(str(path))),
}


def test_every_section_with_rows_is_checked():
    assert examples().keys() == CHECKS.keys()


@pytest.mark.parametrize("title", CHECKS)
def test_the_rows_that_are_shown_are_accepted(title, tmp_path):
    lines = examples()[title]
    assert all(isinstance(json.loads(line), dict) for line in lines)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert len(CHECKS[title](path)) == len(lines)
