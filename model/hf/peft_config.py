"""adapter_config.json of Hugging Face's peft, of which no field is passed over.

A field is read, or describes how the tensors in the file came about, or must have a value without effect. The fields are those
of peft 0.3 to 0.21.
"""

import dataclasses
import math
import pathlib
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from espalier.model.hf.files.safetensors_files import read_json
from espalier.model.transforms import patterns

CONFIG = "adapter_config.json"
_DEFAULT = 8  # of r and lora_alpha
# Fields without influence on what the tensors of a file compute.
_DESCRIPTIVE = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("target_modules", "exclude_modules", "feedforward_modules", "layers_to_transform"),
    *("layers_pattern", "task_type", "fan_in_fan_out", "init_ia3_weights", "runtime_config"),
    *("megatron_config", "megatron_core", "qalora_group_size"),
    # Of initialisations; peft reads each for its own `init_lora_weights` alone.
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
# Initialisations that leave the base model's weights as they are.
_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")


class PeftError(ValueError):
    """Adapters that one of the two formats does not have."""


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _rate(value: Any) -> bool:
    return _number(value) and 0 <= value < 1


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The settings of an adapter that its tensors do not tell.

    Attributes:
      kind: 'LORA' or 'IA3'.
      rank, alpha: of modules without their own.
      ranks, alphas: (pattern, value) of modules with their own; the first pattern that matches counts.
      stabilised, dora: whether it is rsLoRA, DoRA.
      dropout: rate in training.
      parameters: names of adapted parameters, or their last parts: of experts, which are stacked.
      version: of peft; None if it is not recorded.
    """

    kind: str
    rank: int = _DEFAULT
    alpha: float = _DEFAULT
    ranks: tuple[tuple[str, int], ...] = ()
    alphas: tuple[tuple[str, float], ...] = ()
    stabilised: bool = False
    dora: bool = False
    dropout: float = 0.0
    parameters: tuple[str, ...] = ()
    version: tuple[int, ...] | None = None

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module of the transformers model."""
        return _first(self.ranks, module, self.rank)

    def scale(self, module: str | None, rank: int) -> float:
        """Returns the factor of A B: of a module or, without one, of modules without their own alpha."""
        alpha = self.alpha if module is None else _first(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.stabilised else rank)


def _first(own: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    """Returns the value of the first pattern that matches a module or what follows a dot in its name, as in peft."""
    matching = (x for pattern, x in own if patterns.fullmatch(rf"(?:.*\.)?(?:{pattern})", module))
    return next(matching, default)


def read(folder: str) -> PeftConfig:
    """Returns the settings in a directory of peft.

    Raises:
      PeftError: another kind of adapter, a value of another type, or a field that has an effect and no counterpart.
      CheckpointFileError: the file is missing or damaged.
    """
    path = pathlib.Path(folder, CONFIG)
    fields = read_json(path)
    kind = fields.get("peft_type")
    if kind not in ("LORA", "IA3"):
        raise PeftError(f"{path}: peft_type {_shown(kind)} is not supported: LORA and IA3 are.")
    values: dict[str, Any] = {}

    def take(field: str, name: str, fits: Callable[[Any], bool], expected: str) -> None:
        if (value := fields.pop(name, None)) is not None:
            if not fits(value):
                raise PeftError(f"{path}: {name} = {_shown(value)}: it must be {expected}.")
            values[field] = value

    def take_patterns(field: str, name: str, fits: Callable[[Any], bool], expected: str) -> None:
        own = fields.pop(name, None) or {}
        if not isinstance(own, Mapping) or not all(map(fits, own.values())):
            raise PeftError(
                f"{path}: {name} = {_shown(own)}: it must be an object of patterns, each with {expected}."
            )
        for pattern in own:
            try:
                patterns.compiled(pattern)
            except patterns.PatternError as error:
                raise PeftError(f"{path}: {name}: {error}.") from None
        values[field] = tuple(own.items())

    if kind == "LORA":
        take("rank", "r", _count, "a whole number above 0")
        take("alpha", "lora_alpha", _positive, "a number above 0")
        take("dropout", "lora_dropout", _rate, "a number from 0 to below 1")
        take("stabilised", "use_rslora", _flag, "true or false")
        take("dora", "use_dora", _flag, "true or false")
        take_patterns("ranks", "rank_pattern", _count, "a whole number above 0")
        take_patterns("alphas", "alpha_pattern", _number, "a number")
        take("parameters", "target_parameters", _names, "a list of names of parameters")
        _check_initialisation(path, fields.pop("init_lora_weights", True))
    for name in sorted({*fields} - _DESCRIPTIVE - {"peft_type"}):
        if fields[name] not in (None, False, [], {}, "none"):
            raise PeftError(
                f"{path}: {name} = {_shown(fields[name])} is not supported: merge the adapter into its model with peft "
                "(merge_and_unload), and import that with --from_hf; remove the field if it is only a remark."
            )
    values["parameters"] = tuple(values.get("parameters", ()))
    release = re.match(r"(\d+)\.(\d+)\.(\d+)", str(fields.get("peft_version")), re.ASCII)
    version = tuple(map(int, release.groups())) if release else None
    return PeftConfig(kind=kind, version=version, **values)


def _check_initialisation(path: pathlib.Path, value: Any) -> None:
    if (value.lower() if isinstance(value, str) else value) not in _INITIALISATIONS:
        raise PeftError(
            f"{path}: init_lora_weights = {_shown(value)}: this initialisation changes the base model's weights, so the adapter "
            "does not belong to the original ones. Save it as plain LoRA with peft (save_pretrained with "
            "path_initial_model_for_weight_conversion), or merge it (merge_and_unload) and import the model with --from_hf."
        )


def _shown(value: Any) -> str:
    return reprlib.repr(value)[:200]
