"""Metrics of SeqIO tasks, which texts of launch.generate and sums of launch.score must give too."""

import json

import numpy as np
import pytest

from espalier.data import cpu_tensorflow
from espalier.data.tokenizers import vocabularies

cpu_tensorflow.load()

import seqio  # noqa: E402
import tensorflow as tf  # noqa: E402

NEW = 12
INPUTS = ["def f(x", "import os and more than that", "x", "naïve", "a = "]
TARGETS = [" + 1)", "", "yz", "é", "b"]


def postprocess(text, example, is_target):
    """Depends on what it is given: a target's length goes with it."""
    assert ("inputs" in example) and isinstance(text, str)
    return (text.upper(), len(example["targets"]) if is_target else 0)


def exact(targets, predictions):
    assert [prediction[1] for prediction in predictions] == [0] * len(predictions)
    right = [target[0] == found[0] for target, found in zip(targets, predictions, strict=True)]
    letters = sum(place * len(found[0]) for place, found in enumerate(predictions))
    return {"exact": np.mean(right), "letters": seqio.metrics.Scalar(letters)}


def ranked(targets, scores):
    lengths = [target[1] for target in targets]
    weighted = np.dot(np.arange(len(scores)) + 1, np.asarray(scores))
    return {"weighted": weighted, "per_token": sum(scores) / sum(lengths), "none": float("nan")}


def wants_more(targets, predictions, aux_values):
    return {}


def takes_anything(answers):
    return {}


def shorten(dataset, sequence_length):
    return dataset.map(lambda example: example)


@pytest.fixture
def register():
    """Registers a task over INPUTS and given targets; it is gone after the test."""
    added = []

    def add(name, *, metrics=(exact, ranked), inputs=INPUTS, targets=TARGETS, **options):
        vocabulary = options.pop("vocabulary", vocabularies.byte())
        features = {
            "inputs": seqio.Feature(vocabulary, add_eos=False),
            "targets": seqio.Feature(vocabulary, add_eos=True),
        }
        features.pop(options.pop("without", None), None)
        before, after = options.pop("before", ()), options.pop("after", ())
        assert not options

        def read(split, shuffle_files, seed=None):
            rows = {"inputs": inputs, "targets": targets}
            return tf.data.Dataset.from_tensor_slices(
                {key: tf.constant(rows[key], tf.string) for key in features}
            )

        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(read, splits=("validation", "train")),
            preprocessors=[
                *before,
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos,
                *after,
            ],
            output_features=features,
            postprocess_fn=postprocess,
            metric_fns=list(metrics),
        )
        added.append((seqio.TaskRegistry, name))

    def mixture(name, tasks):
        seqio.MixtureRegistry.add(name, tasks, default_rate=1)
        added.append((seqio.MixtureRegistry, name))

    add.mixture = mixture
    yield add
    for registry, name in added:
        registry.remove(name)


@pytest.fixture
def evaluate(command, trained_run, tmp_path):
    """Evaluates tasks; returns the JSON document and the rows, or the exit status if there are none."""

    def run(*flags):
        report, output = tmp_path / "metrics.json", tmp_path / "rows.jsonl"
        files = (f"--json={report}", f"--output={output}", f"--max_new_tokens={NEW}")
        status = command("evaluate seqio", f"--checkpoint={trained_run.path}", *files, *flags)
        if status:
            assert not report.exists() and not output.exists()
            return status
        rows = [json.loads(line) for line in output.read_text().splitlines()]
        return json.loads(report.read_text()), rows

    return run


@pytest.fixture
def by_command(command, trained_run, tmp_path):
    """Rows that another command makes of rows."""

    def run(name, rows, *flags):
        given, made = tmp_path / f"{name}.in", tmp_path / f"{name}.out"
        given.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = (f"--checkpoint={trained_run.path}", f"--inputs={given}", f"--output={made}")
        assert command(name, *files, *flags) == 0
        return [json.loads(line) for line in made.read_text().splitlines()]

    return run


def ids(text):
    return [byte + 3 for byte in text.encode()]


def test_metrics_are_those_of_continuations_and_sums(evaluate, by_command, register, capsys):
    prompts = [{"text": text} for text in INPUTS]
    texts = [
        row["text"]
        for row in by_command("generate", prompts, f"--max_new_tokens={NEW}", "--temperature=0")
    ]
    targets = [texts[0], texts[1], *TARGETS[2:]]
    pairs = [
        {"tokens": ids(given), "targets": [*ids(target), 1]}
        for given, target in zip(INPUTS, targets, strict=True)
    ]
    sums = [row["sum"] for row in by_command("score", pairs)]
    register("both", targets=targets)
    register("only_scores", metrics=[ranked], targets=targets)

    found, rows = evaluate("--task=both", "--task=only_scores", "--num_examples=4")
    metrics = found["tasks"]["both"]["metrics"]
    right = [a.upper() == b.upper() for a, b in zip(targets, texts, strict=True)][:4]
    assert metrics["exact"] == pytest.approx(np.mean(right)) and 0.5 <= metrics["exact"] < 1
    assert metrics["letters"] == sum(i * len(text.upper()) for i, text in enumerate(texts[:4]))
    tokens = sum(len(pair["targets"]) for pair in pairs[:4])
    assert metrics["per_token"] == pytest.approx(sum(sums[:4]) / tokens, rel=1e-5)
    assert metrics["weighted"] == pytest.approx(np.dot([1, 2, 3, 4], sums[:4]), rel=1e-5)
    assert metrics["none"] == "NaN"
    assert found["tasks"]["only_scores"]["metrics"] == {
        name: pytest.approx(metrics[name]) if name != "none" else "NaN"
        for name in ("weighted", "per_token", "none")
    }
    assert found["tasks"]["both"]["examples"] == 4 and found["split"] == "validation"
    printed = capsys.readouterr().out
    assert f"both, 4 examples\n  exact: {metrics['exact']:.4f}\n" in printed

    assert [row["task"] for row in rows] == ["both"] * 4 + ["only_scores"] * 4
    assert [row["inputs"] for row in rows[:4]] == INPUTS[:4]
    assert [row["targets"] for row in rows[:4]] == targets[:4]
    assert [row["prediction"] for row in rows[:4]] == texts[:4]
    assert "prediction" not in rows[4]
    assert [row["score"] for row in rows] == pytest.approx(sums[:4] * 2, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({}, ["--task=sum"], "--task=sum: no such SeqIO task; did you mean 'sums'?"),
        ({"metrics": ()}, [], "The task 'sums' has no metric functions"),
        ({"metrics": [exact, wants_more]}, [], "is not a function of (targets, predictions) or"),
        ({"metrics": [takes_anything]}, [], "is not a function of (targets, predictions) or"),
        ({}, ["--split=test"], "has no split 'test'; its splits are validation, train."),
        ({"without": "inputs"}, [], "has no feature 'inputs', only targets"),
        ({"without": "targets"}, [], "has no feature 'targets', only inputs"),
        (
            {"inputs": ["a", "", "b", "c", "d"]},
            [],
            "Example 1 of the task 'sums': 'inputs', the pr",
        ),
        (
            {"vocabulary": seqio.ByteVocabulary(5)},
            [],
            "'inputs' of the task 'sums' is encoded with",
        ),
        ({"before": [shorten]}, [], "of the task 'sums' needs a sequence length"),
        ({"inputs": [], "targets": []}, [], "The split 'validation' of the task 'sums' has no"),
        ({}, ["--num_examples=0"], "--num_examples=0 must be at least 1."),
        ({}, ["--max_new_tokens=0"], "--max_new_tokens=0 must be at least 1."),
        ({}, ["--module=there_is_none"], "the module 'there_is_none' of mixtures does not exist"),
    ],
)
def test_what_cannot_be_evaluated_is_one_message(
    evaluate, register, capsys, options, flags, message
):
    register("sums", **options)
    asked = [] if any(flag.startswith("--task") for flag in flags) else ["--task=sums"]
    assert evaluate(*asked, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("error: ") == 1


def test_a_mixture_is_named_by_its_tasks(evaluate, register, capsys):
    register("one")
    register("two")
    register.mixture("pair", ["one", "two"])
    assert evaluate("--task=pair") == 2
    assert "is a mixture: give its tasks, --task=one --task=two" in capsys.readouterr().err


MODULE = """
import seqio
import tensorflow as tf

def read(split, shuffle_files, seed=None):
    return tf.data.Dataset.from_tensor_slices({"inputs": ["a"], "targets": ["b"]})

feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=False)
seqio.TaskRegistry.add(
    "of_a_module",
    source=seqio.FunctionDataSource(read, splits=["test"]),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={"inputs": feature, "targets": feature},
    metric_fns=[lambda targets, scores: {"targets": seqio.metrics.Text(targets[0])}],
)
"""


def test_a_module_registers_tasks(evaluate, tmp_path, monkeypatch):
    (tmp_path / "own_seqio_tasks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        found, _ = evaluate("--module=own_seqio_tasks", "--task=of_a_module", "--split=test")
    finally:
        seqio.TaskRegistry.remove("of_a_module")
    assert found["tasks"] == {"of_a_module": {"examples": 1, "metrics": {"targets": "b"}}}


def test_empty_targets_have_no_score(evaluate, register, capsys):
    def without_eos(dataset):
        return dataset.map(lambda row: {**row, "targets": row["targets"][:-1]})

    register("sums", after=[without_eos])
    assert evaluate("--task=sums") == 2
    assert (
        "Example 1 of the task 'sums': 'targets', the text to score, is empty"
        in capsys.readouterr().err
    )
