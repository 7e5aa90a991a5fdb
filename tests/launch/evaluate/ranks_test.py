"""Accuracies of answer choices, which a ranking of the scores of launch.score must give too."""

import json

import numpy as np
import pytest

YAML = """
templates:
- {name: short, jinja: '{{text}} ||| {{answer_choices[label]}}', answer_choices: n ||| yes ||| maybe,
   metadata: {original_task: true}}
- {name: long, jinja: 'Is {{text}}? ||| {{answer_choices[label]}}', answer_choices: ab ||| c ||| a longer one,
   metadata: {original_task: true}}
- {name: not evaluated, jinja: '{{text}} ||| {{text}}'}
"""
CHOICES = {"short": ["n", "yes", "maybe"], "long": ["ab", "c", "a longer one"]}
PROMPTS = {"short": "{}\n", "long": "Is {}?\n"}
LABELS = [0, 1, 2, 1, 0, 2, 1]


GIN = """
from __gin__ import dynamic_registration
from espalier.data.tokenizers import vocabularies
include 't5x_configs/data/instructions_decoder.gin'
TOKENIZER = ''  # VOCABULARY replaces it
VOCABULARY = @vocabularies.byte()
"""


def ids(text):
    return [byte + 3 for byte in text.encode()]


@pytest.fixture
def folder(tmp_path):
    """Two sets with one file of templates."""
    for name in ("one", "two"):
        (tmp_path / "data" / name).mkdir(parents=True)
        rows = [json.dumps({"text": f"{name} {n}", "label": x}) for n, x in enumerate(LABELS)]
        (tmp_path / "data" / name / "validation.jsonl").write_text("\n".join(rows))
    (tmp_path / "data" / "templates.yaml").write_text(YAML)
    (tmp_path / "data.gin").write_text(GIN)
    return tmp_path


def by_hand(command, checkpoint, folder, name, template):
    """The accuracies of one set and template from the log-probabilities of launch.score."""
    rows = [
        {"tokens": ids(PROMPTS[template].format(f"{name} {n}")), "targets": [*ids(choice), 1]}
        for n in range(len(LABELS))
        for choice in CHOICES[template]
    ]
    source, scored = folder / "rows.jsonl", folder / "scored.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = (f"--checkpoint={checkpoint}", f"--inputs={source}", f"--output={scored}")
    assert command("score", *flags) == 0
    sums = [json.loads(line)["sum"] for line in scored.read_text().splitlines()]
    sums = np.reshape(sums, [len(LABELS), -1])
    tokens = [len(choice) + 1 for choice in CHOICES[template]]
    return {
        "rows": len(LABELS),
        "base_rate": max(np.bincount(LABELS)) / len(LABELS),
        "accuracy": float(np.mean(np.argmax(sums, axis=1) == LABELS)),
        "accuracy_per_token": float(np.mean(np.argmax(sums / tokens, axis=1) == LABELS)),
    }


def ranks(command, checkpoint, folder, held_out, *more):
    settings = (
        f"INSTRUCTIONS_DIR={str(folder / 'data')!r}",
        "TRAIN_SETS={}",
        f"HELD_OUT={held_out}",
        f"tasks.register_instructions.cache_dir={str(folder / 'cache')!r}",
        *more,
    )
    return command(
        "evaluate ranks",
        f"--checkpoint={checkpoint}",
        f"--gin_file={folder / 'data.gin'}",
        *(f"--gin.{setting}" for setting in settings),
        f"--json={folder / 'ranks.json'}",
    )


def test_accuracies_are_those_of_scores(command, trained_run, folder, capsys):
    assert ranks(command, trained_run.path, folder, {"both": ["one", "two"], "first": ["one"]}) == 2
    assert (
        "the set 'one' is in held_out['both'] and in held_out['first']" in capsys.readouterr().err
    )
    assert ranks(command, trained_run.path, folder, {"a": ["one"], "b": ["two"]}) == 0
    report = json.loads((folder / "ranks.json").read_text())
    shown = capsys.readouterr()
    assert "base rate    rows\n" in shown.out and "has no effect" not in shown.err
    assert {each["rows"] for each in report["tasks"].values()} == {len(LABELS)}
    for task, name in (("a", "one"), ("b", "two")):
        expected = {
            template: by_hand(command, trained_run.path, folder, name, template)
            for template in CHOICES
        }
        assert report["tasks"][task]["templates"] == {name: expected}
        for metric in ("accuracy", "accuracy_per_token"):
            middle = np.median([values[metric] for values in expected.values()])
            assert report["tasks"][task][metric] == pytest.approx(middle)
    for metric in ("accuracy", "accuracy_per_token"):
        mean = np.mean([each[metric] for each in report["tasks"].values()])
        assert report[metric] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("{{txt}} ||| {{answer_choices[label]}}", "the row has no field 'txt'; present are 'label', 'text'"),
        ("{{text}} ||| no", "the target 'no' is none of the answer choices 'n', 'yes', 'maybe'"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_fit_its_rows_is_one_error(
    command, trained_run, folder, capsys, wrong, words
):
    file = folder / "data" / "templates.yaml"
    file.write_text(YAML.replace("{{text}} ||| {{answer_choices[label]}}", wrong, 1))
    assert ranks(command, trained_run.path, folder, {"a": ["one"]}) == 2
    error = capsys.readouterr().err
    assert (
        f"{file}, template 'short', {folder / 'data' / 'one'}/validation.jsonl, line 1: " in error
    )
    assert words in error and "Traceback" not in error


def test_a_run_without_held_out_tasks_of_its_form_is_refused(command, trained_run, folder, capsys):
    more = ({"a": ["one"]}, "FORM='encoder_decoder'")
    assert ranks(command, trained_run.path, folder, *more) == 2
    assert "'one_long_score_eval' has form = 'encoder_decoder'" in capsys.readouterr().err
    flags = (f"--checkpoint={trained_run.path}", "--trust_config")
    assert command("evaluate ranks", *flags) == 2
    wanted = (
        "There are no held-out tasks: give --gin_file=t5x_configs/data/instructions_decoder.gin"
    )
    assert wanted in capsys.readouterr().err
