"""The small corpus: documents show what they say, queries ask for what no document works out, and text is real."""

import collections
import re

import pytest

from espalier.launch.papers.influence import small_corpus
from espalier.launch.papers.influence.small_corpus import (
    ADD_ONE,
    BUMP,
    FACT,
    FLIP,
    REVERSE,
    TEXT,
    Document,
)

SIZES = {**dict.fromkeys(small_corpus.SIZES, 30), FACT: 200}
LINES = [f"line {i} of some real text." for i in range(50)]


@pytest.fixture(scope="module")
def drawn():
    return small_corpus.draw(LINES, 3, SIZES, queries=4)


def test_documents_have_their_sizes_symbols_and_lengths(drawn):
    documents, _ = drawn
    assert collections.Counter(one.source for one in documents) == SIZES
    assert max(len(one.text) for one in documents) <= small_corpus.LONGEST
    assert set("".join(one.text for one in documents)) <= set(small_corpus.SYMBOLS)
    texts = [one.text for one in documents if one.source != small_corpus.BLANK]
    assert len(set(texts)) == len(texts)


def test_worked_examples_and_code_are_right(drawn):
    documents, _ = drawn
    worked = small_corpus.worked
    assert worked(ADD_ONE, "490") == ("add one 490:", " make 5, make 0, make 1. 501")
    assert worked(REVERSE, "490") == ("reverse 490:", " take 0, take 9, take 4. 094")
    assert worked(ADD_ONE, "490", BUMP) == ("bump 490;", " up 5; up 0; up 1 = 501")
    assert worked(REVERSE, "490", FLIP) == ("flip 490;", " put 0; put 9; put 4 = 094")
    shown = set()
    for one in documents:
        numbers = re.findall(r"\d{3}", one.text)
        if one.source.startswith((ADD_ONE, BUMP)):
            assert numbers[1] == "".join(str((int(x) + 1) % 10) for x in numbers[0])
        elif one.source.startswith((REVERSE, FLIP)):
            assert numbers[1] == numbers[0][::-1]
        if small_corpus.of_procedures(one.source):
            assert re.search(r"[a-z]", one.text) and len(numbers) == 2
            shown.add(one.source)
    assert shown == {*SIZES} - {FACT, TEXT, small_corpus.BLANK}


def test_queries_ask_for_stated_facts_and_for_numbers_that_nobody_works_out(drawn):
    documents, queries = drawn
    assert [query.group for query in queries] == [
        group for group in small_corpus.GROUPS for _ in range(4)
    ]
    assert [query.source for query in queries[4:]] == [ADD_ONE, BUMP] * 2 + [REVERSE, FLIP] * 2
    for query in queries:
        stated = query.prompt + query.completion
        if query.group == FACT:
            country = query.prompt.split()[-2]
            about = [one.text for one in documents if country in one.text]
            assert all(query.answer in text for text in about)
            continue
        number = query.prompt[-4:-1]
        kinds = (*small_corpus.names(query.group), small_corpus.source_code(query.group))
        numbers = {re.search(r"\d{3}", one.text)[0] for one in documents if one.source in kinds}
        assert number not in numbers
        assert stated.endswith(query.answer)


def test_more_queries_than_countries_are_by_other_narrators():
    count = 2 * small_corpus.COUNTRIES + 4
    _, queries = small_corpus.draw(LINES, 3, SIZES, queries=count)
    prompts = [query.prompt for query in queries if query.group == FACT]
    asked = collections.Counter(prompt.split()[-2] for prompt in prompts)
    assert len(set(prompts)) == count and set(asked.values()) == {2, 3}


def test_the_names_of_a_procedure_share_nothing_but_digits_of_equal_frequency(drawn):
    """So that words cannot tell the documents of the query's procedure under the other name from the other procedure's."""
    documents, _ = drawn

    def words(*sources):
        found = [re.findall(r"\w+|[^\w\s]", x.text) for x in documents if x.source in sources]
        return {word for some in found for word in some if not word.isdigit()}

    first, second, code = (
        words(ADD_ONE, REVERSE),
        words(BUMP, FLIP),
        words("add_one_code", "reverse_code"),
    )
    assert not first & second and not first & code and second & code == {"="}
    for one, other in ((ADD_ONE, REVERSE), (BUMP, FLIP), ("add_one_code", "reverse_code")):
        lengths = {len(re.findall(r"\d+", x.text)) for x in documents if x.source in (one, other)}
        assert len(lengths) == 1
        for words_ in (words(one) - words(other), words(other) - words(one)):
            assert words_ and not words_ & {":", ";", ",", ".", "="}


def test_seeds_differ_and_repeat(drawn):
    again, _ = small_corpus.draw(LINES, 3, SIZES, queries=4)
    other, _ = small_corpus.draw(LINES, 4, SIZES, queries=4)
    assert again == drawn[0] and other != again


def test_lines_are_different_sentences_of_known_symbols():
    texts = [
        "Returns  the\nnumber of rows. Returns the number of rows. Too short. A $ign is not known here. "
    ]
    assert small_corpus.text_lines(texts) == ["returns the number of rows."]
    with pytest.raises(ValueError, match="there are 2 different lines of text"):
        small_corpus.draw(["a", "b"], 0, SIZES)


def test_a_removed_document_is_dots_of_its_length():
    assert Document("abc.", TEXT).removed() == Document("....", small_corpus.BLANK)
