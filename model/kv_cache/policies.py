"""Cache policies and their settings by name, for `--cache_policy`."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from espalier.model.kv_cache.base import CachePolicy
from espalier.model.kv_cache.by_layer import ByLayer
from espalier.model.kv_cache.full import FullCache, Sliding, StreamingLLM
from espalier.model.kv_cache.selecting import H2O, Oracle, Random, Tova
from espalier.model.kv_cache.snapkv import AdaKV, PyramidKV, SnapKV

# Each policy is a frozen dataclass; its fields are its settings.
POLICIES: dict[str, type] = {
    "full": FullCache,
    "sliding": Sliding,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "h2o": H2O,
    "tova": Tova,
    "streaming_llm": StreamingLLM,
    "random": Random,
    "oracle": Oracle,
}

_COUNT = re.compile("[1-9][0-9]{0,3}")  # of layers


def policy_named(name: str, **settings: Any) -> CachePolicy:
    """Returns the policy `name` with these settings; other settings have their defaults.

    Raises:
      ValueError: an unknown policy, an unknown setting or an invalid value.
    """
    policy = _policy(name)
    known = {field.name for field in dataclasses.fields(policy)}
    try:
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"it has no {', '.join(unknown)}")
        return policy(**settings)
    except ValueError as error:
        problem = str(error).rstrip(".")
        raise ValueError(f"Cache policy {name!r}: {problem}. {_settings(policy)}") from None


def policy_from_text(name: str, settings: Mapping[str, str]) -> CachePolicy:
    """Returns a policy from settings as strings, which are parsed by the types of its fields.

    Args:
      name: a policy's name, or a list of policies by layer with their settings, such as '2*full; snapkv capacity=512',
        which is repeated over the layers.
      settings: of a single policy.

    Raises:
      ValueError: as `policy_named`, or a string is not a value of its field's type, or a malformed list.
    """
    if set(name) & set("; *"):
        return _by_layer(name, settings)
    policy = _policy(name)
    hints = typing.get_type_hints(policy)
    values: dict[str, Any] = {}
    for key, text in settings.items():
        try:
            values[key] = _parsed(text, hints[key]) if key in hints else text
        except ValueError:
            raise ValueError(
                f"Cache policy {name!r}: {key} = {text!r} is not of type {_type(hints[key])}. "
                f"{_settings(policy)}"
            ) from None
    return policy_named(name, **values)


def settings_of(texts: Iterable[str]) -> dict[str, str]:
    """Returns the settings for `policy_from_text` from the texts of --cache.

    Raises:
      ValueError: a text is not NAME=VALUE, or a setting is set twice.
    """
    settings: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--cache={text}: expected NAME=VALUE, such as --cache=capacity=1024.")
        if name in settings:
            raise ValueError(f"--cache={name} is set twice: remove one.")
        settings[name] = value
    return settings


def _by_layer(text: str, settings: Mapping[str, str]) -> ByLayer:
    if settings:
        raise ValueError(
            f"Cache policies by layer have settings of their own: write {', '.join(settings)} after the names that it is for, "
            "such as 'full; snapkv capacity=512'."
        )
    policies: list[CachePolicy] = []
    for part in text.split(";"):
        first, *pairs = part.split() or [""]
        count, times, name = first.rpartition("*")
        own = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        if len(own) < len(pairs) or (times and not _COUNT.fullmatch(count)):
            raise ValueError(
                f"Cache policies by layer: {part.strip()!r} is not [N*]NAME [SETTING=VALUE ...] with each setting once, such "
                "as '2*snapkv capacity=512'."
            )
        policies += [policy_from_text(name, own)] * int(count or 1)
    return ByLayer(tuple(policies))


def _policy(name: str) -> type:
    if name not in POLICIES:
        raise ValueError(f"Unknown cache policy {name!r}: choose from {sorted(POLICIES)}.")
    return POLICIES[name]


def _settings(policy: type) -> str:
    """Returns a sentence that lists the settings of a policy."""
    hints = typing.get_type_hints(policy)
    parts = [
        f"{field.name}: {_type(hints[field.name])} = {field.default!r}"
        for field in dataclasses.fields(policy)
    ]
    return f"Its settings: {', '.join(parts)}." if parts else "It has no settings."


def _type(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)


def _parsed(text: str, hint: Any) -> Any:
    """Parses `text` as int, float, bool, str or a Literal, or as one of these or None."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if text.lower() == "none":
            return None
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return hint(text) if hint in (int, float) else text
