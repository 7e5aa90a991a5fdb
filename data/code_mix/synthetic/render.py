"""Renders drafts as documents with random names, layout and tests, or with one fault in the solution."""

import ast
import copy
import dataclasses
import random
import re
import textwrap
from typing import Any

from espalier.data.code_mix.synthetic.draft import Draft

_TESTS = (3, 5)


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A document."""

    text: str  # a program: the problem, its solution and its tests
    # identifies the problem; equal for documents that differ in names, layout and tests only
    key: str


def render(draft: Draft, rng: random.Random, *, mutate: bool = False) -> Rendered | None:
    """Returns a draft as a document.

    Args:
      draft: the problem.
      rng: chooses names, layout and tests.
      mutate: put one fault into the solution.

    Returns:
      The document; None if `mutate` is set and the solution has no operator or number to change.
    """
    name = rng.choice(list(draft.names))
    chosen = _names(draft, name, rng)
    body = draft.body.replace("{name}", name)
    if mutate:
        mutated = _mutated(body, rng)
        if mutated is None:
            return None
        body = mutated
    body = _renamed(body, chosen)
    parameters = [chosen.get(parameter, parameter) for parameter in draft.parameters]
    statement = draft.statement
    if draft.parameters == ("n",):
        statement = _renamed(statement, {"n": parameters[0]})
    if rng.random() < 0.5:
        signature = ", ".join(f"{p}: {k}" for p, k in zip(parameters, draft.kinds, strict=False))
        signature = f"def {name}({signature}) -> {draft.kinds[-1]}:"
    else:
        signature = f"def {name}({', '.join(parameters)}):"
    tests = _cases(draft, rng)
    text = _layout(signature, statement, body, name, tests, rng)
    return Rendered(text, f"{draft.statement}\n{draft.body}")


def _names(draft: Draft, name: str, rng: random.Random) -> dict[str, str]:
    """Returns distinct new names for the names in `draft.rename`."""
    words = set(re.findall(r"\w+", draft.body)) | {name, *draft.parameters}
    taken = words - set(draft.rename)
    chosen = {}
    for own, alternatives in draft.rename.items():
        free = [other for other in alternatives.split() if other not in taken]
        chosen[own] = rng.choice(free) if free else own
        taken.add(chosen[own])
    return chosen


def _renamed(text: str, chosen: dict[str, str]) -> str:
    if not chosen:
        return text
    pattern = rf"(?<!\w)({'|'.join(map(re.escape, chosen))})(?!\w)"
    return re.sub(pattern, lambda match: chosen[match[1]], text)


def _cases(draft: Draft, rng: random.Random) -> list[tuple[tuple, Any]]:
    """Returns distinct arguments with their right results."""
    cases: dict[str, tuple[tuple, Any]] = {}
    wanted = rng.randint(*_TESTS)
    for _ in range(8 * wanted):
        if len(cases) == wanted:
            break
        arguments = draft.draw(rng)
        if repr(arguments) not in cases:
            cases[repr(arguments)] = arguments, draft.right(*copy.deepcopy(arguments))
    return list(cases.values())


def _layout(signature, statement, body, name, cases, rng) -> str:
    indent = " " * rng.choice((4, 4, 4, 2))
    calls = [f"{name}({', '.join(map(repr, arguments))})" for arguments, _ in cases]
    expected = [repr(right) for _, right in cases]
    shown = rng.randint(0, 2)
    examples = [f">>> {call}\n{right}" for call, right in zip(calls, expected, strict=True)]
    head = rng.choice(("docstring", "docstring", "comment"))
    if head == "docstring":
        shown_examples = "\n\n" + "\n".join(examples[:shown]) + "\n" if shown else ""
        body = f'"""{statement}{shown_examples}"""\n{body}'
        top = ""
    else:
        top = "\n".join(textwrap.wrap(statement, 88, initial_indent="# ", subsequent_indent="# "))
        top += "\n"
    if indent == "  ":
        body = re.sub(r"^((?:    )+)", lambda m: m[1][: len(m[1]) // 2], body, flags=re.MULTILINE)
    function = f"{top}{signature}\n{textwrap.indent(body, indent)}\n"
    style = rng.choice(("asserts", "function", "table"))
    if style == "table":
        rows = ",\n".join(f"{indent}({arguments!r}, {right!r})" for arguments, right in cases)
        tests = f"for arguments, expected in [\n{rows},\n]:\n{indent}assert {name}(*arguments) == expected\n"
    else:
        tests = "".join(map(_assertion, calls, expected))
        if style == "function":
            tests = f"def test_{name}():\n{textwrap.indent(tests, indent)}\n\ntest_{name}()\n"
    return f"{function}\n\n{tests}"


def _assertion(call: str, right: str) -> str:
    if right in ("True", "False"):
        return f"assert {'' if right == 'True' else 'not '}{call}\n"
    return f"assert {call} {'is' if right == 'None' else '=='} {right}\n"


_SWAPS: dict[type, type] = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add},
    **{ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In},
    **{ast.Or: ast.And, ast.And: ast.Or},
}


def _mutated(body: str, rng: random.Random) -> str | None:
    """Returns the body with one operator or number changed; None if it has none."""
    tree = ast.parse(body)
    places = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp) and type(node.op) in _SWAPS:
            places.append((node, "op"))
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
            places.append((node, "ops"))
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            places.append((node, "value"))
    if not places:
        return None
    node, field = rng.choice(places)
    if field == "op":
        node.op = _SWAPS[type(node.op)]()
    elif field == "ops":
        node.ops[0] = _SWAPS[type(node.ops[0])]()
    else:
        node.value += rng.choice((-1, 1))
    return ast.unparse(tree)
