"""LongBench's prompts, scores and settings, without a model."""

import json

import pytest

from espalier.launch.evaluate.suites import local_data
from espalier.launch.lm_eval import arguments
from espalier.launch.load.load_run import LoadError
from espalier.launch.papers.snapkv import experiment, suite
from espalier.launch.papers.snapkv.harness_tasks import scores, tasks
from espalier.launch.sweep import file
from espalier.model.kv_cache.policies import policy_from_text


def test_the_harness_has_every_task_with_the_suites_limits(monkeypatch, tmp_path):
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv(local_data.VARIABLE, str(tmp_path))
    (tmp_path / "longbench").mkdir()
    row = {"context": "A {b}.", "input": "Who?", "answers": ["B", "C"], "all_classes": ["B"]}
    for name in suite.TASKS:
        (tmp_path / "longbench" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        (tmp_path / "longbench" / f"{name}_e.jsonl").write_text("another benchmark\n")
    manager = TaskManager(include_path=suite.SUITE.tasks, include_defaults=False)
    loaded = manager.load([f"snapkv_{name}" for name in suite.TASKS])["tasks"]
    assert len(loaded) == 16
    for name, task in suite.TASKS.items():
        config = loaded[f"snapkv_{name}"].config
        assert config.generation_kwargs["max_gen_toks"] == task.new_tokens
        assert task.prompt.count("{context}") == 1 and hasattr(scores, task.score)
    (document,) = loaded["snapkv_trec"].test_docs()
    assert document["query"].endswith("examples of questions.\n\nA {b}.\nWho?")
    assert tasks.score(document, ["\nB\nC"]) == {"score": 1.0}  # the first line alone
    with pytest.raises(local_data.MissingDataError, match=r"qasper.jsonl.*data.zip"):
        tasks.load(benchmark="qasper", data_dir=str(tmp_path / "elsewhere"))


def test_scores_at_known_values():
    assert scores.f1("The cat sat.", "a cat sat down") == pytest.approx(2 * 2 / (2 + 3))
    assert scores.f1("", "cat") == 0
    # The longest common subsequence of "a b c d" and "a c e" is "a c": precision 2 / 4, recall 2 / 3.
    assert scores.rouge_l("a b c d", "a c e") == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    classes = ["city", "Other city", "state"]
    assert scores.classification("It is Other city", "Other city", classes) == 1
    assert scores.classification("city or state", "state", classes) == 0.5
    assert scores.classification("none", "state", classes) == 0
    assert scores.count("7, or 8 or 7", "7") == pytest.approx(2 / 3)
    assert scores.retrieval("Paragraph 12", "Paragraph 12") == 1
    assert scores.retrieval("Paragraph 1", "Paragraph 12") == 0
    assert scores.code_similarity("\n# a comment\nreturn x\nmore", "return x") == 1
    assert scores.code_similarity("", "return x") == 0


def test_long_prompts_lose_their_middle():
    cut = arguments.cut_of("middle")
    assert cut(list(range(10)), 5) == [0, 1, 2, 8, 9]
    assert cut(list(range(10)), 1) == [0]
    assert cut([1, 2], 5) == [1, 2]
    assert arguments.cut_of("beginning")(list(range(10)), 3) == [7, 8, 9]
    with pytest.raises(LoadError, match="cut=end must be one of beginning, middle"):
        arguments.cut_of("end")


def test_the_full_size_evaluations_are_the_papers():
    runs = file.read(f"{experiment.__file__}:full,/data")
    assert [run.arm for run in runs][2:] == [
        "mistral_7b_instruct_v0p2",
        "mixtral_8x7b_instruct_v0p1",
    ]
    for run in runs:
        assert set(run.evaluations) == {
            "full",
            "snapkv_1024",
            "snapkv_2048",
            "snapkv_4096",
            "h2o_4096",
        }
        for evaluation in run.evaluations.values():
            (words,) = (w for w in evaluation["command"] if w.startswith("--model_args="))
            values = dict(
                pair.split("=") for pair in words.removeprefix("--model_args=").split(",")
            )
            settings = arguments.policy_settings(
                {name: value for name, value in values.items() if name.startswith("cache_")},
                known={"cache_policy": None},
            )
            settings.pop("policy", None)
            policy = policy_from_text(values["cache_policy"], settings)
            if values["cache_policy"] == "snapkv":
                assert (policy.window, policy.kernel, policy.pooling) == (32, 7, "max")
