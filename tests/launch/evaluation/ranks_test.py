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
        "accuracy": float(np.mean(np.argmax(sums, axis=1) == LABELS)),
        "accuracy_per_token": float(np.mean(np.argmax(sums / tokens, axis=1) == LABELS)),
    }


def ranks(command, checkpoint, folder, held_out):
    settings = (
        f"INSTRUCTIONS_DIR={str(folder / 'data')!r}",
        "TRAIN_SETS={}",
        f"HELD_OUT={held_out}",
        "VOCABULARY=@vocabularies.byte()",
        f"tasks.register_instructions.cache_dir={str(folder / 'cache')!r}",
    )
    return command(
        "evaluate ranks",
        f"--checkpoint={checkpoint}",
        "--gin_file=t5x_configs/data/instructions_decoder.gin",
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


def test_a_run_without_held_out_tasks_is_refused(command, trained_run, folder, capsys):
    flags = (f"--checkpoint={trained_run.path}", "--trust_config")
    assert command("evaluate ranks", *flags) == 2
    assert "There are no held-out tasks: give --gin_file=" in capsys.readouterr().err
