"""Translated interface texts: gettext catalogues, and the JSON catalogues of Home Assistant."""

import json
import pathlib
import re
from collections.abc import Iterator, Sequence

from espalier.data.text.sources import environment

_CATALOGUE = re.compile(
    r"(?P<folder>.*/locales?)/(?P<locale>[^/]+)/LC_MESSAGES/(?P<domain>.+)\.po$"
)
_HASS = re.compile(r"hass_frontend/static/translations/(?P<folder>.*?)(?P<locale>[^/]+)-\w+\.json$")
# Placeholders, tags and entities: `%(name)s`, `{count}`, `<br>`, `&nbsp;`, `${x}`.
_MARKUP = re.compile(r"%\(\w+\)[a-z]|%[a-z%]|\$?\{[^}]*\}|<[^>]*>|&\w+;|https?://\S+")
MAX_MARKUP_SHARE = 0.3


def gettext_texts(
    env: environment.Environment, package: str, locales: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yields (catalogue, its texts in order) of each catalogue of a package in `locales`.

    Most packages ship no English catalogue. For English, the untranslated messages of the German
    catalogues are then the texts.
    """
    import polib

    package_catalogues = _catalogues(env, package)
    if "en" in locales and not any(locale == "en" for locale, *_ in package_catalogues):
        locales = ("de",)
        texts_of = _messages
    else:
        texts_of = _texts if "en" in locales else _translations
    for locale, folder, domain, path in package_catalogues:
        if locale in locales:
            texts = [text for entry in polib.pofile(str(path)) for text in texts_of(entry)]
            yield f"{folder}/{locale}/{domain}", [text for text in texts if is_prose(text)]


def gettext_pairs(
    env: environment.Environment, package: str, locales: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yields (message, translation) of every entry without a plural, in catalogues in `locales`."""
    import polib

    for locale, *_, path in _catalogues(env, package):
        if locale in locales:
            for entry in polib.pofile(str(path)):
                for text in () if entry.msgid_plural else _translations(entry):
                    if is_prose(entry.msgid) and is_prose(text):
                        yield entry.msgid, text


def _catalogues(
    env: environment.Environment, package: str
) -> list[tuple[str, str, str, pathlib.Path]]:
    """Returns (locale, folder, domain, path) of each catalogue of a package."""
    return [
        (match["locale"], match["folder"], match["domain"], path)
        for name, path in env.files(package, (".po",))
        if (match := _CATALOGUE.match(name))
    ]


def _messages(entry) -> list[str]:
    return [] if entry.obsolete else [entry.msgid, entry.msgid_plural]


def _texts(entry) -> list[str]:
    """Returns the texts that an English catalogue displays: its own wording, or the message."""
    return [] if entry.obsolete else [entry.msgstr or entry.msgid, *entry.msgstr_plural.values()]


def _translations(entry) -> list[str]:
    """Returns the translations of an entry; none if it is untranslated, obsolete or fuzzy."""
    if entry.obsolete or entry.fuzzy:
        return []
    texts = [entry.msgstr, *entry.msgstr_plural.values()]
    return [text for text in texts if text not in (entry.msgid, entry.msgid_plural)]


def home_assistant_texts(
    env: environment.Environment, locales: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """Yields (catalogue, its texts) of the Home Assistant panels in `locales`."""
    paths = {}
    for name, path in env.files("home-assistant-frontend", (".json",)):
        if match := _HASS.match(name):
            paths[match["folder"], match["locale"]] = path
    for (folder, locale), path in sorted(paths.items()):
        if locale not in locales:
            continue
        english = paths.get((folder, "en")) if locale != "en" else None
        untranslated = set(_leaves(_load(english))) if english else set()
        texts = [text for text in _leaves(_load(path)) if text not in untranslated]
        yield f"home-assistant/{folder}{locale}", [text for text in texts if is_prose(text)]


def _load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def _leaves(tree) -> Iterator[str]:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, str):
        yield tree


def is_prose(text: str) -> bool:
    """Returns whether a string is prose: more than one character, and few placeholders and tags."""
    marked = sum(len(match.group()) for match in _MARKUP.finditer(text))
    return len(text.strip()) > 1 and marked <= MAX_MARKUP_SHARE * len(text)
