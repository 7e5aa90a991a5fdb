"""The trainable set seam: path patterns select the parameters that are optimised.

Frozen parameters get no gradient, no moments and no weight decay.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax

from espalier.model import axes


def path_name(path: tuple[Any, ...]) -> str:
    """'layers/block_0/mlp/up/kernel' for a key path of a nested dict (or other pytree)."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def expression(pattern: str, *, what: str) -> re.Pattern[str]:
    """Returns a regular expression; raises ValueError, which names `what` it is, for a text that is none."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"The {what} {pattern!r} is not a regular expression: {error}.") from None


def match(patterns: Sequence[str], params: Any, *, what: str = "pattern") -> Any:
    """Returns a tree of bools: whether a leaf's whole path matches one of the regular expressions.

    Args:
      patterns: regular expressions for whole paths. One that begins with '!' excludes what it matches; the last
        pattern that matches a path decides.
      what: the name of a pattern in the error.

    Raises:
      ValueError: a pattern that matches no parameter, with the nearest paths, or is no regular expression.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    chosen = dict.fromkeys(names, False)
    for pattern in patterns:
        regex = expression(pattern.removeprefix("!"), what=what)
        hits = [name for name in names if regex.fullmatch(name)]
        if not hits:
            examples = ", ".join(names[:4])
            raise ValueError(
                f"The {what} {pattern!r} matches none of the {len(names)} parameters; paths look "
                f"like {examples}."
            )
        chosen.update(dict.fromkeys(hits, not pattern.startswith("!")))
    return jax.tree_util.tree_map_with_path(lambda path, _: chosen[path_name(path)], params)


def mask_of(patterns: Sequence[str], boxed: Any) -> Any:
    """Returns a tree of bools: the parameters that match and are not data; None for all.

    Args:
      patterns: as in `match`; none for all parameters.
      boxed: parameters with their logical axes; those with axes.CONSTANT are data.

    Raises:
      ValueError: see `match`; or the patterns leave no parameter to train.
    """
    data = jax.tree.map(lambda box: axes.CONSTANT in box.names, boxed, is_leaf=axes.is_boxed)
    if not patterns:
        everything = not any(jax.tree.leaves(data))
        return None if everything else jax.tree.map(lambda is_data: not is_data, data)
    chosen = match(patterns, data, what="trainable pattern")
    mask = jax.tree.map(lambda keep, is_data: keep and not is_data, chosen, data)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"The trainable patterns {list(patterns)} leave no parameter to train: one that begins with '!' takes from what others "
            "before it match, so begin with '.*' for all but some."
        )
    return mask


def split(params: Any, mask: Any) -> tuple[Any, Any]:
    """Returns (trainable, frozen): the same tree twice, with None where the other has the leaf; mask None trains all."""
    if mask is None:
        return params, jax.tree.map(lambda _: None, params)
    trainable = jax.tree.map(lambda leaf, keep: leaf if keep else None, params, mask)
    frozen = jax.tree.map(lambda leaf, keep: None if keep else leaf, params, mask)
    return trainable, frozen


def join(trainable: Any, frozen: Any) -> Any:
    """The inverse of `split`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, trainable, frozen, is_leaf=lambda leaf: leaf is None
    )


def matching(patterns: Sequence[str], *, what: str) -> Callable[[Any], Any]:
    """`match` as a function of the parameters, the form optax takes for its masks."""
    return lambda params: match(patterns, params, what=what)
