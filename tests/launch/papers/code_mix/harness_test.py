"""A suite on a tiny run: what is there is scored, what is missing is named, and the means follow."""

import json
import shutil

import pytest

from espalier.launch.evaluate import harness
from espalier.launch.papers.code_mix.suite import SUITE

MISSING = ("story_cloze", "hellaswag")


@pytest.fixture
def results(tmp_path):
    """Writes what launch.evaluate code --json writes."""

    def write(name, score):
        path = tmp_path / f"{name}.json"
        found = {"problems": name, "num_problems": 20, "pass_at_k": {"1": score}}
        path.write_text(json.dumps(found))
        return f"--code_results={path}"

    yield write


def test_a_suite_is_evaluated_as_far_as_its_data_go(
    trained_run, data_dir, tmp_path, command, capsys, monkeypatch, results
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    sets = tmp_path / "sets"
    shutil.copytree(data_dir, sets, ignore=shutil.ignore_patterns(*MISSING))
    flags = [
        f"--checkpoint={trained_run.path}",
        "--suite=code_mix",
        f"--data_dir={sets}",
        f"--json={tmp_path / 'suite.json'}",
        f"--samples={tmp_path / 'samples.jsonl'}",
        "--model_args=batch_tokens=8192,max_length=512",
        results("humaneval", 0.25),
        results("mbpp", 0.05),
    ]
    assert command("evaluate harness", *flags) == 0
    found = json.loads((tmp_path / "suite.json").read_text())
    by_name = found["benchmarks"]
    assert sorted(found["missing"]) == sorted(MISSING)
    assert {name: value["n"] for name, value in by_name.items()} == {
        **dict.fromkeys(["boolq", "piqa", "quac", "copa", "arc_easy"], 2),
        **dict.fromkeys(["sciq", "social_iqa", "cb", "winogrande", "trivia_qa", "nq_open"], 1),
        **dict.fromkeys(["humaneval", "mbpp"], 20),
    }
    # A score follows from the model's own answers.
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    for name, by_bytes in (("piqa", True), ("boolq", False)):
        right = 0
        for sample in samples:
            if sample["task"] == f"code_mix_{name}":
                sizes = [len(choice) if by_bytes else 1 for choice in sample["doc"]["choices"]]
                values = [
                    float(answer[0][0]) / size
                    for answer, size in zip(sample["resps"], sizes, strict=True)
                ]
                right += values.index(max(values)) == sample["doc"]["gold"]
        assert by_name[name]["score"] == right / by_name[name]["n"]
    knowledge = (by_name["trivia_qa"]["score"] + by_name["nq_open"]["score"]) / 2
    assert found["groups"] == {"reasoning": None, "knowledge": knowledge, "code": 0.15}
    assert found["total"] is None
    shown = " ".join(capsys.readouterr().out.split())
    assert "9 of 11 benchmarks" in shown and "25.0" in shown and "15.0" in shown


def test_the_groups_of_the_harness_are_unweighted_means(data_dir, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("ESPALIER_EVAL_DATA", str(data_dir))
    manager = TaskManager(include_path=SUITE.tasks, include_defaults=False)
    found = simple_evaluate("dummy", tasks=["code_mix"], task_manager=manager, bootstrap_iters=0)
    for group in SUITE.groups[:-1]:
        scores = [found["results"][f"code_mix_{name}"]["score,none"] for name in group.benchmarks]
        mean = found["groups"][f"code_mix_{group.name}"]["score,none"]
        assert mean == pytest.approx(sum(scores) / len(scores))


def test_arguments_of_the_model_are_those_of_the_harness():
    mesh = "mesh={'fsdp': 2, 'tensor': 2},batch_tokens=64"
    assert harness._model_args(mesh) == {"mesh": {"fsdp": 2, "tensor": 2}, "batch_tokens": 64}
    with pytest.raises(harness.SuiteError, match="params is a flag of this command: give --params"):
        harness._model_args("params=ema")
    with pytest.raises(harness.SuiteError, match="--model_args=dtype: expected `key=value`"):
        harness._model_args("dtype")


def test_without_any_set_every_benchmark_is_named(trained_run, tmp_path, command, capsys):
    flags = f"--checkpoint={trained_run.path}", "--suite=code_mix", f"--data_dir={tmp_path}"
    assert command("evaluate harness", *flags) == 2
    said = capsys.readouterr().err
    assert "There is no evaluation set" in said
    assert "hellaswag: no validation*" in said and "humaneval: espalier evaluate code" in said


def test_code_results_of_another_form_are_refused(tmp_path, results):
    (tmp_path / "other.json").write_text("{}")
    made_with = (str(tmp_path / "run" / "10"), "ema")
    with pytest.raises(harness.SuiteError, match="is not a file of espalier evaluate code --json"):
        harness.code_results([str(tmp_path / "other.json")], *made_with)
    twice = [results("mbpp", 0.5).partition("=")[2]] * 2
    with pytest.raises(harness.SuiteError, match="another file has results of mbpp too"):
        harness.code_results(twice, *made_with)
    assert harness.code_results(twice[:1], *made_with) == {"mbpp": {"score": 0.5, "n": 20}}


def test_code_results_of_another_checkpoint_are_refused(tmp_path):
    path = tmp_path / "mbpp.json"
    settings = {"checkpoint": str(tmp_path / "run" / "10"), "params": "ema"}
    found = {"problems": "mbpp", "num_problems": 20, "pass_at_k": {"1": 0.5}, "settings": settings}
    path.write_text(json.dumps(found))
    own, other = (str(tmp_path / "run" / step) for step in ("10", "20"))
    assert harness.code_results([str(path)], own, "ema")["mbpp"]["score"] == 0.5
    with pytest.raises(harness.SuiteError, match="is of the checkpoint .*, not of "):
        harness.code_results([str(path)], other, "ema")
    with pytest.raises(harness.SuiteError, match="made with --params=ema, .* have --params=raw"):
        harness.code_results([str(path)], own, "raw")
