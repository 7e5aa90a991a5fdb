"""The row about chat templates that escape, loop, grow or are wrong."""

import functools
from collections.abc import Iterator

from tests.faults.table import Bench, Case, Row, Unclear, refused

_DOUBLE = (
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(40) %}{% set n.x = EXPR %}{% endfor %}"
)
_TEMPLATES: dict[str, str] = {
    "loops in loops": "{% for i in [1] * 10000000 %}{% for j in [1] * 10000000 %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a power": "{{ 9 ** 99999999999 }}",
    "doubling by ~": _DOUBLE.replace("EXPR", "n.x ~ n.x"),
    "doubling by +": _DOUBLE.replace("EXPR", "n.x + n.x"),
    "doubling by join": _DOUBLE.replace("EXPR", "[n.x, n.x] | join"),
    "replace": _DOUBLE.replace("EXPR", "n.x.replace('a', 'aa')"),
    "a batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "an indent": "{{ [1] | tojson(indent=2000000000) }}",
    "tabs": "{{ ('\t' * 9999).expandtabs(10**9) }}",
    "a range": "{{ range(10**9) | list }}",
    "brackets": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "too long": "{{ 1 }}" * 3_000_000,
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "an import": "{% import 'os' as os %}{{ os.popen('id').read() }}",
    "an include": "{% include '/etc/passwd' %}",
    "a format string": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "a cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "an attribute filter": "{{ messages | attr('__class__') | attr('__base__') }}",
    "a name that is not there": "{{ nothing.at.all }}",
    "an open block": "{% for m in messages %}",
    "an error of its own": "{{ raise_exception('x' * 10) }}",
}


def _templates(seed: int) -> Iterator[Case]:
    del seed
    for name, source in _TEMPLATES.items():
        yield Case(name, functools.partial(_template, source))


def _nothing() -> str:
    from espalier.data.tokenizers.chat_template import ChatTemplateError

    raise ChatTemplateError("chat template: it renders nothing")


def _template(source: str, bench: Bench) -> None:
    from espalier.data.tokenizers.chat_template import ChatTemplate, ChatTemplateError

    del bench
    messages = [{"role": "user", "content": "hi"}]
    template = ChatTemplate({"default": source})
    # An attribute that is refused may also be undefined, which renders as nothing.
    error = refused(lambda: template.render(messages) or _nothing(), ChatTemplateError)
    if len(str(error)) > 1000:
        raise Unclear(f"an error of {len(str(error))} characters")


ROWS = (
    Row(
        19,
        "chat templates that escape, loop, grow or are wrong",
        "one error within the limits of time and memory",
        _templates,
        sample=3,
    ),
)
