"""Branches that are trained apart and merged, round after round, as a sweep."""

import ast
import json

import pytest
import yaml

from espalier.launch.merge import config_file, start
from espalier.launch.sweep import file

FILE = {
    "start": "/runs/seed",
    "gin_files": ["model.gin", "run.gin"],
    "branches": {"code": ["MIXTURE_OR_TASK_NAME='a'"], "pages": ["MIXTURE_OR_TASK_NAME='b'"]},
    "updates": 10,
    "rounds": 2,
}


@pytest.fixture
def sweep(tmp_path):
    def runs(**changes):
        settings = {key: x for key, x in {**FILE, **changes}.items() if x is not None}
        (tmp_path / "rounds.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        found = file.read(f"launch/sweep/rounds.py:{tmp_path / 'rounds.yaml'}")
        return {run.arm: run for run in found}

    return runs


def merge_of(run):
    """The MERGE that a branch begins with."""
    (text,) = (x.removeprefix("MERGE=") for x in run.bindings if x.startswith("MERGE="))
    return ast.literal_eval(text)


def test_a_branch_goes_on_from_itself_with_the_parameters_of_the_merge(sweep):
    arms = sweep()
    assert list(arms) == ["code1", "pages1", "merged1", "code2", "pages2", "merged2"]
    assert "INITIAL_CHECKPOINT_PATH='/runs/seed'" in arms["code1"].bindings
    second = arms["pages2"]
    assert second.parent == "pages1/seed0" and second.gin_files[-1].endswith("averaging/merge.gin")
    assert {"TRAIN_STEPS=20", "INITIAL_SCOPE='state'"} <= {*second.bindings}
    assert dict(second.made_of) == {"code1": "code1/seed0", "pages1": "pages1/seed0"}
    merge = merge_of(second)
    assert start.first_model(merge=merge) == "{code1}"
    # The merge that is written is the one that branches begin with.
    word = next(x for x in arms["merged1"].made if x.startswith("--config="))
    assert json.loads(word.removeprefix("--config=")) == merge
    assert [x["model"] for x in merge["models"]] == ["{code1}", "{pages1}"]
    assert merge["parameters"] == {"weight": 1.0}
    (read,) = config_file.read(word.removeprefix("--config="))
    assert read.method == "linear" and read.models() == ["{code1}", "{pages1}"]


def test_a_method_with_a_base_takes_the_merge_before(sweep):
    arms = sweep(rounds=3, merge={"merge_method": "ties", "parameters": {"density": 0.5}})
    first, second = merge_of(arms["code2"]), merge_of(arms["code3"])
    assert (first["base_model"], second["base_model"]) == ("/runs/seed", "{merged1}")
    assert second["parameters"] == {"weight": 1.0, "density": 0.5}
    assert {*arms["code3"].made_of} == {"code2", "pages2", "merged1"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": 0}, "updates is 0, and must be a int"),
        ({"start": None}, "start is None"),
        ({"round": 2}, "unknown key 'round'; did you mean"),
        ({"branches": {"code": []}}, "branches has 1"),
        (
            {"merge": {"merge_method": "ties", "models": []}},
            "merge.models: the branches are merged",
        ),
        ({"branches": {"a": [], "a1": []}, "rounds": 11}, "names of branches .* are equal"),
        ({"merge": {"merge_method": "slerp"}}, "slerp does not merge 2 branches"),
        ({"merge": {"merge_method": "mean"}}, "merge.merge_method must be one of linear"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(sweep, changes, message):
    with pytest.raises(file.SweepError, match=message):
        sweep(**changes)


def test_a_branch_that_is_written_twice_is_refused(tmp_path):
    path = tmp_path / "rounds.yaml"
    path.write_text("branches: {code: [A=1], pages: [A=2], code: [A=3]}\n")
    with pytest.raises(file.SweepError, match="line 1: 'code' occurs twice"):
        file.read(f"launch/sweep/rounds.py:{path}")
