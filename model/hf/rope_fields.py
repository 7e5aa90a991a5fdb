"""The fields of a config.json that hold rotary embeddings, there and back.

Newer files have `rope_parameters`, with the base in it; older ones `rope_theta` and `rope_scaling`. Both are read and
written. Families whose layers with a window have an embedding of their own have one entry for each type of layer.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from espalier.model.hf.config_fields import ConfigFields, UnsupportedConfig, expected_type
from espalier.model.rope import Rope

_LENGTH = {"original_max_position_embeddings": "original_length"}
# The fields that each rope_type needs, with the names of Rope's settings.
_NEEDED: dict[str, dict[str, str]] = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        **_LENGTH,
    },
    "yarn": {"factor": "factor", **_LENGTH},
}
# The fields that it may have.
_OPTIONAL = {"yarn": {x: x for x in ("beta_fast", "beta_slow", "truncate", "attention_factor")}}
_MAGNITUDES = ("mscale", "mscale_all_dim")
_MORE = {"yarn": (*_MAGNITUDES, "finetuned")}  # the last says how the model came about
_SHARE = "partial_rotary_factor"
_Read = TypeVar("_Read")
FULL, SLIDING = "full_attention", "sliding_attention"


def read_rope(
    fields: ConfigFields,
    layout: str = "half",
    *,
    base: tuple[str, float | None] = ("rope_theta", None),
    fraction: tuple[str, float] | None = None,
) -> Rope:
    """Returns the rotary embedding of all layers.

    Args:
      fields: the fields.
      layout: see Rope.
      base: name of the base outside of rope_parameters, and its default; without one it is needed.
      fraction: likewise of the share of rotated dimensions; None for families that rotate all.

    Raises:
      UnsupportedConfig: the base is missing, the kind of rotation is not supported, or a field is not known.
    """
    if fraction is None:
        fields.neutral(partial_rotary_factor=1.0)

    def read(key: str) -> Rope:
        own = dict(fields.get(key, {}))
        own["rope_theta"] = _agreed(fields, key, own, "rope_theta", *base)
        if fraction is not None:
            own[_SHARE] = _agreed(fields, key, own, _SHARE, *fraction)
        return _rope(fields, key, own, layout, partial=fraction is not None)

    return _of_both(fields, read)


def read_ropes(
    fields: ConfigFields, *, local: tuple[str | None, float], base: float | None = None
) -> tuple[Rope, Rope]:
    """Returns the rotary embeddings of layers without and with a window.

    Args:
      fields: the fields.
      local: name and default of the base of layers with a window in files without rope_parameters; the name is None if they
        have no such field.
      base: the only base of layers without a window that those files may have; None for any.

    Raises:
      UnsupportedConfig: see `read_rope`; or there is no entry for one type of layer.
    """
    fields.neutral(partial_rotary_factor=1.0)
    by_type = fields.get("rope_parameters", {})
    theta, (name, default) = fields.optional("rope_theta"), local
    if by_type and any(not isinstance(by_type.get(kind), Mapping) for kind in (FULL, SLIDING)):
        raise fields.error("rope_parameters", f"{FULL} and {SLIDING} in it must be objects")
    if unknown := sorted({*by_type} - {FULL, SLIDING}):
        raise fields.error("rope_parameters", f"{', '.join(unknown)} in it is not known")
    if not by_type and base is not None and theta not in (None, base):
        raise fields.error("rope_theta", f"only {base!r} is supported without rope_parameters")

    def read(key: str) -> tuple[Rope, Rope]:
        full = dict(by_type.get(FULL, {}) if key == "rope_parameters" else fields.get(key, {}))
        sliding = dict(by_type.get(SLIDING, {}))
        full["rope_theta"] = _agreed(fields, key, full, "rope_theta", "rope_theta", None)
        if name is not None or not by_type:
            sliding["rope_theta"] = _agreed(fields, key, sliding, "rope_theta", name, default)
        return _rope(fields, key, full, "half"), _rope(fields, key, sliding, "half")

    return _of_both(fields, read)


def _of_both(fields: ConfigFields, read: Callable[[str], _Read]) -> _Read:
    """Returns what `read` returns for each of the two spellings that a file has, which must be equal."""
    keys = [key for key in ("rope_parameters", "rope_scaling") if fields.optional(key)]
    found = [read(key) for key in keys or ["rope_scaling"]]
    if found[0] != found[-1]:
        raise fields.error("rope_scaling", "it differs from rope_parameters; remove one of them")
    return found[0]


def _agreed(
    fields: ConfigFields,
    key: str,
    own: Mapping[str, Any],
    inner: str,
    outer: str | None,
    default: Any,
) -> Any:
    """Returns the value of a field that may be in two places, which must agree."""
    value, outside = own.get(inner), None if outer is None else fields.optional(outer)
    if outer is not None and value is not None and outside not in (None, value):
        raise fields.error(outer, f"{key} has {value!r}; make them equal")
    found = outside if value is None else value
    return default if found is None else found


def _rope(
    fields: ConfigFields, key: str, own: Mapping[str, Any], layout: str, *, partial: bool = False
) -> Rope:
    """Returns the rotary embedding of one object of fields, `rope_theta` included."""
    own = {name: value for name, value in own.items() if value is not None}
    for name, value in own.items():
        if isinstance(value, dict):
            raise fields.error(key, f"{name} in it: only one rotation of all layers is supported")
    kind, same = own.pop("rope_type", None), own.pop("type", None)
    kind = kind or same or "default"
    if not isinstance(kind, str) or kind not in _NEEDED:
        raise fields.error(
            key,
            f"rope type {kind!r} is not supported, and {', '.join(_NEEDED)} are: use a model with one of these",
        )
    needed, optional = _NEEDED[kind], _OPTIONAL.get(kind, {})
    known = {"rope_theta", _SHARE, *needed, *optional, *_MORE.get(kind, ())}
    if unknown := sorted({*own} - known):
        raise fields.error(key, f"{', '.join(unknown)} in it: not known with rope type {kind!r}")
    for name, value in own.items():
        if expected := expected_type(name, value):
            raise fields.error(key, f"{name} in it must be {expected}")
    if (base := own.get("rope_theta")) is None:
        raise UnsupportedConfig(
            f"config.json ({fields.family}): neither rope_theta nor rope_parameters.rope_theta is "
            "there, and its default differs between versions of transformers: add the value that "
            'the model was trained with, as "rope_theta": 10000.0.'
        )
    share = own.get(_SHARE, 1.0)
    if share != 1 and (not partial or share > 1):
        raise fields.error(key, f"{_SHARE} must be {'at most ' if partial else ''}1")
    if missing := [name for name in needed if name not in own]:
        raise fields.error(key, f"{', '.join(missing)} is missing in it")
    settings: dict[str, Any] = {
        setting: own[name] for name, setting in {**needed, **optional}.items() if name in own
    }
    if any(name in own for name in _MAGNITUDES):
        settings["attention_factor"] = _magnitude(fields, key, own)
    if kind != "default":
        settings["scaling"] = kind
    try:
        return Rope(base=float(base), layout=layout, fraction=float(share), **settings)
    except ValueError as error:
        raise fields.error(key, str(error).removesuffix(".")) from None


def _magnitude(fields: ConfigFields, key: str, own: Mapping[str, Any]) -> float:
    """Returns the attention factor that a YaRN's mscale and mscale_all_dim give."""
    if not all(name in own for name in _MAGNITUDES) or "attention_factor" in own:
        raise fields.error(
            key,
            "mscale and mscale_all_dim in it are read only together and without attention_factor: remove what the model was "
            "not trained with",
        )
    usual = Rope(scaling="yarn", factor=own["factor"]).magnitude - 1
    numerator, denominator = (own[name] * usual + 1 for name in _MAGNITUDES)
    return numerator / denominator


def rope_parameters(
    here: Mapping[str, Any], name: str = "block.attention.rope", *, partial: bool = False
) -> dict[str, Any]:
    """Returns the object of fields of a described model's rotary embedding."""
    defaults = {field.name: field.default for field in dataclasses.fields(Rope)}
    rope = {setting: here.get(f"{name}.{setting}", defaults[setting]) for setting in defaults}
    kind = "default" if rope["scaling"] == "none" else rope["scaling"]
    names = {**_NEEDED.get(kind, {}), **_OPTIONAL.get(kind, {})}
    share = {_SHARE: rope["fraction"]} if partial else {}
    scaling = {theirs: rope[setting] for theirs, setting in names.items()}
    return {"rope_theta": rope["base"], **share, "rope_type": kind, **scaling}


def write_rope(here: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a described model's rotary embedding, in both spellings."""
    own = rope_parameters(here)
    return {"rope_theta": own["rope_theta"], "rope_scaling": _scaling(own), "rope_parameters": own}


def write_ropes(here: Mapping[str, Any], local: str | None = None) -> dict[str, Any]:
    """Returns the fields of a described model's two rotary embeddings; `local` is the name in `read_ropes`."""
    name = "block.attention.local_rope"
    full = rope_parameters(here)
    sliding = rope_parameters(here, name) if f"{name}.base" in here else full
    old = {"rope_theta": full["rope_theta"], "rope_scaling": _scaling(full)}
    if local is not None:
        old[local] = sliding["rope_theta"]
    return {**old, "rope_parameters": {FULL: full, SLIDING: sliding}}


def _scaling(own: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the field rope_scaling, from the object in rope_parameters."""
    scaling = {key: value for key, value in own.items() if key != "rope_theta"}
    return None if own["rope_type"] == "default" else scaling
