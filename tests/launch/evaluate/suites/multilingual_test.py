"""Questions of Global-MMLU and INCLUDE as the harness's own tasks ask them, and files that are wrong."""

import functools
import json
import os

import pytest

from espalier.launch.evaluate.suites import local_data, multilingual
from espalier.launch.evaluate.suites.local_data import MissingDataError, WrongDataError


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(subject, number, answer, **more):
    options = {f"option_{letter}": f"{letter}{number}" for letter in "abcd"}
    question = {"question": f" {subject} {number}? ", **options, "answer": answer}
    return {"subject": subject, "domain": subject, **question, **more}


def asked(benchmark, folder):
    _, task = benchmark
    return task.settings["custom_dataset"](data_dir=str(folder))["test"]


def harness_contexts(task, folder, sets):
    """The questions of a task of the harness, read from local files, with five examples."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    place = os.path.join(os.path.dirname(lm_eval.tasks.__file__), folder)
    manager = TaskManager(include_path=[place], include_defaults=False)
    rows = functools.partial(multilingual.load, splits=sets)
    changes = {"task": task, "custom_dataset": rows, "dataset_kwargs": {}, "num_fewshot": 5}
    if "include" in folder:  # its examples are drawn from the questions
        changes["fewshot_config"] = {"split": "validation", "sampler": "first_n"}
    loaded = manager.load([{"group": "changed", "task": [changes]}])["tasks"][task]
    return {doc["question"]: loaded.fewshot_context(doc, 5) for doc in loaded.eval_docs}


@pytest.fixture
def data(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv(local_data.VARIABLE, str(tmp_path))
    return tmp_path


def global_mmlu(folder, answer="C"):
    labels = {"cultural_sensitivity_label": "-"}
    write(
        folder / "global_mmlu/fr/dev-0.jsonl",
        [row(s, n, "ABCD"[n % 4], **labels) for s in ("anatomy", "virology") for n in range(5)],
    )
    rows = [
        row("virology", 10, "B", **labels),
        row("anatomy", 11, answer, cultural_sensitivity_label="CS"),
        row("anatomy", 12, "D", cultural_sensitivity_label="CA"),
    ]
    write(folder / "global_mmlu/fr/test-0.jsonl", rows)


def test_global_mmlu_is_asked_as_the_harness_asks_it_after_examples_of_the_subject(data):
    global_mmlu(data)
    documents = asked(multilingual.global_mmlu("fr"), data)
    assert documents["answer"] == [1, 2, 3]
    sets = {
        split: multilingual.source_of(
            "global_mmlu", "CohereLabs/Global-MMLU", split, "question", "fr"
        )
        for split in ("dev", "test")
    }
    for subject, own in (("virology", documents["query"][:1]), ("anatomy", documents["query"][1:])):
        task = f"global_mmlu_full_fr_{subject}"
        assert list(harness_contexts(task, "global_mmlu/full/fr", sets).values()) == own
    assert documents["query"][0].count("Answer: ") == 5


@pytest.mark.parametrize(("kind", "number"), [("sensitive", 11), ("agnostic", 12)])
def test_labelled_questions_are_those_of_their_kind(data, kind, number):
    global_mmlu(data)
    (text,) = asked(multilingual.global_mmlu("fr", kind), data)["query"]
    assert f"\n\nanatomy {number}?\nA. a{number}\n" in text and "virology" not in text


def test_include_is_asked_as_the_harness_asks_it(data):
    # Ten examples, of which the first five would be of another domain than the question.
    pool = [row(domain, n, n % 4) for domain in ("Law", "STEM") for n in range(5)]
    write(data / "include/French/validation-0.jsonl", pool)
    write(data / "include/French/test-0.jsonl", [row("STEM", 10, 3)])
    documents = asked(multilingual.include("fr"), data)
    assert documents["answer"] == [3]
    write(data / "own/French/validation-0.jsonl", pool[5:])
    write(data / "own/French/test-0.jsonl", [row("STEM", 10, 3)])
    sets = {
        split: multilingual.source_of("own", "x/own", split, "question", "French")
        for split in ("validation", "test")
    }
    task = "include_base_44_french_few_shot_en_stem"
    (expected,) = harness_contexts(task, "include/few_shot_en/French", sets).values()
    # The harness's files have no line break after the instruction, and a space before option D.
    expected = expected.replace("STEM.STEM", "STEM.\n\nSTEM").replace("\n D.", "\nD.")
    assert documents["query"] == [expected]


def test_examples_of_other_subjects_follow_where_a_subject_has_too_few(data):
    pool = [row("STEM", 0, 0), *(row("Law", n, n) for n in range(4)), row("STEM", 5, 1)]
    write(data / "include/French/validation.jsonl", pool)
    write(data / "include/French/test.jsonl", [row("STEM", 10, 3), row("Art", 11, 0)])
    texts = asked(multilingual.include("fr"), data)["query"]
    order = [[line for line in text.splitlines() if line.endswith("?")] for text in texts]
    assert order[0] == ["STEM 0?", "STEM 5?", "Law 0?", "Law 1?", "Law 2?", "STEM 10?"]
    assert order[1] == ["STEM 0?", "Law 0?", "Law 1?", "Law 2?", "Law 3?", "Art 11?"]


@pytest.mark.parametrize("answer", ["E", "c", "2", "", 4, -1, True, None, 1.0])
def test_an_answer_that_is_no_option_is_named(data, answer):
    global_mmlu(data, answer)
    with pytest.raises(WrongDataError, match=r"global_mmlu/fr, split test: the answer .* of ' ana"):
        asked(multilingual.global_mmlu("fr"), data)


def test_an_example_without_a_right_option_and_too_few_examples_are_named(data):
    write(data / "include/Greek/test.jsonl", [row("STEM", 1, 0)])
    write(data / "include/Greek/validation.jsonl", [row("STEM", n, 4) for n in range(5)])
    with pytest.raises(WrongDataError, match="include/Greek, split validation: the answer 4 of"):
        asked(multilingual.include("el"), data)
    write(data / "include/Greek/validation.jsonl", [row("STEM", n, 0) for n in range(4)])
    with pytest.raises(WrongDataError, match="split validation has 4 examples, but 5 are needed"):
        asked(multilingual.include("el"), data)


def test_columns_of_other_files_are_refused(data):
    write(data / "include/Greek/test.jsonl", [{"question": "?", "choices": ["a"], "answer": 0}])
    write(data / "include/Greek/validation.jsonl", [row("STEM", n, 0) for n in range(5)])
    with pytest.raises(WrongDataError, match="there is no column 'option_a', but question, choice"):
        asked(multilingual.include("el"), data)


def test_a_missing_language_split_or_kind_is_the_reason(data):
    groups = {
        "global_mmlu": {"fr": multilingual.global_mmlu("fr"), "de": multilingual.global_mmlu("de")},
        "sensitive": {"fr_sensitive": multilingual.global_mmlu("fr", "sensitive")},
    }
    suite = multilingual.suite("x", groups)
    global_mmlu(data)
    assert suite.missing("fr", str(data)) == suite.missing("fr_sensitive", str(data)) == ""
    reason = suite.missing("de", str(data))
    assert f"below {data}/global_mmlu/de" in reason
    assert "hf download --repo-type=dataset CohereLabs/Global-MMLU" in reason
    none = {"cultural_sensitivity_label": "-"}
    write(data / "global_mmlu/fr/test-0.jsonl", [row("anatomy", 1, "A", **none)])
    assert "holds no rows whose 'cultural_sensitivity_label' starts with 'CS'" in suite.missing(
        "fr_sensitive", str(data)
    )
    (data / "global_mmlu/fr/dev-0.jsonl").unlink()
    assert "no dev*.parquet or .jsonl" in suite.missing("fr", str(data))
    with pytest.raises(MissingDataError, match=r"no dev\*"):
        asked(multilingual.global_mmlu("fr"), data)
