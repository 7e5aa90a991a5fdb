"""Instructions in the 23 languages from installed packages, in the four groups of Aya 23's mixture, for small models.

  human/dialogues        questions and answers of chatterbot-corpus, written by people
  templated/translate    messages of Django and Sphinx, to be translated from English and into it
  translated/complete    the same messages in the language, to be completed: sets that were translated by people
  synthetic/repeat       the first, the last or all words of a message, by a program; of Chinese and Japanese characters

Prompts of templated sets are in English with the name of the language, as in many templates of xP3.
"""

import functools
import json
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from espalier.common import files
from espalier.common.ranges import Size
from espalier.data.cache import cache_dir as cache
from espalier.data.cache import fingerprint
from espalier.data.languages import parallel, table
from espalier.data.text import splits
from espalier.data.text.sources import catalogues, cleaning, environment
from espalier.data.text.sources import languages as packaged_text

PACKAGES = ("django", "sphinx", "chatterbot-corpus")
SETS = {
    "human": ["dialogues"],
    "templated": ["translate"],
    "translated": ["complete"],
    "synthetic": ["repeat"],
}
MANIFEST = "manifest.json"
_MAX_LETTERS = 160  # of a message; longer ones do not fit a small model's row
_MIN_WORDS = 4  # of a message to be completed
Row = dict[str, Any]


def assemble(
    *,
    languages: Sequence[str] | None = None,
    rows: Size = 500,
    cache_dir: str | os.PathLike | None = None,
    env: environment.Environment | None = None,
) -> str:
    """Writes the sets as files for `data.aya23.mixture`, unless they are there, and returns their directory.

    Args:
      languages: codes; None for all 23.
      rows: the most of a set in a language, the first by the hashes of their texts.
      cache_dir: root of the caches; default $ESPALIER_CACHE or ~/.cache/espalier.
      env: the environment whose packages are read; default the current one.

    Raises:
      ValueError: an unknown language, or no package with translations is installed.
    """
    env = env or environment.Environment.current()
    codes = table.codes(table.LANGUAGES if languages is None else languages)
    key = fingerprint.of_json([codes, rows, env.versions(PACKAGES), _code_digest()])[:16]
    folder = cache.cache_dir("instructions", key, override=cache_dir)
    if (folder / MANIFEST).is_file():
        return str(folder)

    def build(target: pathlib.Path) -> None:
        counts: dict[str, dict[str, int]] = {}
        messages = parallel.of_packages(codes, env)
        for code in codes:
            for path, made in _sets(code, messages[code], env).items():
                chosen = _first(made, rows)
                if chosen:
                    _write(target / path / f"{code}.jsonl", chosen)
                    counts.setdefault(path, {})[code] = len(chosen)
        record = {"rows": counts, "packages": env.versions(PACKAGES)}
        files.write_json(target / MANIFEST, record, synced=False)  # build_directory syncs it

    cache.build_directory(folder, build, expected=[MANIFEST])
    print(f"instructions of installed packages written to {folder}", file=sys.stderr, flush=True)
    return str(folder)


@functools.cache
def _code_digest() -> str:
    """Returns the hash of the code that reads, cleans and chooses."""
    texts = (catalogues.__file__, cleaning.__file__, environment.__file__, packaged_text.__file__)
    others = (parallel.__file__, splits.__file__, table.__file__)
    return fingerprint.of_code(pathlib.Path(file) for file in (__file__, *texts, *others))


def _sets(
    code: str, messages: Sequence[tuple[str, str]], env: environment.Environment
) -> dict[str, list[Row]]:
    """Returns {group/set: its rows} of a language."""
    short = [pair for pair in messages if max(map(len, pair)) <= _MAX_LETTERS]
    texts = list(dict.fromkeys(text for _, text in short))
    return {
        "human/dialogues": list(_dialogues(code, env)),
        "templated/translate": [] if code == "en" else list(_translations(code, short)),
        "translated/complete": [row for text in texts for row in _completions(code, text)],
        "synthetic/repeat": [row for text in texts for row in _repetitions(code, text)],
    }


def _row(code: str, prompt: str, answer: str) -> Row:
    messages = [("user", prompt), ("assistant", answer)]
    return {
        "messages": [
            {"role": role, "content": cleaning.normalise(text).strip()} for role, text in messages
        ],
        "language": code,
    }


def _dialogues(code: str, env: environment.Environment) -> Iterator[Row]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for source in table.LANGUAGES[code].sources:
        variant = packaged_text.VARIANTS[source.removeprefix("lang_")]
        folder = f"chatterbot_corpus/data/{variant.dialogues}/"
        for name, path in env.files("chatterbot-corpus", (".yml",)):
            if variant.dialogues and name.startswith(folder):
                for turns in yaml.load(path.read_text("utf-8"), Loader=loader)["conversations"]:
                    if len(turns) > 1:
                        yield _row(code, str(turns[0]), str(turns[1]))


def _translations(code: str, pairs: Sequence[tuple[str, str]]) -> Iterator[Row]:
    name = table.LANGUAGES[code].name
    for english, text in pairs:
        yield _row(code, f"Translate into {name}: {english}", text)
        yield _row(code, f"Translate from {name} into English: {text}", english)


def _completions(code: str, text: str) -> Iterator[Row]:
    words, joint = _words(code, text)
    if len(words) >= _MIN_WORDS:
        half = len(words) // 2
        yield _row(code, joint.join(words[:half]) + " …", joint.join(words[half:]))


def _repetitions(code: str, text: str) -> Iterator[Row]:
    words, joint = _words(code, text)
    if len(words) < _MIN_WORDS:
        return
    name = table.LANGUAGES[code].name
    units = "words" if joint else "characters"
    kind = splits.stable_hash(text, salt="repeat") % 3
    asked, answer = (
        ("Repeat", text),
        (f"Say the first two {units} of", joint.join(words[:2])),
        (f"Say the last two {units} of", joint.join(words[-2:])),
    )[kind]
    yield _row(code, f"{asked} this {name} text: {text}", answer)


def _words(code: str, text: str) -> tuple[list[str], str]:
    """Returns the words of a text, or its letters in a language without spaces, and what joins them."""
    if table.LANGUAGES[code].has_spaces:
        return text.split(), " "
    return [letter for letter in text if not letter.isspace()], ""


def _first(rows: Sequence[Row], count: int) -> list[Row]:
    """Returns the first rows by their hashes, without those that have an empty text or occur twice."""
    unique = {json.dumps(row, sort_keys=True): row for row in rows}
    full = {key: row for key, row in unique.items() if all(m["content"] for m in row["messages"])}
    order = sorted(full, key=lambda key: splits.stable_hash(key, salt="instructions"))
    return [full[key] for key in order[:count]]


def _write(path: pathlib.Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
