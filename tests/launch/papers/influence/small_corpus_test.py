"""The small corpus: documents show what they say, queries ask for what no document works out, and text is real."""

import collections
import re

import pytest

from espalier.launch.papers.influence import small_corpus
from espalier.launch.papers.influence.small_corpus import ADD_ONE, FACT, REVERSE, TEXT, Document

SIZES = {**dict.fromkeys(small_corpus.SIZES, 30), FACT: 200}
LINES = [f"line {i} of some real text." for i in range(50)]


@pytest.fixture(scope="module")
def drawn():
    return small_corpus.draw(LINES, 3, SIZES, queries=5)


def test_documents_have_their_sizes_symbols_and_lengths(drawn):
    documents, _ = drawn
    assert collections.Counter(one.source for one in documents) == SIZES
    assert max(len(one.text) for one in documents) <= small_corpus.LONGEST
    assert set("".join(one.text for one in documents)) <= set(small_corpus.SYMBOLS)
    texts = [one.text for one in documents if one.source != small_corpus.BLANK]
    assert len(set(texts)) == len(texts)


def test_worked_examples_and_code_are_right(drawn):
    documents, _ = drawn
    assert small_corpus.worked(ADD_ONE, "490") == ("add one 490:", " 4 to 5, 9 to 0, 0 to 1. 501")
    assert small_corpus.worked(REVERSE, "490") == (
        "reverse 490:",
        " take 0, take 9, take 4. 094",
    )
    for one in documents:
        numbers = re.findall(r"\d{3}", one.text)
        if one.source.startswith(ADD_ONE):
            assert numbers[1] == "".join(str((int(x) + 1) % 10) for x in numbers[0])
        elif one.source.startswith(REVERSE):
            assert numbers[1] == numbers[0][::-1]


def test_queries_ask_for_stated_facts_and_for_numbers_that_nobody_works_out(drawn):
    documents, queries = drawn
    assert [query.group for query in queries] == [
        group for group in small_corpus.GROUPS for _ in range(5)
    ]
    for query in queries:
        stated = query.prompt + query.completion
        if query.group == FACT:
            country = query.prompt.split()[-2]
            about = [one.text for one in documents if country in one.text]
            assert all(query.answer in text for text in about)
            continue
        number = query.prompt[-4:-1]
        kinds = (query.group, small_corpus.source_code(query.group))
        numbers = {re.search(r"\d{3}", one.text)[0] for one in documents if one.source in kinds}
        assert number not in numbers
        assert stated.endswith(query.answer)


def test_seeds_differ_and_repeat(drawn):
    again, _ = small_corpus.draw(LINES, 3, SIZES, queries=5)
    other, _ = small_corpus.draw(LINES, 4, SIZES, queries=5)
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
