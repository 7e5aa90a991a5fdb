"""Rated responses as pairs, against all pairs of each row written out."""

import itertools

import numpy as np
import pytest

from espalier.data.preference import binarise, records
from espalier.data.rows.records import Tally
from espalier.data.text.documents import DataError

CHAT = [{"role": "assistant", "content": "a"}]


def rated(*ratings, **more):
    row = {"prompt": "p", "responses": [f"{i}" for i in range(len(ratings))], "ratings": [*ratings]}
    return {**row, **more}


def made(*rows, **settings):
    return list(binarise.pairs([(f"line {i}", row) for i, row in enumerate(rows, 1)], **settings))


@pytest.mark.parametrize(("rejected", "expected"), [("worst", "3"), ("next", "0")])
def test_the_best_against_the_worst_or_the_next(rejected, expected):
    (pair,) = made(rated(3, 5, 2.5, 1, 5), rejected=rejected)
    assert (pair["chosen"], pair["rejected"]) == ("1", expected)  # the first of the best two
    assert pair["margin"] == 5 - {"3": 1, "0": 3}[expected]
    assert records.parse(pair, "x", "x").margin == pair["margin"]


def test_a_random_one_is_any_that_is_rated_lower():
    rows = [rated(1, 2, 3, 3)] * 200
    found = made(*rows, rejected="random", seed=1)
    counts = {one: sum(pair["rejected"] == one for pair in found) for one in "0123"}
    assert counts["2"] == counts["3"] == 0 and min(counts["0"], counts["1"]) > 70
    assert found == made(*rows, rejected="random", seed=1) != made(*rows, rejected="random", seed=2)


def test_pairs_are_of_those_that_ratings_order_by_the_margin():
    rng = np.random.default_rng(0)
    rows = [rated(*rng.integers(0, 4, 3).tolist()) for _ in range(60)]
    for rejected, margin in itertools.product(("worst", "random", "next"), (0.0, 2.0)):
        dropped = Tally()
        found = made(*rows, rejected=rejected, min_margin=margin, dropped=dropped)
        expected = []
        for row in rows:
            pairs = itertools.permutations(zip(row["ratings"], row["responses"], strict=True), 2)
            top = max(row["ratings"])
            ordered = [(a, b) for a, b in pairs if a[0] == top > b[0] and a[0] - b[0] >= margin]
            expected += [{(a[1], b[1]) for a, b in ordered}] if ordered else []
        assert len(found) == len(expected)
        for pair, allowed in zip(found, expected, strict=True):
            assert (pair["chosen"], pair["rejected"]) in allowed
        lost = {reason: count["rows"] for reason, count in dropped.items()}
        assert sum(lost.values()) == 60 - len(found)
        assert lost["tie"] == sum(len(set(row["ratings"])) == 1 for row in rows)
        assert ("small_margin" in lost) == (margin > 0)


def test_what_is_dropped_is_counted_with_its_first_place():
    dropped = Tally()
    assert made(rated(2, 1), rated(1, 1), rated(3, 3, 3), dropped=dropped, min_margin=1)
    assert dropped == {"tie": {"rows": 2, "first": "line 2"}}
    assert str(dropped) == "2 tie (first: line 2)"


def test_a_text_answers_messages():
    prompt = [{"role": "user", "content": "q"}]
    (pair,) = made(rated(1, 2, prompt=prompt, tools=[{"x": 1}], model="m"))
    assert pair["chosen"] == [{"role": "assistant", "content": "1"}]
    assert pair["tools"] == [{"x": 1}] and "model" not in pair
    assert records.parse(pair, "x", "x").prompt == tuple(prompt)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "responses": ["a", "b"]}, "line 1: 'ratings' holds nothing.*A row is"),
        ({**rated(1, 2), "responses": "ab"}, "'responses' holds str; it must be a list"),
        (rated(1), "1 responses and 1 ratings; .*at least two"),
        ({**rated(1, 2), "responses": ["a"]}, "1 responses and 2 ratings"),
        (rated(1, None), "None in 'ratings' is not a finite number"),
        (rated(1, True), "True in 'ratings'"),
        (rated(1, float("nan")), "nan in 'ratings'"),
        ({**rated(1, 2), "responses": [None, 5]}, "line 1: 'response 1' is a NoneType; write a"),
        ({**rated(1, 2), "responses": ["a", 5]}, "line 1: 'response 2' is a int; write a text"),
        ({**rated(1, 2), "responses": ["a", [5]]}, "message 1 of 'response 2' is not of the form"),
        ({**rated(1, 2), "responses": ["a", CHAT]}, "response 2 has messages but 'prompt' is a t"),
        ({**rated(1, 2), "prompt": [5]}, "message 1 of 'prompt' is not of the form"),
    ],
)
def test_malformed_rows_are_named(row, message):
    with pytest.raises(DataError, match=message):
        made(row)


def test_settings_are_checked_at_once():
    with pytest.raises(
        ValueError, match="rejected is 'best'; it must be one of 'worst', 'random', 'next'"
    ):
        binarise.pairs([], rejected="best")
    with pytest.raises(ValueError, match="min_margin is -1"):
        binarise.pairs([], min_margin=-1)
