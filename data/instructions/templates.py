"""Prompt templates in promptsource's YAML files, and rows rendered with them.

    dataset: super_glue
    subset: rte
    templates:
      8fb1c6aa:
        name: does this imply
        jinja: '{{premise}} Does this imply "{{hypothesis}}"? ||| {{answer_choices[label]}}'
        answer_choices: Yes ||| No
        metadata: {original_task: true, choices_in_prompt: false, metrics: [Accuracy]}

`jinja` writes the input, `|||` and the target. `answer_choices` is jinja too. A template that renders nothing for a row
skips the row. Templates are data: they run in the sandbox of chat templates, in a process with limits.
"""

import dataclasses
import itertools
import pathlib
import re
import reprlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from espalier.common import spelling
from espalier.data.instructions.renderer import SEPARATOR
from espalier.data.limited_process import LimitedProcess, LimitError
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import chat_sandbox

# Part of the digest of a source: raise it when the same templates and rows become other texts.
VERSION = 1
BATCH = 64  # rows that are rendered in one call
MAX_BYTES = 1 << 20  # of a file
MAX_TEMPLATES = 1000  # of a file
MAX_CHOICES = 1000  # of a row

_KEYS = ("name", "jinja", "answer_choices", "metadata", "id", "reference")
_METADATA = ("original_task", "choices_in_prompt", "metrics", "languages")
_SHORT = reprlib.Repr()  # aliases of YAML can make a value of a small file endless
_SHORT.maxstring, _SHORT.maxlevel = (
    100,
    2,
)  # characters of a text, and lists inside each other, in a message
_process = LimitedProcess(
    "espalier.data.instructions.renderer:answer", memory_bytes=chat_sandbox.MEMORY_BYTES
)


class Row(NamedTuple):
    """A row of a dataset, with its id and its place for errors."""

    id: str
    where: str
    fields: Mapping[str, Any]


class Rendered(NamedTuple):
    """A row as texts: what the model reads, what it should write, and the possible answers, if there are any."""

    inputs: str
    target: str
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt template of a file.

    Attributes:
      file: path of its file, for errors.
      name: its name, which is unique in the file.
      jinja: text of input and target.
      answer_choices: jinja of the choices; None if answers are free.
      original_task: whether the prompt asks for what the dataset was made for; such prompts are evaluated.
      metadata: all metadata.
    """

    file: str
    name: str
    jinja: str
    answer_choices: str | None
    original_task: bool
    metadata: Mapping[str, Any]

    @property
    def slug(self) -> str:
        """The name in lower case, with letters and digits of ASCII alone, for names of tasks."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")

    @property
    def where(self) -> str:
        return f"{self.file}, template {self.name!r}"

    def render(self, rows: Iterable[Row]) -> Iterator[tuple[Row, Rendered | None]]:
        """Yields each row with its texts; with None if the template renders nothing for it.

        Raises:
          DataError: a row lacks a field, the template fails or exceeds a limit, the target or a choice is empty, or the
            target is none of the choices. The message names file, template and row.
        """
        remaining = iter(rows)
        while batch := list(itertools.islice(remaining, BATCH)):
            yield from self._batch(batch)

    def _batch(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Rendered | None]]:
        try:
            answers = self._call(rows)
        except LimitError as error:
            if len(rows) == 1:
                raise DataError(f"{self.where}, {rows[0].where}: the template {error}") from None
            for row in rows:  # which shows the row
                yield from self._batch([row])
            return
        for row, answer in zip(rows, answers, strict=True):
            yield row, self._checked(row, answer)

    def _call(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        seeded = [[f"{self.name} {row.id}", row.fields] for row in rows]
        return _process.call(
            {"jinja": self.jinja, "choices": self.answer_choices, "rows": seeded},
            cpu_seconds=chat_sandbox.CPU_SECONDS,
            wall_seconds=chat_sandbox.WALL_SECONDS,
        )

    def check(self) -> None:
        """Raises DataError if the jinja does not parse, or has no separator."""
        if SEPARATOR not in self.jinja:
            raise DataError(
                f"{self.where}: 'jinja' has no {SEPARATOR!r}; write it between the input and the target"
            )
        try:
            errors = self._call([])
        except LimitError as error:
            raise DataError(f"{self.where}: the template {error}") from None
        if errors:
            raise DataError(f"{self.where}: {errors[0]['error']}")

    def _checked(self, row: Row, answer: Mapping[str, Any]) -> Rendered | None:
        where = f"{self.where}, {row.where}"
        if "error" in answer:
            raise DataError(f"{where}: {_hinted(answer['error'], row.fields)}")
        parts, choices = answer["parts"], tuple(answer["choices"] or ())
        if not any(parts):
            return None
        if len(parts) != 2:
            raise DataError(
                f"{where}: it renders {len(parts)} parts, not an input and a target; write {SEPARATOR!r} once"
            )
        inputs, target = parts
        for text, part in ((inputs, "input"), (target, "target")):
            if not text:
                raise DataError(
                    f"{where}: the {part} is empty. Correct the row, or put the whole template inside an "
                    "{% if %} that renders nothing for such rows, which skips them"
                )
        if len(choices) > MAX_CHOICES:
            raise DataError(
                f"{where}: it has {len(choices):,} answer choices, more than {MAX_CHOICES:,}; correct 'answer_choices'"
            )
        if not all(choices):
            raise DataError(f"{where}: an answer choice is empty: {_listed(choices)}")
        if choices and target not in choices:
            raise DataError(
                f"{where}: the target {_SHORT.repr(target)} is none of the answer choices {_listed(choices)}. Correct "
                "the row, or 'jinja' or 'answer_choices' of the template"
            )
        return Rendered(inputs, target, choices)


def _hinted(error: str, fields: Mapping[str, Any]) -> str:
    """Returns an error with the names of a row's fields, if it is about a field that does not exist."""
    missing = re.fullmatch(r"UndefinedError: '(.*)' is undefined", error)
    if not missing:
        return error
    return (
        f"the row has no field {missing[1]!r}; present are {_listed(fields) or 'none'}. Correct the "
        f"template or the row, or test '{missing[1]} is defined'"
    )


def _listed(texts: Iterable[str]) -> str:
    shown = list(itertools.islice(texts, 11))
    return ", ".join([*map(_SHORT.repr, shown[:10]), *["..."] * (len(shown) > 10)])


def read(path: pathlib.Path) -> tuple[Template, ...]:
    """Returns the templates of a YAML file, sorted by name.

    Raises:
      DataError: the file cannot be read, has no templates, or one is malformed or has the name of another.
    """
    content = _yaml(path)
    entries = content.get("templates") if isinstance(content, dict) else None
    if isinstance(entries, dict):  # by promptsource's ids
        entries = list(entries.values())
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f"{path}: there is no list or mapping 'templates', as promptsource writes it"
        )
    if len(entries) > MAX_TEMPLATES:
        raise DataError(
            f"{path}: it has {len(entries):,} templates, more than {MAX_TEMPLATES:,}; divide it"
        )
    templates: dict[str, Template] = {}
    for number, entry in enumerate(entries, 1):
        template = _template(path, number, entry)
        template.check()
        if (other := templates.setdefault(template.slug, template)) is not template:
            raise DataError(
                f"{path}: the templates {other.name!r} and {template.name!r} would name one task, "
                f"{template.slug!r}; rename one"
            )
    return tuple(templates[slug] for slug in sorted(templates))


def _template(path: pathlib.Path, number: int, entry: Any) -> Template:
    where = f"{path}, template {number}"
    if not isinstance(entry, dict):
        raise DataError(
            f"{where}: it is a {type(entry).__name__}, not a mapping with 'name', 'jinja'"
        )
    if isinstance(entry.get("name"), str):
        where = f"{path}, template {_SHORT.repr(entry['name'])}"
    metadata = entry.get("metadata") or {}
    for mapping, known in ((entry, _KEYS), (metadata, _METADATA)):
        if not isinstance(mapping, dict):
            raise DataError(f"{where}: 'metadata' is a {type(mapping).__name__}, not a mapping")
        for key in mapping:
            if key not in known:
                raise DataError(
                    f"{where}: unknown key {_SHORT.repr(key)}; {spelling.nearest(key, known)}"
                )
    choices = entry.get("answer_choices") or None  # promptsource writes '' too
    texts = {"name": entry.get("name"), "jinja": entry.get("jinja")}
    if choices is not None:
        texts["answer_choices"] = choices
    for key, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: {key!r} is {_SHORT.repr(text)}; write a text (in quotes)")
        if len(text) > chat_sandbox.MAX_SOURCE:
            raise DataError(
                f"{where}: {key!r} is longer than {chat_sandbox.MAX_SOURCE:,} characters"
            )
    if not isinstance(original := metadata.get("original_task") or False, bool):
        raise DataError(
            f"{where}: metadata: 'original_task' is {_SHORT.repr(original)}; write true or false"
        )
    template = Template(str(path), entry["name"], entry["jinja"], choices, original, metadata)
    if not template.slug:
        raise DataError(f"{where}: the name has no letter or digit, of which a task's name is made")
    return template


def _yaml(path: pathlib.Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML with promptsource's tags, without repeated and merged keys."""

        def mapping(self, node):
            keys = set()
            for key_node, _ in node.value:
                problem, key = None, None
                if key_node.tag == "tag:yaml.org,2002:merge":  # could multiply keys without end
                    problem = "merged mappings ('<<') are not supported"
                elif not isinstance(key := self.construct_object(key_node, deep=True), Hashable):
                    problem = "a key is a list or mapping"
                elif key in keys:
                    problem = f"the key {_SHORT.repr(key)} is repeated"
                if problem:
                    raise yaml.constructor.ConstructorError(
                        None, None, problem, key_node.start_mark
                    )
                keys.add(key)
            yield (result := {})
            result.update(self.construct_mapping(node, deep=True))

    for tag in ("tag:yaml.org,2002:map", "!Template", "!TemplateMetadata"):
        Loader.add_constructor(tag, Loader.mapping)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) <= MAX_BYTES:
            return yaml.load(content.decode("utf-8"), Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the templates cannot be read ({error})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: such as a month 13
        raise DataError(f"{path}: malformed YAML: {' '.join(str(error).split())}") from None
    raise DataError(f"{path}: it is larger than {MAX_BYTES:,} bytes; divide it")
