"""Renders prompt templates with jinja2; runs in the child process of data/instructions/templates.py.

The functions and filters are promptsource's: jinja2's own, `zip`, `choice` and `most_frequent`.
"""

import collections
import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from espalier.data.tokenizers import chat_renderer

SEPARATOR = "|||"  # between input and target, and between answer choices
_ESCAPED = (
    "3ed2dface8203c4c9dfb1a5dc58e41e0"  # for the separator in a row's texts, as in promptsource
)


def answer(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns {"parts", "choices"} or {"error"} for each row of a request.

    Args:
      request: {"jinja", "choices": its jinja or None, "rows": [[seed, row], ...]}; without rows, the jinja is only
        checked, and the result is [] or the one error.
    """
    try:
        template, choices = _compiled(request["jinja"]), _compiled(request["choices"] or "")
    except Exception as error:  # the template is untrusted code
        return [{"error": chat_renderer.message(error)}]
    results = []
    for seed, row in request["rows"]:
        try:
            results.append(_rendered(template, choices if request["choices"] else None, seed, row))
        except MemoryError:
            raise
        except Exception as error:
            results.append({"error": chat_renderer.message(error)})
    return results


def _rendered(
    template: jinja2.Template, choices: jinja2.Template | None, seed: str, row: Mapping[str, Any]
) -> dict[str, Any]:
    random.seed(seed)  # of `choice`, and of jinja2's `random`
    values = _escaped(row)
    options = None if choices is None else _parts(choices, values)
    escaped = None if options is None else list(map(_escaped, options))
    return {
        "parts": _parts(template, {**values, "answer_choices": escaped}),
        "choices": options,
    }


def _parts(template: jinja2.Template, values: Mapping[str, Any]) -> list[str]:
    text = "".join(chat_renderer.pieces(template, values))
    return [part.replace(_ESCAPED, SEPARATOR).strip() for part in text.split(SEPARATOR)]


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(SEPARATOR, _ESCAPED)
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    return [_escaped(inner) for inner in value] if isinstance(value, list) else value


@jinja2.pass_context  # without which jinja2 draws from a constant list only once, when it compiles
def _choice(context: Any, values: Sequence[Any]) -> Any:
    return random.choice(values)


def _most_frequent(values: Sequence[Any]) -> list[Any]:
    """Returns the values that occur most often, in the order of their first occurrence."""
    counts = collections.Counter(values)
    return [value for value in counts if counts[value] == max(counts.values())]


@functools.lru_cache(maxsize=256)
def _compiled(source: str) -> jinja2.Template:
    environment = chat_renderer.sandbox(undefined=jinja2.StrictUndefined)
    environment.globals["zip"] = lambda *values: list(zip(*values, strict=False))
    environment.filters.update(choice=_choice, most_frequent=_most_frequent)
    return environment.from_string(source)
