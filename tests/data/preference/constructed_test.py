"""Pairs that are made: of rated responses, against all pairs of each row; constructed ones, against scorers and catalogues."""

import itertools
import sys
import types

import numpy as np
import pytest

from espalier.data.preference import constructed, records
from espalier.data.tasks import Tally
from espalier.data.text.documents import DataError


class Sums:
    """As reasoning-gym's sets are, with scorers that give what they give: 1, something, or 0."""

    def __init__(self, size, seed, base):
        self._items = [
            {"question": f" {i + seed} + {base}?\n", "answer": f"{i + seed + base}"}
            for i in range(size)
        ]

    def __getitem__(self, index):
        return self._items[index]

    def score_answer(self, answer, entry):
        if answer == entry["answer"]:
            return 1.0
        return 0.1 if answer.isdigit() else 0.0


class Words(Sums):
    def __init__(self, size, seed, base):
        self._items = [
            {"question": "q", "answer": "a b c"},
            *[{"question": "q", "answer": ""}] * size,
        ]

    def score_answer(self, answer, entry):
        return 1.0  # whatever is answered: no pair can be made


@pytest.fixture
def gym(monkeypatch):
    sets = {"sums": (Sums, 10), "more": (Sums, 500), "words": (Words, 0)}

    def create(name, size, seed):
        kind, base = sets[name]
        return kind(size, seed, base)

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create))


def test_right_answers_against_altered_ones(gym):
    rows = list(constructed.reasoning(limit=9, seed=3, problems=("sums", "more", "words")))
    sources = [row["source"] for row in rows]
    assert sources == [f"constructed/reasoning_gym/{name}" for name in ("sums", "more")] * 3
    for row in rows:
        record = records.parse(row, "x", "x")
        question = record.prompt.removesuffix("?\nAnswer:").split(" + ")
        right, wrong = (int(one) for one in record.completions)
        assert sum(map(int, question)) == right != wrong and row["rejected_score"] == 0.1
    again = list(constructed.reasoning(limit=9, seed=3, problems=("sums", "more", "words")))
    assert rows == again
    assert len(list(constructed.reasoning(limit=3, seed=3, problems=("sums",)))) == 3


def test_results_of_sums_and_products_against_wrong_ones():
    rows = list(constructed.arithmetic(limit=10_000, seed=3))
    assert len(rows) == len({row["prompt"] for row in rows}) == 48 * 48 + 48 * 8
    for row in rows:
        assert row["prompt"].startswith(constructed.WORKED)
        left, sign, right, equals = row["prompt"].removeprefix(constructed.WORKED).split()
        result = {"+": int.__add__, "*": int.__mul__}[sign](int(left), int(right))
        assert (row["chosen"], equals) == (f" {result}", "=") and row["source"]
        assert 0 < abs(int(row["rejected"]) - result) <= 10
    signs = [row["prompt"].split()[-3] for row in rows[:6]]
    assert signs == ["+", "*"] * 3
    assert rows[:9] == list(constructed.arithmetic(limit=9, seed=3))
    assert rows[:9] != list(constructed.arithmetic(limit=9, seed=4))


def test_without_the_package_it_is_told_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(constructed.MissingPackageError, match="pip install reasoning-gym"):
        constructed.reasoning(limit=1)


def catalogue(**texts):
    return "".join(f'msgid "{message}"\nmsgstr "{text}"\n\n' for message, text in texts.items())


FILES = {
    "django/conf/locale/de/LC_MESSAGES/django.po": catalogue(Save="Sichern", Yes="Ja", OK="OK")
    + 'msgid "Day"\nmsgid_plural "Days"\nmsgstr[0] "Tag"\nmsgstr[1] "Tage"\n\n'
    + '#, fuzzy\nmsgid "Back"\nmsgstr "Hinten"\n',
    "django/conf/locale/fr/LC_MESSAGES/django.po": catalogue(Save="Enregistrer", Back="Retour"),
    "django/conf/locale/zh_Hans/LC_MESSAGES/django.po": catalogue(Open="\u6253\u5f00"),
    "django/conf/locale/zh_Hant/LC_MESSAGES/django.po": catalogue(Open="\u6253\u958b"),
    "django/conf/locale/eo/LC_MESSAGES/django.po": catalogue(Save="Konservi", Yes="Jes"),
}


def test_messages_in_the_language_asked_for_against_another(fake_environment):
    environment = fake_environment({"django": FILES})
    rows = list(constructed.translations(limit=100, environment=environment))
    found = {(row["prompt"], row["chosen"], row["rejected"]) for row in rows}
    # Not of what one language has alone, in two forms, in doubt, or in both scripts of Chinese.
    assert found == {
        ("Translate into German: Save\nTranslation:", " Sichern", " Enregistrer"),
        ("Translate into French: Save\nTranslation:", " Enregistrer", " Sichern"),
    }
    (row,) = constructed.translations(limit=1, environment=environment)
    assert row == rows[0] and row["source"] == "constructed/gettext"
    assert {row["language"], row["rejected_language"]} == {"de", "fr"}


def test_installed_catalogues_hold_what_the_pairs_say():
    """Django's own, read by the standard library's gettext."""
    import gettext

    django = pytest.importorskip(
        "django", reason="the catalogues of Django, which the tests install"
    )
    rows = list(constructed.translations(limit=400, seed=1))
    assert len({row["prompt"] for row in rows}) == 400
    read = {
        language: gettext.translation(
            "django", f"{django.__path__[0]}/conf/locale", languages=[language]
        )
        for language in ("de", "fr", "ru")
    }
    checked = 0
    for row in rows:
        message = row["prompt"].partition(": ")[2].removesuffix("\nTranslation:")
        for text, language in (
            (row["chosen"], row["language"]),
            (row["rejected"], row["rejected_language"]),
        ):
            own = read[language].gettext(message) if language in read else message
            if own != message:
                assert text == f" {own}"
                checked += 1
    assert checked > 3
    assert all(row["chosen"] != row["rejected"] for row in rows)


CHAT = [{"role": "assistant", "content": "a"}]


def rated(*ratings, **more):
    row = {"prompt": "p", "responses": [f"{i}" for i in range(len(ratings))], "ratings": [*ratings]}
    return {**row, **more}


def made(*rows, **settings):
    return list(
        constructed.of_ratings([(f"line {i}", row) for i, row in enumerate(rows, 1)], **settings)
    )


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
        constructed.of_ratings([], rejected="best")
    with pytest.raises(ValueError, match="min_margin is -1"):
        constructed.of_ratings([], min_margin=-1)
