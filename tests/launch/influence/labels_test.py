"""The search for answers in equivalent spellings."""

import pytest

from espalier.launch.influence import labels


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (42, "forty-two"),
        (100, "one hundred"),
        (107, "one hundred and seven"),
        (1_000, "one thousand"),
        (2_015, "two thousand and fifteen"),
        (31_999, "thirty-one thousand nine hundred and ninety-nine"),
        (-5, "minus five"),
    ],
)
def test_numbers_in_words(number, words):
    assert labels.in_words(number) == words


@pytest.mark.parametrize(
    ("answer", "text", "present"),
    [
        ("5", "The sum is 5.", True),
        ("5", "the sum is five", True),
        ("5", "it was 5, not 6", True),
        ("5", "15 and 51 and 5.2 and 2.5 and 5,000 and x5", False),
        ("5", "the sum is -5", False),
        ("5", "7-5 and 3 - 5", True),
        ("5", "twenty-five", False),
        ("Rome", "a Rome-based firm", True),
        ("_x", "a_x", False),
        ("-5", "gives \N{MINUS SIGN}5 here", True),
        ("-5", "minus five", True),
        ("-5", "7-5", False),
        ("1000", "about 1,000 people", True),
        ("1000", "one thousand people", True),
        ("1000", "1,000,000", False),
        ("107", "a hundred and seven, one hundred seven", True),
        ("42", "forty two", True),
        ("Mount Everest", "on mount\n  everest's top", True),
        ("Rome", "Romeo", False),
        ("C++", "in c++ and", True),
        (["Paris", "the capital"], "The Capital of France", True),
        ([["8,848", "Everest"]], "Everest has 8,848 metres", True),
        ([["8848", "Everest"]], "Everest is high", False),
    ],
)
def test_an_answer_occurs_in_equivalent_spellings_as_whole_words(answer, text, present):
    assert labels.occurs(labels.normal(text), labels.pattern(answer)) is present


def test_matches_are_the_numbers_of_documents():
    patterns = {"a": labels.pattern("Rome"), "b": labels.pattern("x")}
    got = labels.matches(["in Rome", "", "ROME and x"], patterns)
    assert {key: own.tolist() for key, own in got.items()} == {"a": [0, 2], "b": [2]}
    assert labels.matches([], patterns)["a"].shape == (0,)
    # Patterns that share words, that are no word, and whose first text has several spellings.
    texts = ["x ++ y", "forty two apples", "42 apples", "two apples", "apples, pears"]
    patterns = {0: "++", 1: "42", 2: [["42", "apples"], "pears"], 3: "apples", 4: "two apples"}
    patterns = {key: labels.pattern(value) for key, value in patterns.items()}
    want = {
        key: [i for i, text in enumerate(texts) if labels.occurs(labels.normal(text), own)]
        for key, own in patterns.items()
    }
    assert want == {0: [0], 1: [1, 2], 2: [1, 2, 4], 3: [1, 2, 3, 4], 4: [1, 3]}
    assert {key: own.tolist() for key, own in labels.matches(texts, patterns).items()} == want


@pytest.mark.parametrize("value", [3, [], {}, [[]], [3], [""], "  ", [["a", None]]])
def test_what_cannot_be_searched_is_an_error(value):
    with pytest.raises(ValueError, match="text"):
        labels.pattern(value)


@pytest.mark.parametrize(
    ("prompt", "stated"),
    [
        ("Rome is a city. The city is", True),
        ("Romeo is a man. The city is", False),
        ([{"role": "user", "content": "It is ROME."}, {"role": "assistant"}], True),
        ([{"role": "user", "content": "It is Paris."}], False),
        ([5, 6], True),  # ids are not searched
    ],
)
def test_a_control_states_its_answer(prompt, stated):
    row = {"prompt": prompt, "completion": "c", "kind": "fact", "control": True, "answer": "Rome"}
    if stated:
        assert labels.query(row, "").group == "fact (control)"
        return
    with pytest.raises(labels.RowFileError, match="or remove 'control'"):
        labels.query(row, "q.jsonl, line 1")
    assert labels.query({**row, "control": False}, "").group == "fact"


def test_groups_have_controls_apart():
    def query(**own):
        return labels.Query(prompt="p", completion="c", **own)

    facts, stated = query(kind="fact"), query(kind="fact", control=True)
    assert labels.groups([facts, facts]) == {"fact": [0, 1]}
    assert labels.groups([facts, stated]) == {"fact": [0], "fact (control)": [1]}
    assert labels.groups([stated, stated]) == {"fact (control)": [0, 1]}
    mixed = labels.groups([facts, query(), query(control=True)])
    assert mixed == {"all but controls": [0, 1], "fact": [0], "(control)": [2]}
    assert labels.groups([query(), query()]) == {"all queries": [0, 1]}
