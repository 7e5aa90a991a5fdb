"""Checks that the gin files of methods (below a folder `methods`) do not silently replace each other's bindings.

The methods of one run must combine. A method's file may change the bindings of a file that it includes or that it names
in its list REPLACES. The user's own files and the command line may change any binding.
"""

from collections.abc import Callable, Sequence
from typing import Any

from launch.config.gin_reach import Reach
from launch.config.gin_reader import REPLACES, Bound, Checked, is_required
from launch.config.gin_source import Place, Problem


def is_method(file: str) -> bool:
    """Returns whether a file is a method's."""
    return "/methods/" in file


def conflicts(checked: Checked) -> list[Problem]:
    """Returns a problem for each pair of method files where the later replaces values of the earlier."""
    pairs: dict[tuple[str, str], list[tuple[Any, Bound, Bound]]] = {}
    for key, history in checked.history.items():
        if (earlier := _replaced(checked, key, history)) is not None:
            pairs.setdefault((earlier.file, history[-1].file), []).append(
                (key, earlier, history[-1])
            )
    problems = []
    for replaced in pairs.values():
        (key, earlier, later), *more = replaced
        also = f" (and {', '.join(_name(other) for other, _, _ in more)})" if more else ""
        where = f"{_name(key)}=VALUE"
        problems.append(
            Problem(
                later.place,
                f"replaces '{_name(key)}' of another method{also}, which is {earlier.value!r} at "
                f"{earlier.place}",
                f"Use one of the two files, or choose: --gin.{where}. A file that refines another "
                f"includes it, or names what it replaces: {REPLACES} = ['{_name(key)}'].",
            )
        )
    return problems


def _replaced(checked: Checked, key: Any, history: Sequence[Bound]) -> Bound | None:
    """Returns the binding of another method that a key's last binding replaces; None if there is none or it may."""
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
      checked: the whole configuration.
      reach: reach of the whole configuration.
      so_far: each file in reading order, with the reach of the configuration up to it.
    """
    problems = []
    for file, (place, own) in _bound_alone(checked).items():
        if _effective(reach, own):
            continue
        first = next(index for index, (name, _) in enumerate(so_far) if name == file)
        states = [(name, _effective(before(), own)) for name, before in so_far[first:]]
        if not any(state for _, state in states):
            text = "has no effect: this run uses nothing that only this file binds"
            remedy = (
                "It belongs to another kind of run or model, or another method takes its place."
            )
            problems.append(Problem(place, text, remedy))
            continue
        last = max(index for index, (_, state) in enumerate(states) if state)
        undone_by = states[last + 1][0] if last + 1 < len(states) else ""
        refined = file in checked.includes.get(undone_by, ()) or undone_by in checked.replaces
        if is_method(undone_by) and not refined:
            text = f"has no effect: {undone_by} takes the place of everything that it binds"
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
                other.file not in related
                and bound.file not in checked.includes.get(other.file, ())
                and other.meaning() == bound.meaning()
                for other in bounds
            )
            _, alone = own.setdefault(bound.file, (Place(bound.place.source), []))
            if not shared:
                alone.append((key, bound))
    return own


def _effective(reach: Reach, bounds: Sequence[tuple[Any, Bound]]) -> bool:
    """Returns whether any of these bindings and macros is final and used."""
    for key, bound in bounds:
        current = (reach.checked.macros if isinstance(key, str) else reach.checked.bindings).get(
            key
        )
        if current is None or current.meaning() != bound.meaning():
            continue
        if isinstance(key, str) and key in reach.macros:
            return True
        if not isinstance(key, str) and reach.ways_in(key[1], key[0]):
            return True
    return False


def _name(key: Any) -> str:
    """Returns a short text for a key: a macro, or 'scope/module.Class.argument'."""
    if isinstance(key, str):
        return key
    scope, target, argument = key
    return f"{scope}/" * bool(scope) + ".".join([*target.split(".")[-2:], argument])
