"""Renders chat templates with jinja2; runs in the child process of data/tokenizers/chat_sandbox.py.

`sandbox`, `pieces` and `message` serve other templates too (data/instructions/renderer.py).

jinja2's immutable sandbox keeps templates from files and from Python's internal attributes. Time and memory are
limited from outside, by the process; here are only the limits that have a clearer message.
"""

import contextvars
import datetime
import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jinja2
import jinja2.debug  # which jinja2 imports only at the first error, when files are out of reach
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from espalier.data.tokenizers.chat_sandbox import MAX_LENGTH, MAX_STEPS

_MAX_MESSAGE = 2000  # characters

_spans: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("spans", default=None)
_steps: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("steps", default=None)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"text", "spans"} of a request {"source", "values"}, or {"error"}.

    "spans" is None if a block's text is not in the output once: a filter around the block has changed or removed it.
    """
    try:
        return _render(request["source"], request["values"])
    except MemoryError:
        raise
    except Exception as error:  # the template is untrusted code and can raise anything
        return {"error": message(error)}


def _render(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    texts: list[str] = []
    marked: list[tuple[int, int]] = []
    length, is_known = 0, True
    spoken: list[str] = []
    token = _spans.set(spoken)
    try:
        for piece in pieces(_compiled(source), values):
            # A marked block is one piece; `_mark` has recorded it before jinja2 yields the piece.
            while spoken:
                text = spoken.pop(0)
                is_known &= piece == text or piece.count(text) == 1
                start = length + piece.find(text)
                marked.append((start, start + len(text)))
            texts.append(piece)
            length += len(piece)
        is_known &= not spoken
    finally:
        _spans.reset(token)
    return {"text": "".join(texts), "spans": marked if is_known else None}


def pieces(template: jinja2.Template, values: Mapping[str, Any]) -> Iterator[str]:
    """Yields the rendered text in pieces; its length and the steps of its ranges are limited."""
    length, token = 0, _steps.set([MAX_STEPS])
    try:
        for piece in template.generate(**values):
            length += len(piece)
            if length > MAX_LENGTH:
                raise OverflowError(f"it renders more than {MAX_LENGTH:,} characters")
            yield piece
    finally:
        _steps.reset(token)


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %} ... {% endgeneration %}`, which marks the assistant's text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body)
        return call.set_lineno(line)

    def _mark(self, caller):
        text = caller()
        if (spoken := _spans.get()) is not None:
            spoken.append(text)
        return text


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace without underscored attributes, which could escape the sandbox."""

    def __init__(*args, **kwargs):
        self, *mappings = args
        attributes = dict(*mappings, **kwargs)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name):
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.sandbox.SecurityError(f"a namespace has no attribute {name!r}")


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(format):
    return datetime.datetime.now().strftime(format)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _range(*args):
    counted = jinja2.sandbox.safe_range(*args)
    remaining = _steps.get()
    if remaining is not None:
        remaining[0] -= len(counted)
        if remaining[0] < 0:
            raise OverflowError(f"its ranges count more than {MAX_STEPS:,} steps")
    return counted


def sandbox(**options: Any) -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Returns jinja2's immutable sandbox with safe forms of its functions; `options` are jinja2's."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(**options)
    del environment.globals["lipsum"]
    environment.globals.update(
        range=_range,
        namespace=_Namespace,
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # not the class, which has attributes
    )
    return environment


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(source)


def message(error: Exception) -> str:
    """Returns an error of a template as text."""
    text = str(error) or type(error).__name__
    if isinstance(error, jinja2.TemplateSyntaxError):
        text = f"syntax error in line {error.lineno}: {text}"
    elif type(error) is not jinja2.TemplateError:  # which the template itself raises
        text = f"{type(error).__name__}: {text}"
    return text[:_MAX_MESSAGE]
