"""Chat templates: render a conversation as the text that a model was trained to continue.

A template is a jinja2 program of a checkpoint, in tokenizer_config.json or in a file
chat_template.jinja. Its variables are `messages`, `tools`, `documents`, `add_generation_prompt` and
the special tokens of the tokenizer. Rendering follows `apply_chat_template` of transformers: keys
of messages with value null are removed, blocks are trimmed, `tojson` does not escape, and
`raise_exception`, `strftime_now`, loop controls and `{% generation %}` are available.

Control tokens that contents of messages spell are told from the template's own (data/tokenizers/control_tokens.py).

Templates are untrusted code and run in a sandbox with limits of time and memory
(data/tokenizers/chat_sandbox.py). Any error in a template, and any limit that it exceeds, raises
`ChatTemplateError`.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import checkpoint_files
from espalier.common.checkpoint_files import CheckpointFileError
from espalier.data.tokenizers import chat_sandbox, control_tokens

DEFAULT = "default"
WITH_TOOLS = "tool_use"  # for conversations with tools, if a tokenizer has several templates
FILE = "chat_template.jinja"
FOLDER = "additional_chat_templates"
_MAX_TEMPLATES = 100

# The Command format: one BOS, then one turn per message, stripped, without newlines between turns.
COMMAND = """\
{{- bos_token -}}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
  {{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + messages[0]['content'].strip()
      + '<|END_OF_TURN_TOKEN|>' -}}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns -%}
  {%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('Roles must alternate user/assistant/user/assistant, after one optional system '
        'message; message ' ~ loop.index ~ ' of them has the role ' ~ turn['role']) -}}
  {%- endif -%}
  {{- '<|START_OF_TURN_TOKEN|>' -}}
  {%- if turn['role'] == 'user' -%}
    {{- '<|USER_TOKEN|>' + turn['content'].strip() + '<|END_OF_TURN_TOKEN|>' -}}
  {%- else -%}
    {{- '<|CHATBOT_TOKEN|>' -}}
    {% generation %}{{- turn['content'].strip() + '<|END_OF_TURN_TOKEN|>' -}}{% endgeneration %}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}
{%- endif -%}
"""
BUILT_IN = {"command": COMMAND}

# Roles that every template knows; it may change their messages.
_ROLES = ("system", "user", "assistant")
# Alternative keys of the reasoning text.
_REASONING = ("reasoning_content", "thinking", "reasoning")


_GENERATION_BLOCK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplateError(CheckpointFileError):
    """A conversation cannot be rendered: no template, a template error, or invalid messages."""


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The templates of one tokenizer, by name."""

    # name -> source; `default` is used by default, `tool_use` for conversations with tools
    templates: Mapping[str, str]
    # variables of the tokenizer, such as `bos_token`
    variables: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = "chat template"  # describes the source of the templates, for error messages
    # tokens that contents may spell, of `control_tokens.of`; if empty, spellings in contents are control tokens too
    added: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    @property
    def reads_clock(self) -> bool:
        """Returns whether the text of a conversation depends on when it is rendered."""
        return any("strftime_now" in source for source in self.templates.values())

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """Returns the text of a conversation; `rendered` describes the arguments and errors."""
        return self.rendered(messages, **options).text

    def render_spans(
        self, messages: Sequence[Mapping[str, Any]], **options: Any
    ) -> chat_sandbox.Rendered:
        """Returns the text of a conversation and the spans of the assistant's texts.

        Args:
          messages, **options: see `rendered`.

        Raises:
          ChatTemplateError: see `rendered`; or the place of an assistant's text is unknown.
        """
        rendered = self.rendered(messages, **options)
        if rendered.spans is None:
            raise ChatTemplateError(
                f"{self.origin}: a text in {{% generation %}} is changed, removed or repeated around the block, so its "
                "place in the conversation is unknown. Put filters inside the block"
            )
        return rendered

    def rendered(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        name: str | None = None,
        **variables: Any,
    ) -> chat_sandbox.Rendered:
        """Returns the text of a conversation, the spans of the assistant's texts, and the template's control tokens.

        Args:
          messages: JSON objects with "role" and "content".
          tools: JSON schemas of functions.
          documents: mappings with "title" and "text".
          add_generation_prompt: end with the opening of the assistant's next turn.
          name: name of the template; None for the default template.
          **variables: further variables of the template; they override variables of the tokenizer.

        Raises:
          ChatTemplateError: there is no such template, it rejects the conversation or fails, or the
            messages are invalid, or spell control tokens in places that are unknown.
        """
        name = self._name(name, tools is not None)
        source = self.templates[name]
        where = self.origin if name == DEFAULT else f"{self.origin}, template {name!r}"
        options = {
            **_plain({**self.variables, **variables}, "variables of the template"),
            "add_generation_prompt": add_generation_prompt,
        }
        contents: dict[str, Any] = {
            "messages": _messages(messages),
            "tools": None if tools is None else _plain(tools, "tools"),
            "documents": None if documents is None else _plain(documents, "documents"),
        }
        again = lambda other: chat_sandbox.render(source, {**options, **other}).text  # noqa: E731
        try:
            rendered = chat_sandbox.render(source, {**options, **contents})
            _check_roles(contents["messages"], rendered.text, source)
            written = control_tokens.written(
                rendered.text, contents, again, source=source, added=self.added
            )
        except ValueError as error:
            raise ChatTemplateError(f"{where}: {error}") from None
        return dataclasses.replace(rendered, written=written)

    def marks_assistant(self, *, has_tools: bool = False) -> bool:
        """Returns whether the template marks the assistant's texts by `{% generation %}`."""
        return _GENERATION_BLOCK.search(self.templates[self._name(None, has_tools)]) is not None

    def _name(self, name: str | None, has_tools: bool) -> str:
        if name is None:
            name = WITH_TOOLS if has_tools and WITH_TOOLS in self.templates else DEFAULT
        if name not in self.templates:
            raise ChatTemplateError(
                f"{self.origin}: there is no template {name!r}; there is "
                f"{', '.join(sorted(self.templates)) or 'none'}"
            )
        return name


def of(
    name_or_file: str | None, vocabulary: Any, *, special_in_contents: bool = False
) -> ChatTemplate | None:
    """Returns the template of a file or built-in name; by default the vocabulary's own, if it has one.

    Args:
      name_or_file: see `named`, whose variables are the vocabulary's special tokens.
      vocabulary: a SeqIO vocabulary.
      special_in_contents: whether control tokens that contents spell are control tokens, unless the vocabulary has
        `special_in_text=False`.

    Raises:
      ChatTemplateError: the template does not exist.
    """
    if name_or_file is None:
        template = getattr(vocabulary, "chat_template", None)
    else:
        files = getattr(vocabulary, "files", None)
        template = named(name_or_file, files.tokens if files else None)
    allowed = special_in_contents and getattr(vocabulary, "special_in_text", True)
    if template is None or allowed:
        return template
    return dataclasses.replace(template, added=control_tokens.of(vocabulary))


def named(name_or_file: str, variables: Mapping[str, Any] | None = None) -> ChatTemplate:
    """Returns a template of `BUILT_IN` by its name, or the template in a file.

    `variables` are variables of the tokenizer, such as `bos_token`.

    Raises:
      ChatTemplateError: there is no such name and no such file, or the file is too long or not UTF-8.
    """
    if name_or_file in BUILT_IN:
        source = BUILT_IN[name_or_file]
    elif os.path.isfile(name_or_file):
        folder, name = os.path.split(os.path.realpath(name_or_file))
        source = _read(pathlib.Path(folder), name) or ""
    else:
        raise ChatTemplateError(
            f"there is no chat template {name_or_file!r}: give the path of a jinja file, or the name of a built-in "
            f"one: {', '.join(map(repr, BUILT_IN))}"
        )
    return ChatTemplate({DEFAULT: source}, dict(variables or {}), f"chat template {name_or_file}")


def read(
    folder: str | os.PathLike, config: Mapping[str, Any], variables: Mapping[str, Any]
) -> ChatTemplate | None:
    """Returns the templates in a checkpoint's directory, or None if it has none.

    Args:
      folder: directory of the checkpoint.
      config: its tokenizer_config.json; a `chat_template` there is ignored if there are template files.
      variables: name -> special token.

    Raises:
      ChatTemplateError: `chat_template` is neither a text nor such a list, or a file is not UTF-8, too long,
        or outside of the checkpoint.
    """
    folder = pathlib.Path(folder)
    templates = {}
    if (source := _read(folder, FILE)) is not None:
        templates[DEFAULT] = source
    for path in further_files(folder):
        templates[path.stem] = _read(folder, f"{FOLDER}/{path.name}") or ""
    if not templates and (entry := config.get("chat_template")) is not None:
        templates = _entries(folder, entry)
    for name, source in templates.items():
        if len(source) > chat_sandbox.MAX_SOURCE:
            raise ChatTemplateError(
                f"{folder}: the chat template {name!r} is longer than {chat_sandbox.MAX_SOURCE:,} characters"
            )
    origin = f"chat template of {folder}"
    return ChatTemplate(templates, dict(variables), origin) if templates else None


def write(folder: str | os.PathLike, template: ChatTemplate) -> None:
    """Writes the templates of a tokenizer into its directory, and removes the templates that are there."""
    folder = pathlib.Path(folder)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    (folder / FILE).write_text(template.templates[DEFAULT], encoding="utf-8")
    for name, source in template.templates.items():
        if name != DEFAULT:
            (folder / FOLDER).mkdir(exist_ok=True)
            (folder / FOLDER / f"{name}.jinja").write_text(source, encoding="utf-8")


def further_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of further chat templates; raises ChatTemplateError if there are too many."""
    paths = list(itertools.islice((folder / FOLDER).glob("*.jinja"), _MAX_TEMPLATES + 1))
    if len(paths) > _MAX_TEMPLATES:
        raise ChatTemplateError(
            f"{folder / FOLDER} has more than {_MAX_TEMPLATES} files. Remove those that are not needed"
        )
    return sorted(paths)


def _read(folder: pathlib.Path, name: str) -> str | None:
    """Returns the text of a template file; None if there is no such file."""
    try:
        return checkpoint_files.read_text(folder, name, max_bytes=chat_sandbox.MAX_SOURCE)
    except CheckpointFileError as error:
        raise ChatTemplateError(str(error)) from None


def _entries(folder: pathlib.Path, entry: Any) -> dict[str, str]:
    """Returns the templates of `chat_template` in tokenizer_config.json."""
    if isinstance(entry, str):
        return {DEFAULT: entry}
    try:
        templates = {item["name"]: item["template"] for item in entry}
    except (KeyError, TypeError):
        templates = {"": None}
    if not all(isinstance(text, str) for item in templates.items() for text in item):
        raise ChatTemplateError(
            f"{folder}/tokenizer_config.json: chat_template is neither a text nor a list of "
            '{"name": ..., "template": ...}'
        )
    return templates


def _plain(value: Any, what: str) -> Any:
    """Returns the value converted through JSON: a template cannot call methods of the result."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()  # fails for half of a surrogate pair
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise ChatTemplateError(f"{what} are not what JSON can hold: {error}") from None


def _messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    messages = _plain(messages, "messages")
    if not isinstance(messages, list) or not messages:
        raise ChatTemplateError("messages must be a list of at least one message")
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(role := message.get("role"), str):
            raise ChatTemplateError(
                f'message {number} is not of the form {{"role": "user", "content": "..."}}'
            )
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        if not role:
            raise ChatTemplateError(f"message {number} has an empty role")
        checked.append(message)
    return checked


def _check_roles(messages: Sequence[Mapping[str, Any]], text: str, source: str) -> None:
    """Raises ValueError if the text lacks a message of a further role, and the template does not name the role."""
    for number, message in enumerate(messages, 1):
        content, role = message.get("content"), message["role"]
        if role in _ROLES or not isinstance(content, str) or content.strip() in text:
            continue
        if not re.search(rf"\b{re.escape(role)}\b", source):
            raise ValueError(
                f"message {number} has the role {role!r}, which the template does not render. Correct the role, or use "
                "another template"
            )
