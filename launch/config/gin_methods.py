"""Checks that the gin files of methods (below a folder `methods`) do not silently replace each other's bindings.

The methods of one run must combine. A method's file may change the bindings of a file that it includes or that it names
in its list REPLACES. The user's own files and the command line may change any binding.
"""

from collections.abc import Callable, Sequence
from typing import Any

from espalier.launch.config.gin_reach import Reach
from espalier.launch.config.gin_reader import REPLACES, Bound, Checked, is_required
from espalier.launch.config.gin_source import Place, Problem, scoped


def is_method(file: str) -> bool:
    """Returns whether a file is a method's."""
    return "/methods/" in file


def conflicts(checked: Checked) -> list[Problem]:
    """Returns a problem for each pair of method files where the later replaces values of the earlier."""
    pairs: dict[tuple[str, str], list[tuple[str, Bound, Bound]]] = {}
    for key, history in checked.history.items():
        if (earlier := _replaced(checked, key, history)) is not None:
            files = (earlier.file, history[-1].file)
            pairs.setdefault(files, []).append((_name(key), earlier, history[-1]))
    problems = []
    for (name, earlier, later), *more in pairs.values():
        also = f" (and {', '.join(name for name, _, _ in more)})" if more else ""
        text = f"replaces '{name}' of another method{also}, which is {earlier.value!r} at {earlier.place}"
        remedy = (
            f"Use one of the two files, or choose: --gin.{name}=VALUE. A file that refines another "
            f"includes it, or names what it replaces: {REPLACES} = ['{name}']."
        )
        problems.append(Problem(later.place, text, remedy))
    return problems


def _replaced(checked: Checked, key: Any, history: Sequence[Bound]) -> Bound | None:
    """Returns the binding of another method that a key's last binding may not replace, or None."""
    last = history[-1]
    allowed = {last.file, *checked.includes.get(last.file, ())}
    names = checked.replaces.get(last.file, [])
    if not is_method(last.file) or any(_name(key).endswith(str(name)) for name in names):
        return None
    for earlier in reversed(history[:-1]):
        if not is_method(earlier.file):  # the user already replaced the method's binding
            return None
        differs = earlier.meaning() != last.meaning() and not is_required(earlier.value)
        if differs and earlier.file not in allowed:
            return earlier
    return None


def without_effect(
    checked: Checked, reach: Reach, so_far: Sequence[tuple[str, Callable[[], Reach]]]
) -> list[Problem]:
    """Returns a problem for each method's file without any effect, unless the user's own bindings replaced its effect.

    Args:
      checked, reach: the whole configuration and its reach.
      so_far: each file in reading order, with the reach of the configuration up to it.
    """
    problems = []
    for file, (place, own) in _bound_alone(checked).items():
        if _effective(reach, own):
            continue
        files = [name for name, _ in so_far]
        effective = [
            i for i in range(files.index(file), len(files)) if _effective(so_far[i][1](), own)
        ]
        if not effective:
            text = "has no effect: this run uses nothing that only this file binds"
            remedy = "It is for another kind of run or model, or another method replaces it."
            problems.append(Problem(place, text, remedy))
            continue
        undone_by = [*files, ""][effective[-1] + 1]
        refined = file in checked.includes.get(undone_by, ()) or undone_by in checked.replaces
        if is_method(undone_by) and not refined:
            text = f"has no effect: {undone_by} replaces everything that it binds"
            problems.append(Problem(place, text, "Use one of the two."))
    return problems


def _bound_alone(checked: Checked) -> dict[str, tuple[Place, list[tuple[Any, Bound]]]]:
    """Returns, for each method's file, its place and the bindings that no unrelated method has too.

    A file that another method includes belongs to that method.
    """
    parts = {part for file, files in checked.includes.items() if is_method(file) for part in files}
    own: dict[str, tuple[Place, list[tuple[Any, Bound]]]] = {}
    for key, history in checked.history.items():
        bounds = [bound for bound in history if is_method(bound.file)]
        for bound in (bound for bound in bounds if bound.file not in parts):
            related = {bound.file, *checked.includes.get(bound.file, ())}
            shared = any(
                again.file not in related
                and bound.file not in checked.includes.get(again.file, ())
                and again.meaning() == bound.meaning()
                for again in bounds
            )
            _, alone = own.setdefault(bound.file, (Place(bound.place.source), []))
            if not shared:
                alone.append((key, bound))
    return own


def _effective(reach: Reach, bounds: Sequence[tuple[Any, Bound]]) -> bool:
    """Returns whether any of these bindings and macros is final and used."""
    for key, bound in bounds:
        is_macro = isinstance(key, str)
        current = (reach.checked.macros if is_macro else reach.checked.bindings).get(key)
        used = key in reach.macros if is_macro else reach.ways_in(key[1], key[0])
        if used and current is not None and current.meaning() == bound.meaning():
            return True
    return False


def _name(key: Any) -> str:
    """Returns a short text for a key: a macro, or 'scope/module.Class.argument'."""
    if isinstance(key, str):
        return key
    scope, target, argument = key
    return scoped(scope, ".".join([*target.split(".")[-2:], argument]))
