"""The small corpus: documents show what they say, queries ask for what no document works out, and text is real."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from espalier.launch.papers.influence import scoring, small_corpus, statistics
from espalier.launch.papers.influence.small_corpus import (
    ADD_ONE,
    FACT,
    GULP,
    PLUG,
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
    assert worked(ADD_ONE, "490", PLUG) == ("plug 490;", " fig 5; fig 0; fig 1 = 501")
    assert worked(REVERSE, "490", GULP) == ("gulp 490;", " gif 0; gif 9; gif 4 = 094")
    shown = set()
    for one in documents:
        numbers = re.findall(r"\d{3}", one.text)
        if one.source.startswith((ADD_ONE, PLUG)):
            assert numbers[1] == "".join(str((int(x) + 1) % 10) for x in numbers[0])
        elif one.source.startswith((REVERSE, GULP)):
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
    assert [query.source for query in queries[4:]] == [ADD_ONE, PLUG] * 2 + [REVERSE, GULP] * 2
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
        words(PLUG, GULP),
        words("add_one_code", "reverse_code"),
    )
    assert not first & second and not first & code and second & code == {"="}
    for one, other in ((ADD_ONE, REVERSE), (PLUG, GULP), ("add_one_code", "reverse_code")):
        lengths = {len(re.findall(r"\d+", x.text)) for x in documents if x.source in (one, other)}
        assert len(lengths) == 1
        for words_ in (words(one) - words(other), words(other) - words(one)):
            assert words_ and not words_ & {":", ";", ",", ".", "="}


def test_the_names_of_a_procedure_share_no_letter():
    """So that a model of characters cannot tell by them either; those of the other names are the same letters in another order."""

    def letters(*sources):
        return {sign for one in sources for sign in "".join(small_corpus._WORKED[one])} - {*" {}"}

    assert not letters(ADD_ONE, REVERSE) & letters(PLUG, GULP)
    texts = [
        "".join(small_corpus.worked(one, "111", name))
        for one, name in ((ADD_ONE, PLUG), (REVERSE, GULP))
    ]
    counts = [collections.Counter(re.sub(r"\d", "", text)) for text in texts]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("symbols", "tolerance"), [("[^0-9]", 1e-9), (".", 0.03)])
def test_lexical_scores_of_characters_know_no_procedure_in_other_words(symbols, tolerance):
    """Letters and signs alone tell nothing; with digits, little."""
    sizes = {**dict.fromkeys(small_corpus.SIZES, 90), ADD_ONE: 300, REVERSE: 300}
    lines = [f"line {'i' * i} of some real text."[: small_corpus.LONGEST] for i in range(90)]
    documents, queries = small_corpus.draw(lines, 3, sizes)

    def shown(text):
        return "".join(re.findall(symbols, text))

    scores = scoring.lexical_scores(
        [dataclasses.replace(one, text=shown(one.text)) for one in documents],
        [
            dataclasses.replace(one, prompt=shown(one.prompt), completion=shown(one.completion))
            for one in queries
        ],
    )["bm25_characters"]
    areas = statistics.separation(scores, documents, queries)[statistics.OTHER_WORDS]
    assert np.mean([*areas.values()]) == pytest.approx(0.5, abs=tolerance)


def test_answers_of_procedures_are_results_of_the_other_procedure_alone():
    documents, queries = small_corpus.draw(
        LINES, 3, {**SIZES, FACT: 1500, ADD_ONE: 900, REVERSE: 900}
    )
    holds = statistics.holds(documents, queries)
    for q, query in enumerate(queries):
        sources = {documents[i].source for i in np.flatnonzero(holds[:, q])}
        if query.group == FACT:
            assert sources == {FACT}
        else:
            own = {*small_corpus.names(query.group), small_corpus.source_code(query.group)}
            assert not sources & own
    some = holds.any(0).reshape(len(small_corpus.GROUPS), -1).mean(1)
    assert some[0] == 1 and (some[1:] > 0.7).all()


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
