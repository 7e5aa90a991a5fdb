"""Renders chat templates in a sandbox.

The sandbox is jinja2's immutable sandbox, without access to files and to Python's internal
attributes. The total length of all ranges (`MAX_STEPS`) and the length of each text (`MAX_LENGTH`)
are bounded, so that a short expression cannot run forever or exhaust the memory.
"""

import contextvars
import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes
import jinja2.sandbox

MAX_STEPS = 1_000_000  # total length of all `range` calls of one rendering
MAX_LENGTH = 10_000_000  # characters or items of a rendered, repeated or padded value


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A rendered conversation."""

    text: str  # the whole text
    # (start, end) in characters of each assistant text, marked by `{% generation %}`
    spans: tuple[tuple[int, int], ...]


_spans: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("spans", default=None)
_steps: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("steps", default=None)


def render(source: str, values: Mapping[str, Any]) -> Rendered:
    """Renders a template from its jinja2 source and its variables.

    Raises:
      OverflowError: a bound of the sandbox is exceeded.
      Exception: any error of the template.
    """
    pieces: list[str] = []
    marked: list[tuple[int, int]] = []
    length = 0
    tokens = _spans.set(spoken := []), _steps.set([MAX_STEPS])
    try:
        for piece in _compiled(source).generate(**values):
            # A marked block is one piece; `_mark` has recorded it before jinja2 yields the piece.
            while spoken:
                text = spoken.pop(0)
                start = length + piece.find(text)
                marked.append((start, start + len(text)))
            pieces.append(piece)
            length += len(piece)
            if length > MAX_LENGTH:
                raise OverflowError(f"it renders more than {MAX_LENGTH:,} characters")
    finally:
        _spans.reset(tokens[0])
        _steps.reset(tokens[1])
    return Rendered("".join(pieces), tuple(marked))


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on the short expressions that build long texts."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context, operator, left, right):
        if operator == "**" and isinstance(right, int) and right > 64:
            raise OverflowError(f"{left} ** {right} is too large")
        if operator == "%" and isinstance(left, str):
            _check_format(left, _PERCENT)
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    _check_widths(len(value) * count)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context, __obj, *args, **kwargs):  # noqa: N805 (keywords are the template's)
        if isinstance(getattr(__obj, "__self__", None), str):  # a method of a text, such as ljust
            _check_widths(*(value for value in args if isinstance(value, int)))
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value):
        text = getattr(value, "__self__", None)
        if isinstance(text, str) and value.__name__ in ("format", "format_map"):
            _check_format(text, _BRACES)
        return super().wrap_str_format(value)


# Formats whose width has eight digits or more, or is itself an argument.
_PERCENT = re.compile(r"%[^%a-zA-Z]*([0-9]{8}|[*])")
_BRACES = re.compile(r"\{[^{}]*([0-9]{8}|:[^{}]*\{)")


def _check_format(text, wide):
    if wide.search(text):
        raise OverflowError(f"the width of a format is more than {MAX_LENGTH:,}")


def _check_widths(*values):
    """Raises OverflowError if a number would make a text too long."""
    if any(isinstance(value, int) and value > MAX_LENGTH for value in values):
        raise OverflowError(f"a text of more than {MAX_LENGTH:,} characters")


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


def _bounded(text_filter):
    """Returns a jinja2 filter that lengthens texts, with a bound on its numeric arguments."""

    @functools.wraps(text_filter)
    def call(*args, **kwargs):
        _check_widths(*args[1:], *kwargs.values())
        return text_filter(*args, **kwargs)

    return call


def _format(text, *args, **kwargs):
    _check_format(str(text), _PERCENT)
    return jinja2.filters.do_format(text, *args, **kwargs)


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.filters["format"] = _format
    for name in ("center", "indent"):
        environment.filters[name] = _bounded(environment.filters[name])
    del environment.globals["lipsum"]
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        range=_range,
        namespace=_Namespace,
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # not the class, which has attributes
    )
    return environment.from_string(source)
