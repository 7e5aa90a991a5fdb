"""What a run tells of its data that it does not read."""

import pytest

from launch.run import run_messages


class Stream:
    """A stream of one source with the given counts."""

    def __init__(self, **counts):
        self.counts = counts

    def summary(self):
        return {"max_length": 128, "lengths": {"targets": 64}, "sources": {"pairs": self.counts}}


CUT = {
    "pairs": 9,
    "records": 1000,
    "prompt_too_long": 0,
    "same_when_truncated": 0,
    "truncated": 0,
    "first": {},
}


def lines(registered=None, data=None, held_out=()):
    return run_messages.data_notices(
        {"tasks": registered or {}}, data or Stream(tokens=1), held_out
    )


def test_nothing_is_told_of_data_that_are_read_whole():
    facts = {"documents": {"train": 3}}
    assert lines({"a": facts}, Stream(**CUT), [Stream(**CUT)]) == []
    assert run_messages.data_notices({}, Stream(images=3)) == []


def test_documents_are_told_by_filter_and_rows_by_reason():
    documents = {
        "Short": {"documents": 1200, "bytes": 2_500_000},
        "C": {"documents": 1, "bytes": 0},
    }
    rows = {
        "identical": {"rows": 3, "first": "x:2"},
        "empty_completion": {"rows": 1, "first": "x:5"},
    }
    facts = {"documents": {"train": 90, "validation": 10}}
    noted = {"invisible_characters": {"rows": 2, "first": "x:9"}}
    found = lines(
        {"a": {**facts, "dropped": documents}, "b": {**facts, "dropped": rows, "noted": noted}}
    )
    assert found == [
        ("dropped", "a: Short 1,200 documents (2.5 MB), C 1 documents (0.0 MB)"),
        (
            "dropped",
            "b: 3 identical (first: x:2), 1 empty_completion (first: x:5), 3.8% of all rows",
        ),
        ("noted", "b: 2 invisible_characters (first: x:9)"),
    ]
    (line,) = lines({"b": {"documents": {"train": 75}, "dropped": rows}})
    assert line[0] == "WARNING" and line[1].endswith("5.1% of all rows")


@pytest.mark.parametrize(("lost", "name"), [(50, "too long"), (51, "WARNING")])
def test_pairs_that_are_too_long_are_told_with_the_remedy(lost, name):
    first = {"prompt_too_long": "x:1", "same_when_truncated": "x:2", "truncated": "x:3"}
    counts = {"prompt_too_long": lost - 10, "same_when_truncated": 10, "truncated": 300}
    (line,) = lines(data=Stream(**{**CUT, **counts, "first": first}))
    assert line[0] == name
    for said in (
        "pairs: of 1,000 pairs, at max_length 128, ",
        f"{lost - 10} ({lost / 10 - 1:.1f}%) dropped, whose prompts leave no room (first: x:1), ",
        "10 (1.0%) dropped, whose completions are the same once they are cut (first: x:2), ",
        "300 (30.0%) cut at their ends (first: x:3)",
        "a larger MAX_LENGTH",
    ):
        assert said in line[1]
    cut = Stream(**{**CUT, "truncated": 1, "first": first})
    assert lines(held_out=[cut])[0][1].startswith("pairs, held out: of 1,000 pairs")


@pytest.mark.parametrize(("lost", "name"), [(2, "too long"), (3, "WARNING")])
def test_prompts_that_are_too_long_are_told_with_the_remedy(lost, name):
    counts = {"prompts": 40 - lost, "records": 40, "prompt_too_long": lost}
    found = lines(data=Stream(**counts, first={"prompt_too_long": "x:7"}))
    said = f"pairs: of 40 prompts, at MAX_PROMPT_LENGTH 64, {lost} ({lost / 40:.1%}) dropped (first: x:7)"
    assert found == [(name, f"{said}; a larger one drops fewer")]
    assert lines(data=Stream(prompts=40, records=40, prompt_too_long=0, first={})) == []


@pytest.mark.parametrize(
    ("policy", "lost", "name", "what"),
    [
        ("drop", 2, "too long", "dropped"),
        ("drop", 3, "WARNING", "dropped"),
        ("truncate", 20, "too long", "cut at their ends"),
    ],
)
def test_documents_that_are_too_long_are_told(policy, lost, name, what):
    class Texts(Stream):
        def summary(self):
            return {**super().summary(), "long_documents": policy}

    data = Texts(records=40, long_records=lost, tokens=9, first={"long_records": "x:7"})
    said = f"at {{'targets': 64}} tokens (TASK_FEATURE_LENGTHS), {lost} ({lost / 40:.1%}) {what} (first: x:7)"
    assert lines(data=data) == [(name, f"pairs: of 40 documents, {said}")]


def test_conversations_that_are_left_out_are_told():
    counts = {"conversations": 9, "records": 10, "rows": 2, "tokens": 90, "loss_tokens": 45}
    lost = {"truncated": 0, "too_long": 1, "nothing_learnt": 0, "first": {"too_long": "x:7"}}
    (line,) = lines(data=Stream(**counts, **lost))
    assert line[0] == "WARNING"
    assert line[1].endswith(
        "at 64 tokens (TASK_FEATURE_LENGTHS), 1 dropped, which are longer (first: x:7)"
    )
