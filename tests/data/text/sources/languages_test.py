"""The 24 language variants: from packages made for the test, and from the installed ones."""

import json

import pytest

from espalier.data.text.sources import catalogues, environment, languages, names

PO = """
msgid ""
msgstr "Language: de\\n"

msgid "Hello"
msgstr "Hallo Welt"

msgid "Same"
msgstr "Same"

#, fuzzy
msgid "Doubtful"
msgstr "Zweifelhaft"

msgid "%(count)s thing on a long table"
msgid_plural "%(count)s things on a long table"
msgstr[0] "%(count)s Sache liegt auf dem Tisch"
msgstr[1] "%(count)s Sachen liegen auf dem Tisch"

msgid "Only markup"
msgstr "<b>%(a)s</b> {b}"

#~ msgid "Old"
#~ msgstr "Veraltet"
"""
ENGLISH = "Hello\nSame\nDoubtful\n%(count)s thing on a long table\n%(count)s things on a long table\nOnly markup\n"
PACKAGES = {
    "django": {
        "django/conf/locale/de/LC_MESSAGES/django.po": PO,
        "django/contrib/x/locale/de/LC_MESSAGES/django.po": PO + 'msgid "New"\nmsgstr "Neu hier"\n',
        "django/conf/locale/nds/LC_MESSAGES/django.po": PO,
    },
    "gflanguages": {
        "gflanguages/data/languages/de_Latn.textproto": (
            'sample_text {\n  tester: "Jeder Mensch hat das Recht"\n  poster_sm: "Mensch"\n'
            '  specimen_36: "Jeder Mensch hat das Recht auf \\"Leben\\".\\nZweiter Artikel."\n}\n'
        )
    },
    "chatterbot-corpus": {
        "chatterbot_corpus/data/german/a.yml": (
            "conversations:\n- - Wie geht es?\n  - Gut.\n- - Wie geht es?\n  - Gut.\n- - Ja?\n  - 7\n"
        )
    },
    "mimesis": {
        "mimesis/datasets/de/text.json": json.dumps(
            {"text": ["Ein Satz.", "Hallo Welt"], "quotes": ["Ein Zitat."], "words": ["Wort"]}
        )
    },
    "home-assistant-frontend": {
        "hass_frontend/static/translations/de-0a1b.json": json.dumps(
            {"a": {"b": "Ein Licht", "c": "OK"}, "d": "{x}"}
        ),
        "hass_frontend/static/translations/en-99ff.json": json.dumps(
            {"a": {"b": "A light", "c": "OK"}}
        ),
        "hass_frontend/static/translations/config/de-77.json": json.dumps({"e": "Einstellung"}),
    },
}


def _documents(env, name):
    return {candidate.id: candidate.read() for candidate in languages.candidates(env, name)}


def test_german_from_every_package(fake_environment):
    documents = _documents(fake_environment(PACKAGES), "de")
    assert documents == {
        "lang_de/gflanguages/data/languages/de_Latn": (
            'Jeder Mensch hat das Recht auf "Leben".\n\nZweiter Artikel.\n'
        ),
        "lang_de/chatterbot_corpus/data/german/a": "Wie geht es?\nGut.\n\nJa?\n7\n",
        "lang_de/django/conf/locale/de/django": (
            "Hallo Welt\n%(count)s Sache liegt auf dem Tisch\n%(count)s Sachen liegen auf dem Tisch\n"
        ),
        # What stood in an earlier catalogue is not repeated, here or in the quotes.
        "lang_de/django/contrib/x/locale/de/django": "Neu hier\n",
        "lang_de/home-assistant/de": "Ein Licht\n",
        "lang_de/home-assistant/config/de": "Einstellung\n",
        "lang_de/mimesis/datasets/de/text/0": "Ein Satz.\nEin Zitat.\n",
    }


def test_english_is_the_messages_of_another_catalogue(fake_environment):
    documents = _documents(fake_environment(PACKAGES), "en")
    assert documents["lang_en/django/conf/locale/de/django"] == ENGLISH
    assert documents["lang_en/home-assistant/en"] == "A light\nOK\n"


def test_long_lists_of_sentences_are_cut_into_pages(fake_environment):
    sentences = [f"Satz Nummer {i:05d}." for i in range(2000)]
    files = {"mimesis/datasets/nl/text.json": json.dumps({"text": sentences})}
    documents = _documents(fake_environment({"mimesis": files}), "nl")
    assert [line for text in documents.values() for line in text.splitlines()] == sentences
    sizes = [len(text) for text in documents.values()]
    assert len(sizes) > 3 and max(sizes) < 1.2 * languages.CHUNK


@pytest.mark.parametrize(
    "text, prose",
    [
        ("Hallo", True),
        ("x", False),
        ("%(a)s", False),
        ("{a}: {b}", False),
        ("Zeile {a} von 20", True),
    ],
)
def test_strings_that_are_mostly_placeholders_are_no_prose(text, prose):
    assert catalogues.is_prose(text) == prose


def test_without_packages_every_variant_is_empty(fake_environment):
    env = fake_environment({})
    for name in languages.VARIANTS:
        assert _documents(env, name) == {}
        assert env.versions(names.SOURCES[f"lang_{name}"].packages) == {}


# Letters that a text in the language surely has and in the others of this list has not.
LETTERS = {
    "el": "λ",
    "he": "ל",
    "hi": "क",
    "ja": "の",
    "ko": "다",
    "uk": "ї",
    "vi": "ữ",
    "fa": "پ",
    "pl": "ł",
}
LETTERS |= {"zh_hans": "们", "zh_hant": "們", "ru": "ы", "ro": "ă", "cs": "ě", "tr": "ğ", "ar": "ة"}


@pytest.fixture(scope="module")
def installed():
    env = environment.Environment.current()
    found = env.versions(languages.PACKAGES)
    wanted = languages.PACKAGES[:5]
    if missing := [name for name in wanted if name not in found]:
        pytest.skip(f"text packages are not installed: {', '.join(missing)}")
    return {name: "".join(_documents(env, name).values()) for name in languages.VARIANTS}


def test_all_24_variants_have_text_when_the_packages_are_installed(installed):
    assert len(installed) == 24
    for name, text in installed.items():
        assert len(text.encode()) > 18_000, name


@pytest.mark.parametrize("name", LETTERS)
def test_variants_are_in_their_language(installed, name):
    counts = {other: text.count(LETTERS[name]) / len(text) for other, text in installed.items()}
    assert max(counts, key=counts.get) == name
    assert counts[name] > 5e-4
