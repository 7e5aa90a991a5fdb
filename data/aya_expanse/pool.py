"""The pool of teachers, declared in a YAML file.

    teachers:
      - name: romance
        checkpoint: runs/romance            # a run of this project
      - name: qwen
        hf: /models/Qwen2.5-0.5B-Instruct   # a folder of Hugging Face
        temperature: 0.7
      - name: large
        url: https://host/v1                # an OpenAI-compatible endpoint
        model: NAME
        key_env: API_KEY                    # or key_file: PATH
        prompt_price: 0.5                   # per million tokens
        new_price: 1.5
        languages: [tr, uk]                 # asked only in these; by default in all
    fixed: {tr: large, default: romance}    # for --routing=fixed: language -> teacher

A teacher of pt is also asked for prompts in pt-BR: tags of one language are equal, see `data.languages.table.code_of`. The order of the
teachers decides between equal rewards: the first wins.
"""

import dataclasses
import math
import os
import pathlib
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from espalier.common import spelling
from espalier.data.languages import table
from espalier.data.text.documents import DataError

Kind = Literal["checkpoint", "hf", "url"]
KINDS: tuple[Kind, ...] = ("checkpoint", "hf", "url")
DEFAULT = "default"
_MAX_BYTES = 1 << 20
_OF_KIND = {
    "model": ("url",),
    "key_env": ("url",),
    "key_file": ("url",),
    "timeout": ("url",),
    "retries": ("url",),
    "concurrency": ("url",),
    "batch_size": ("checkpoint", "hf"),
    "chat_template": ("checkpoint", "hf"),
}
_SECRETS = ("key", "api_key", "token", "password")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """A teacher.

    Attributes:
      name: its name in all outputs.
      kind: what `where` is: the directory of a run or of a Hugging Face checkpoint, or the URL of an endpoint.
      where: see `kind`.
      model: name of the endpoint's model.
      key_env, key_file: environment variable or file with the endpoint's API key; neither sends no key.
      temperature, top_p, max_tokens: settings of its completions; None for those of the command.
      languages: languages in which it is asked; None for all.
      prompt_price, new_price: per million tokens of prompts and of completions.
      timeout: seconds to wait for an endpoint's reply.
      retries: retries of a request that the endpoint is too busy for.
      concurrency: requests at a time.
      batch_size: prompts at a time of a checkpoint.
      chat_template: see `launch.load.load_run.RunConfig`; None for the model's own.
    """

    name: str
    kind: Kind
    where: str
    model: str | None = None
    key_env: str | None = None
    key_file: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    languages: tuple[str, ...] | None = None
    prompt_price: float = 0.0
    new_price: float = 0.0
    timeout: float = 120.0
    retries: int = 6
    concurrency: int = 8
    batch_size: int = 8
    chat_template: str | None = None

    def teaches(self, language: str) -> bool:
        """Returns whether the teacher is asked in a language."""
        own = self.languages
        return own is None or table.code_of(language) in map(table.code_of, own)

    def cost(self, prompt_tokens: int | None, new_tokens: int | None) -> float | None:
        """Returns the price of a completion; None if it has one and the number of tokens is unknown."""
        cost = 0.0
        for price, tokens in ((self.prompt_price, prompt_tokens), (self.new_price, new_tokens)):
            if price and tokens is None:
                return None
            cost += price * (tokens or 0)
        return cost / 1e6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """The teachers, by name and in the order of the file, and the fixed routing: language -> name."""

    teachers: Mapping[str, Teacher]
    fixed: Mapping[str, str]


def content(path: str | os.PathLike, *, kind: str) -> Any:
    """Returns the content of a YAML file of this kind; raises DataError if it is missing, too long, or not YAML."""
    import yaml

    file = pathlib.Path(path)
    if not file.is_file():
        raise DataError(f"{path}: there is no such file. Give a {kind} in YAML")
    if file.stat().st_size > _MAX_BYTES:
        raise DataError(f"{path} has more than {_MAX_BYTES:,} bytes: it is no {kind}")
    try:
        return yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from None


def read(path: str | os.PathLike) -> Pool:
    """Returns the pool that a YAML file declares.

    Raises:
      DataError: the file is missing, malformed, or has an unknown key or a value out of range.
    """
    rows = _mapping(content(path, kind="pool of teachers"), str(path), ("teachers", "fixed"))
    teachers: dict[str, Teacher] = {}
    listed = rows.get("teachers")
    if not isinstance(listed, list) or not listed:
        raise DataError(f"{path}: 'teachers' must be a list with at least one teacher")
    for number, row in enumerate(listed, 1):
        teacher = _teacher(row, f"{path}, teacher {number}")
        if teacher.name in teachers:
            raise DataError(f"{path}: two teachers have the name {teacher.name!r}. Rename one")
        teachers[teacher.name] = teacher
    return Pool(teachers=teachers, fixed=_fixed(rows.get("fixed") or {}, teachers, str(path)))


def _mapping(value: Any, where: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where} must be a mapping with the keys {', '.join(known)}")
    for key in value:
        if key in _SECRETS:
            raise DataError(
                f"{where}: {key!r} would write the key into a file: put it into an environment variable and give key_env, "
                "or into a file of its own and give key_file"
            )
        if key not in known:
            raise DataError(
                f"{where}: unknown key {reprlib.repr(key)}; {spelling.nearest(reprlib.repr(key).strip(chr(39)), known)}"
            )
    return value


def _teacher(row: Any, where: str) -> Teacher:
    fields = {field.name: field for field in dataclasses.fields(Teacher)}
    known = [*KINDS, *(name for name in fields if name not in ("kind", "where"))]
    row = _mapping(row, where, known)
    kinds = [kind for kind in KINDS if kind in row]
    if len(kinds) != 1:
        raise DataError(f"{where}: give one of {', '.join(KINDS)}")
    (kind,) = kinds
    where = f"{where} ({reprlib.repr(row.get('name'))})"
    for name, allowed in _OF_KIND.items():
        if name in row and kind not in allowed:
            raise DataError(f"{where}: {name!r} is for {' and '.join(allowed)}: remove it")
    if kind == "url" and "model" not in row:
        raise DataError(f"{where}: an endpoint needs 'model', the name of its model")
    if "key_env" in row and "key_file" in row:
        raise DataError(f"{where}: give one of key_env and key_file")
    values = {name: _value(row[name], fields[name], where) for name in row if name not in KINDS}
    if "name" not in values:
        raise DataError(f"{where}: 'name' is missing")
    return Teacher(kind=kind, where=_text(row[kind], kind, where), **values)


# Name -> the least value.
_NUMBERS = {
    "temperature": 0.0,
    "prompt_price": 0.0,
    "new_price": 0.0,
    "timeout": 0.001,
    "retries": 0,
    "concurrency": 1,
    "batch_size": 1,
    "max_tokens": 1,
    "top_p": 1e-6,
}


def _value(value: Any, field: dataclasses.Field, where: str) -> Any:
    name = field.name
    if name == "languages":
        if not isinstance(value, list) or not value:
            raise DataError(f"{where}: 'languages' must be a list of codes, such as [tr, uk]")
        return tuple(_text(one, name, where) for one in value)
    if name not in _NUMBERS:
        return _text(value, name, where)
    whole = name in ("retries", "concurrency", "batch_size", "max_tokens")
    least, most = _NUMBERS[name], 1.0 if name == "top_p" else math.inf
    number = type(value) is int or (type(value) is float and not whole)
    if not number or not least <= value <= most or value == math.inf:
        kind = "a whole number" if whole else "a number"
        bound = f" and at most {most:g}" if most < math.inf else ""
        raise DataError(
            f"{where}: {name!r} is {reprlib.repr(value)}; it must be {kind} of at least {least:g}{bound}"
        )
    return value


def _text(value: Any, name: str, where: str) -> str:
    # YAML reads `no`, the code of Norwegian, as false.
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{where}: {name!r} is {reprlib.repr(value)}; it must be a text. Write it in quotes"
        )
    return value


def _fixed(value: Any, teachers: Mapping[str, Teacher], path: str) -> Mapping[str, str]:
    if not isinstance(value, dict):
        raise DataError(f"{path}: 'fixed' must be a mapping of languages to names of teachers")
    for language, name in value.items():
        where = f"{path}: 'fixed'"
        _text(language, "language", where)
        if _text(name, language, where) not in teachers:
            raise DataError(
                f"{where}: {language!r} has no teacher {name!r}; {spelling.nearest(name, teachers)}"
            )
        if language != DEFAULT and not teachers[name].teaches(language):
            raise DataError(f"{where}: the languages of {name!r} do not include {language!r}")
    return table.ByLanguage(value)
