"""The 23 languages of Aya 23 (arXiv 2405.15032): names, codes, scripts and families. All other code reads them here."""

import dataclasses
import functools
from collections.abc import Iterable

from espalier.common import spelling

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
    text = str(tag).strip().lower()
    language = _by_tag().get(text) or _by_tag().get(text.replace("-", "_").partition("_")[0])
    if language is None:
        raise ValueError(f"unknown language {tag!r}; {spelling.nearest(text, _by_tag())}")
    return language


def name_of(tag: str) -> str:
    """Returns the English name of the language of a tag, such as pt-BR; the tag itself for another than the 23."""
    try:
        return find(tag).name
    except ValueError:
        return tag


def of_source(name: str) -> Language | None:
    """Returns the language of a task of data/text, such as lang_cs; None for another task."""
    return next((one for one in _ALL if name in one.sources), None)


def codes(tags: Iterable[str]) -> tuple[str, ...]:
    """Returns the codes of tags, each once; raises the errors of `find`."""
    return tuple(dict.fromkeys(find(tag).code for tag in tags))


@functools.cache
def _by_tag() -> dict[str, Language]:
    return {
        tag: language
        for language in _ALL
        for tag in (language.code, language.iso3, language.name.lower(), *language.old)
    }
