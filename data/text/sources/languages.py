"""Text in the 24 language variants, from packages that ship translations."""

import ast
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator

from espalier.data.text.sources import catalogues, cleaning, environment

GETTEXT_PACKAGES = ("django", "sphinx", "plone.app.locales", "weblate")
PACKAGES = (
    *("django", "sphinx", "gflanguages", "chatterbot-corpus", "mimesis"),
    *("home-assistant-frontend", "plone.app.locales", "weblate"),
)
CHUNK = 8_000  # characters per document where a file is a long list of unrelated sentences


@dataclasses.dataclass(frozen=True)
class Variant:
    """The names of one language variant in the packages."""

    locales: tuple[str, ...]
    script: str
    dialogues: str = ""  # directory of chatterbot-corpus

    @property
    def quotes(self) -> tuple[str, ...]:
        """Directory names in mimesis, which writes `pt-br` for `pt_BR`."""
        return tuple(locale.lower().replace("_", "-") for locale in self.locales)

    @property
    def panels(self) -> tuple[str, ...]:
        """Locale names in Home Assistant, which writes `pt-BR` for `pt_BR`."""
        return tuple(locale.replace("_", "-") for locale in self.locales)


VARIANTS = {
    "ar": Variant(("ar",), "ar_Arab"),
    "cs": Variant(("cs",), "cs_Latn"),
    "nl": Variant(("nl",), "nl_Latn", "dutch"),
    "en": Variant(("en",), "en_Latn", "english"),
    "fr": Variant(("fr",), "fr_Latn", "french"),
    "de": Variant(("de",), "de_Latn", "german"),
    "el": Variant(("el",), "el_Grek"),
    "he": Variant(("he",), "he_Hebr", "hebrew"),
    "hi": Variant(("hi",), "hi_Deva", "hindi"),
    "id": Variant(("id",), "id_Latn", "indonesian"),
    "it": Variant(("it",), "it_Latn", "italian"),
    "ja": Variant(("ja",), "ja_Jpan", "japanese"),
    "ko": Variant(("ko",), "ko_Kore", "korean"),
    "fa": Variant(("fa",), "fa_Arab", "persian"),
    "pl": Variant(("pl",), "pl_Latn"),
    "pt": Variant(("pt", "pt_PT", "pt_BR"), "pt_Latn", "portuguese"),
    "ro": Variant(("ro",), "ro_Latn"),
    "ru": Variant(("ru",), "ru_Cyrl", "russian"),
    "es": Variant(("es",), "es_Latn", "spanish"),
    "tr": Variant(("tr",), "tr_Latn", "turkish"),
    "uk": Variant(("uk", "uk_UA"), "uk_Cyrl", "ukrainian"),
    "vi": Variant(("vi",), "vi_Latn"),
    "zh_hans": Variant(("zh_Hans", "zh_CN", "zh"), "zh_Hans", "chinese"),
    "zh_hant": Variant(("zh_Hant", "zh_TW"), "zh_Hant", "traditionalchinese"),
}


def candidates(env: environment.Environment, name: str) -> Iterator[environment.Candidate]:
    """Yields the documents of one variant: catalogues, articles, dialogues and pages of quotes.

    Each text occurs once per variant, in the first document that contains it, so that no text is in
    both splits.
    """
    variant = VARIANTS[name]
    seen: set[str] = set()
    for id, texts, separator in _collections(env, variant):
        fresh = [text for text in map(str.strip, texts) if text and text not in seen]
        fresh = list(dict.fromkeys(fresh))
        seen.update(fresh)
        if fresh:
            text = cleaning.normalise(separator.join(fresh))
            yield environment.Candidate.of_text(f"lang_{name}/{id}", text)


def sources() -> dict[str, environment.Source]:
    """Returns one source per variant: `lang_ar`, `lang_cs`, ..."""
    return {
        f"lang_{name}": environment.Source(PACKAGES, functools.partial(candidates, name=name))
        for name in VARIANTS
    }


def _collections(
    env: environment.Environment, variant: Variant
) -> Iterator[tuple[str, list[str], str]]:
    """Yields (id, texts, separator) of each document.

    Passages come first, so that deduplication leaves them whole.
    """
    catalogue_texts = (
        catalogues.gettext_texts(env, package, variant.locales) for package in GETTEXT_PACKAGES
    )
    for separator, collections in (
        ("\n\n", (_declarations(env, variant), _dialogues(env, variant))),
        ("\n", catalogue_texts),
        ("\n", (catalogues.home_assistant_texts(env, variant.panels), _quotes(env, variant))),
    ):
        for id, texts in itertools.chain.from_iterable(collections):
            yield id, texts, separator


def _declarations(env, variant: Variant) -> Iterator[tuple[str, list[str]]]:
    """Yields articles of the Universal Declaration of Human Rights, from a text proto of samples."""
    for name, path in env.files("gflanguages", (f"/{variant.script}.textproto",)):
        texts = re.findall(
            r'^[ \t]*(?:tester|specimen_\d+): ("(?:[^"\\\n]|\\.)*")', path.read_text("utf-8"), re.M
        )
        articles = "\n".join(ast.literal_eval(text) for text in texts).splitlines()
        # Short samples are often the beginning of a longer one.
        whole = [a for a in articles if not any(a != other and a in other for other in articles)]
        yield name.removesuffix(".textproto"), whole


def _dialogues(env, variant: Variant) -> Iterator[tuple[str, list[str]]]:
    import yaml

    folder = f"chatterbot_corpus/data/{variant.dialogues}/"
    for name, path in env.files("chatterbot-corpus", (".yml",)):
        if variant.dialogues and name.startswith(folder):
            loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
            turns = yaml.load(path.read_text("utf-8"), Loader=loader)["conversations"]
            yield name.removesuffix(".yml"), ["\n".join(map(str, turn)) for turn in turns]


def _quotes(env, variant: Variant) -> Iterator[tuple[str, list[str]]]:
    for folder in variant.quotes:
        for name, path in env.files("mimesis", (f"mimesis/datasets/{folder}/text.json",)):
            content = json.loads(path.read_text("utf-8"))
            texts = [*content.get("text", ()), *content.get("quotes", ())]
            for index, page in enumerate(_pages(texts)):
                yield f"{name.removesuffix('.json')}/{index}", page


def _pages(texts: list[str]) -> Iterator[list[str]]:
    """Yields a list of texts in consecutive parts of about `CHUNK` characters."""
    page, size = [], 0
    for text in texts:
        page.append(text)
        size += len(text)
        if size >= CHUNK:
            yield page
            page, size = [], 0
    if page:
        yield page
