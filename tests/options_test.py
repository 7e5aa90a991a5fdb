"""Every option that gin can bind is read: no parameter of what gin files name, or of its alternatives, is ignored.

A parameter of a function has to occur in its body, and a field of a class as an attribute or, for getattr, as a string. Layers,
optimisers, schedules and losses have a stronger check (tests/options_programs_test.py), and must not lack it.
"""

import ast
import dataclasses
import functools
import importlib
import inspect
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import flax.linen as nn

from espalier.launch.config import gin_config, model_file
from espalier.trainers.optim import optimizers, schedules
from tests.options_effect import parameters, without_effect
from tests.options_programs_test import PROGRAMS, name_of

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("espalier", "model", "trainers", "data", "launch")
# Parameters that nothing reads, with the reason why they stay.
UNREAD = {
    "espalier.trainers.objectives.classification.classification.num_sources": "Recipe passes it to all objectives",
    "espalier.trainers.online.policy_gradient.actor_critic.num_sources": "Recipe passes it to all objectives",
    "espalier.trainers.online.policy_gradient.policy_gradient.num_sources": "Recipe passes it to all objectives",
}
# Registered for recorded models, without a program of their own.
WRAPPERS = {
    "adapter.named",
    "lowrank.factorised",
    "mlp.by_kind",
    "moa.experts_of",
    "moe.experts_of",
}
# Layers of an extra that tests need not have; tests/model/quantised has their programs where it is installed.
OF_EXTRAS = {"quantised_dense.QuantisedDense", "quantised_dense.quantised"}


def test_no_option_is_ignored():
    unread = {
        f"{name_of(target)}.{name}"
        for target in targets()
        for name in parameters_by_keyword(target)
        if not is_read(target, name)
    }
    assert unread == set(UNREAD)


def test_layers_optimisers_schedules_and_losses_have_programs():
    modules = {x.__module__ for x in targets() if ".preference.losses." in x.__module__}
    modules |= {optimizers.__name__, schedules.__name__}
    functions = [x for x in targets() if x.__module__ in modules and inspect.isfunction(x)]
    own = [getattr(importlib.import_module(m), name) for m, name in classes()]
    needed = {name_of(x) for x in (*functions, *own) if has_keywords(x)}
    assert needed - {name_of(x) for x in PROGRAMS} == set()


def classes() -> list[tuple[str, str]]:
    """Modules and names of the layers that gin files and recorded models name."""
    return [
        place
        for name, place in model_file.REGISTERED.items()
        if not place[0].startswith("jax.") and name not in WRAPPERS | OF_EXTRAS
    ]


def has_keywords(target: Any) -> bool:
    """Whether it has parameters, apart from those of positional functions of arrays."""
    kinds = [p.kind for p in inspect.signature(target).parameters.values()]
    return inspect.isclass(target) or inspect.Parameter.KEYWORD_ONLY in kinds


def is_public(value: Any, module: Any) -> bool:
    own = getattr(value, "__module__", None) == module.__name__
    return own and callable(value) and not value.__name__.startswith("_")


@functools.cache
def targets() -> tuple[Any, ...]:
    """Returns what the gin files name, the entry functions, and the public alternatives in the same modules."""
    chosen: dict[str, Any] = {}
    for file in sorted((ROOT / "t5x_configs").rglob("*.gin")):
        checked = gin_config.check([str(file)], fragment=True)
        chosen |= {name: target.value for name, target in checked.targets.items()}
    for path in (ROOT / "launch").rglob("*.py"):
        for module, name in re.findall(r'entry="([\w.]+):(\w+)"', path.read_text("utf-8")):
            chosen[f"{module}.{name}"] = getattr(importlib.import_module(module), name)
    named = [
        value for value in chosen.values() if getattr(value, "__module__", "").startswith(PACKAGES)
    ]
    modules = {sys.modules[value.__module__] for value in named}
    others = [x for module in modules for x in vars(module).values() if is_public(x, module)]
    classes_and_functions = (
        x for x in (*named, *others) if inspect.isclass(x) or inspect.isfunction(x)
    )
    return tuple({name_of(x): x for x in classes_and_functions}.values())


def parameters_by_keyword(target: Any) -> list[str]:
    """Returns the parameters that a binding can reach: the others of a function are its caller's."""
    names = list(parameters(target))
    if inspect.isclass(target):
        return names
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    every = inspect.signature(target).parameters
    return [
        n for n in names if every[n].kind != positional or every[n].default is not every[n].empty
    ]


def is_read(target: Any, name: str) -> bool:
    """Returns whether the source of a function or class, or of what it is used by, reads a parameter."""
    if not inspect.isclass(target):
        own = inspect.get_annotations(inspect.unwrap(target))
        if "settings" in own and name not in own:  # a field of them, see `with_settings`
            return is_read(own["settings"], name)
        return name in loaded(tree_of(target))
    if not dataclasses.is_dataclass(target):
        holder = next(c for c in inspect.getmro(target) if "__init__" in vars(c))
        return name in loaded(tree_of(holder.__init__))
    family = (*inspect.getmro(target), *target.__subclasses__())
    own = (tree_of(c) for c in family if c.__module__.startswith(PACKAGES))
    return (
        any(name in attributes(tree, of_self=True) for tree in own)
        or name in attributes_elsewhere()
    )


@functools.cache
def tree_of(target: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(target)))


def loaded(tree: ast.AST) -> set[str]:
    """The names that are read; `del name` does not count."""
    return {x.id for x in ast.walk(tree) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load)}


def attributes(tree: ast.AST, *, of_self: bool) -> Iterator[str]:
    """The attributes that are read, of `self` or of other objects, and the texts by which getattr may read them."""
    for x in ast.walk(tree):
        if isinstance(x, ast.Attribute) and isinstance(x.ctx, ast.Load):
            owner = getattr(x.value, "id", None)
            yield from [x.attr] if of_self == (owner == "self") else []
        if isinstance(x, ast.Constant) and isinstance(x.value, str):
            yield x.value


@functools.cache
def attributes_elsewhere() -> set[str]:
    paths = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    trees = (ast.parse(path.read_text("utf-8")) for path in paths)
    return {name for tree in trees for name in attributes(tree, of_self=False)}


class Ignoring(nn.Module):
    """A layer with an option that changes nothing."""

    width: int = 3
    an_option_that_nothing_reads: float = 0.5

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x * self.width


def ignoring(*, width: int = 3, depth: int = 2) -> int:
    del depth
    return width


def test_the_checks_can_fail():
    assert [is_read(Ignoring, name) for name in parameters(Ignoring)] == [True, False]
    assert [is_read(ignoring, name) for name in parameters_by_keyword(ignoring)] == [True, False]
    dead = without_effect(ignoring, lambda **fields: str(ignoring(**fields)), base={}, values={})
    assert dead == ["depth"]
    seen = without_effect(
        Ignoring, lambda **fields: str(Ignoring(**fields).apply({}, 2)), base={}, values={}
    )
    assert seen == ["an_option_that_nothing_reads"]
