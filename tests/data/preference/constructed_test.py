"""Constructed pairs: their order is checked by the scorer, or by the catalogues themselves."""

import sys
import types

import pytest

from espalier.data.preference import constructed, records


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
