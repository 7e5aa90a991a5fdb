"""What a run tells of its data that it does not read."""

from espalier.launch.run import run_messages


class Stream:
    """A stream with the given notices."""

    def __init__(self, *notices):
        self._notices = list(notices)

    def notices(self):
        return self._notices


def lines(registered):
    return run_messages.data_notices({"tasks": registered}, Stream())


def test_nothing_is_told_of_data_that_are_read_whole():
    assert lines({"a": {"documents": {"train": 3}}}) == []
    assert run_messages.data_notices({}, Stream()) == []


def test_streams_tell_their_own_in_order():
    told = [("chats", "a"), ("too long", "b"), ("WARNING", "c")]
    held_out = [Stream(told[1]), Stream(told[2])]
    assert run_messages.data_notices({}, Stream(told[0]), held_out) == told


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
