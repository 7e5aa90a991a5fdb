"""The 23 languages of Aya 23 (arXiv 2405.15032): names, codes, scripts and families. All other code reads them here."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from espalier.common import spelling

V = TypeVar("V")

# Code of a writing system -> the scripts of its letters, where these are not the same; all of ISO 15924.
_LETTERS = {
    "Jpan": frozenset({"Hira", "Kana", "Hani"}),
    "Kore": frozenset({"Hang", "Hani"}),
    "Hans": frozenset({"Hani"}),
    "Hant": frozenset({"Hani"}),
}
_WITHOUT_SPACES = frozenset({"Jpan", "Hans", "Hant"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Language:
    """A language.

    Attributes:
      code: of ISO 639-1.
      name: in English.
      iso3: of ISO 639-3, as FLORES writes it.
      family: the branch of its family.
      writing: its writing systems by ISO 15924, the usual one first.
      flores: how FLORES writes it, one code for each of `writing`.
      old: tags that mean the same language, in lower case.
    """

    code: str
    name: str
    iso3: str
    family: str
    writing: tuple[str, ...] = ("Latn",)
    flores: tuple[str, ...] = ()
    old: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.flores:
            codes = tuple(f"{self.iso3}_{system}" for system in self.writing)
            object.__setattr__(self, "flores", codes)

    @property
    def scripts(self) -> frozenset[str]:
        """The scripts of its letters, as Unicode has them: Hira, Kana and Hani for Japanese."""
        return frozenset().union(*(letters(system) for system in self.writing))

    @property
    def has_spaces(self) -> bool:
        """Whether spaces separate its words."""
        return self.writing[0] not in _WITHOUT_SPACES

    @property
    def sources(self) -> tuple[str, ...]:
        """The tasks of data/text that have its text: lang_cs, or lang_zh_hans and lang_zh_hant."""
        if len(self.writing) == 1:
            return (f"lang_{self.code}",)
        return tuple(f"lang_{self.code}_{system.lower()}" for system in self.writing)


def letters(system: str) -> frozenset[str]:
    """Returns the scripts of the letters of a writing system."""
    return _LETTERS.get(system, frozenset({system}))


_ALL = (
    Language(code="ar", name="Arabic", iso3="arb", family="Semitic", writing=("Arab",), old=("ara",)),
    Language(code="zh", name="Chinese", iso3="zho", family="Sinitic", writing=("Hans", "Hant"), old=("cmn", "chi")),
    Language(code="cs", name="Czech", iso3="ces", family="Slavic", old=("cze",)),
    Language(code="nl", name="Dutch", iso3="nld", family="Germanic", old=("dut",)),
    Language(code="en", name="English", iso3="eng", family="Germanic"),
    Language(code="fr", name="French", iso3="fra", family="Romance", old=("fre",)),
    Language(code="de", name="German", iso3="deu", family="Germanic", old=("ger",)),
    Language(code="el", name="Greek", iso3="ell", family="Hellenic", writing=("Grek",), old=("gre",)),
    Language(code="he", name="Hebrew", iso3="heb", family="Semitic", writing=("Hebr",), old=("iw",)),
    Language(code="hi", name="Hindi", iso3="hin", family="Indo-Aryan", writing=("Deva",)),
    Language(code="id", name="Indonesian", iso3="ind", family="Malayo-Polynesian", old=("in",)),
    Language(code="it", name="Italian", iso3="ita", family="Romance"),
    Language(code="ja", name="Japanese", iso3="jpn", family="Japonic", writing=("Jpan",), old=("jp",)),
    Language(code="ko", name="Korean", iso3="kor", family="Koreanic", writing=("Kore",), flores=("kor_Hang",)),
    Language(code="fa", name="Persian", iso3="pes", family="Iranian", writing=("Arab",), old=("fas", "per")),
    Language(code="pl", name="Polish", iso3="pol", family="Slavic"),
    Language(code="pt", name="Portuguese", iso3="por", family="Romance"),
    Language(code="ro", name="Romanian", iso3="ron", family="Romance", old=("rum", "mo")),
    Language(code="ru", name="Russian", iso3="rus", family="Slavic", writing=("Cyrl",)),
    Language(code="es", name="Spanish", iso3="spa", family="Romance"),
    Language(code="tr", name="Turkish", iso3="tur", family="Turkic"),
    Language(code="uk", name="Ukrainian", iso3="ukr", family="Slavic", writing=("Cyrl",)),
    Language(code="vi", name="Vietnamese", iso3="vie", family="Vietic"),
)  # fmt: skip
LANGUAGES = {language.code: language for language in _ALL}


def find(tag: str) -> Language:
    """Returns the language of a tag.

    A tag is an ISO 639 code of two or three letters, also an old one such as iw, or the English name. A script and a
    region may follow: zh-Hant, pt_BR, arb_Arab. Case does not matter.

    Raises:
      ValueError: it is none of the 23 languages.
    """
    language = _found(tag)
    if language is None:
        raise ValueError(f"unknown language {tag!r}; {spelling.nearest(_lower(tag), _by_tag())}")
    return language


def code_of(tag: str) -> str:
    """Returns the code of the language of a tag: pt of pt-BR, he of iw, and of another language than the 23 the tag's first part."""
    language = _found(tag)
    return _first_part(tag) if language is None else language.code


class ByLanguage(Mapping[str, V]):
    """Values by language: a tag without a value of its own, such as pt-BR, has that of the first tag of its language."""

    def __init__(self, values: Mapping[str, V]):
        self._values = dict(values)
        self._of_code: dict[str, V] = {}
        for tag, value in values.items():
            self._of_code.setdefault(code_of(tag), value)

    def __getitem__(self, tag: str) -> V:
        return self._values[tag] if tag in self._values else self._of_code[code_of(tag)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def name_of(tag: str) -> str:
    """Returns the English name of the language of a tag, such as pt-BR; the tag itself for another than the 23."""
    language = _found(tag)
    return tag if language is None else language.name


def of_source(name: str) -> Language | None:
    """Returns the language of a task of data/text, such as lang_cs; None for another task."""
    return next((one for one in _ALL if name in one.sources), None)


def codes(tags: Iterable[str]) -> tuple[str, ...]:
    """Returns the codes of tags, each once; raises the errors of `find`."""
    return tuple(dict.fromkeys(find(tag).code for tag in tags))


def _lower(tag: str) -> str:
    return str(tag).strip().lower()


def _first_part(tag: str) -> str:
    return _lower(tag).replace("-", "_").partition("_")[0]


def _found(tag: str) -> Language | None:
    return _by_tag().get(_lower(tag)) or _by_tag().get(_first_part(tag))


@functools.cache
def _by_tag() -> dict[str, Language]:
    return {
        tag: language
        for language in _ALL
        for tag in (language.code, language.iso3, language.name.lower(), *language.old)
    }
