"""The suite of Aya Expanse on a tiny run, as far as its sets go."""

import json

from espalier.launch.papers.aya_expanse import suite


def test_the_groups_are_the_papers():
    sizes = {group.name: len(group.benchmarks) for group in suite.SUITE.groups}
    assert sizes == {
        **{"xcopa": 11, "xwinograd": 6, "xstorycloze": 10, "global_mmlu": 23},
        **{"global_mmlu_sensitive": 23, "global_mmlu_agnostic": 23, "include": 20, "mgsm": 7},
        **{"flores_into_english_chrf": 22, "flores_from_english_chrf": 22},
    }
    assert set(suite.SUITE.described) == set(suite.SUITE.sources) == set(suite.SUITE.benchmarks)
    tasks = [task.name for task in suite.SUITE.described.values()]
    assert len(set(tasks)) == len(tasks)
    # The languages are folders of the public sets: codes in one, English names in the other.
    assert suite.SUITE.sources["global_mmlu_cs"].configuration == "cs"
    assert suite.SUITE.sources["include_zh"].configuration == "Chinese"
    assert suite.SUITE.sources["include_fa"].configuration == "Persian"


def test_questions_are_evaluated_by_language_and_kind(
    trained_run, tmp_path, command, capsys, monkeypatch
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("COLUMNS", "250")  # of the table
    options = {f"option_{letter}": letter for letter in "abcd"}
    question = {"question": "Q?", **options, "subject": "anatomy", "domain": "STEM"}

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({**question, **row}) + "\n" for row in rows))

    labels = [
        {"answer": "B", "cultural_sensitivity_label": label} for label in ("-", "CS", "-", "CS")
    ]
    write(tmp_path / "eval/global_mmlu/ja/test-0.jsonl", labels)
    write(tmp_path / "eval/global_mmlu/ja/dev-0.jsonl", [labels[0]] * 5)
    write(tmp_path / "eval/include/Greek/test-0.jsonl", [{"answer": 3}])
    write(tmp_path / "eval/include/Greek/validation-0.jsonl", [{"answer": 0}] * 5)
    result = tmp_path / "suite.json"
    flags = [f"--checkpoint={trained_run.path}", "--suite=aya_expanse", f"--json={result}"]
    flags += [f"--data_dir={tmp_path / 'eval'}", "--model_args=batch_tokens=4096,max_length=512"]
    assert command("evaluate harness", *flags) == 0
    found = json.loads(result.read_text())
    assert {name: value["n"] for name, value in found["benchmarks"].items()} == {
        **{"global_mmlu_ja": 4, "global_mmlu_sensitive_ja": 2, "include_el": 1},
    }
    scores = [value["score"] for value in found["benchmarks"].values()]
    assert scores[0] == scores[1] and set(scores) <= {0.0, 1.0}  # all questions are the same
    assert "'CA'" in found["missing"]["global_mmlu_agnostic_ja"]
    assert "CohereLabs/include-base-44" in found["missing"]["include_de"]
    assert "1 of 23 benchmarks" in " ".join(capsys.readouterr().out.split())
