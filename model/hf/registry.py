"""The supported families, and the family of a config.json or of a model.

A family is an entry of `FAMILIES` in a file of model/hf/families/; every file there is read.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from espalier.model.hf import families
from espalier.model.hf.config_fields import UnsupportedConfig
from espalier.model.hf.family import Family, UnsupportedModel, check_language_model

# By the names of the files, and in their order there. Exports use the first family that can express the model, so a file
# whose families have more features comes after one with fewer.
FAMILIES: tuple[Family, ...] = tuple(
    family
    for name in sorted(module.name for module in pkgutil.iter_modules(families.__path__))
    for family in importlib.import_module(f"{families.__name__}.{name}").FAMILIES
)


def family_named(name: str) -> Family:
    """Returns the family with this model_type.

    Raises:
      ValueError: there is no such family.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ValueError(f"No family {name!r}: choose from {', '.join(f.name for f in FAMILIES)}.")


def family_of_config(config: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json.

    Raises:
      UnsupportedConfig: its model_type is not supported, or it needs remote code.
    """
    if config.get("auto_map"):
        raise UnsupportedConfig(
            "config.json: 'auto_map' names code that comes with the checkpoint, which is never run. If "
            "the model is of a supported model_type all the same, remove the key."
        )
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(x, str) for x in architectures):
        raise UnsupportedConfig(
            f"config.json: architectures = {architectures!r} must be a list of texts, such as "
            '["LlamaForCausalLM"].'
        )
    for family in FAMILIES:
        same = family.architecture in architectures
        if (same and model_type in (family.name, None)) or (
            model_type == family.name and not architectures
        ):
            return family
    supported = ", ".join(f"{f.name} ({f.architecture})" for f in FAMILIES)
    raise UnsupportedConfig(
        f"config.json: model_type {model_type!r} with architectures {architectures} is not "
        f"supported; supported are {supported}."
    )


def family_of_model(model: Any) -> Family:
    """Returns the first family that can express the model.

    Raises:
      UnsupportedModel: no family can; the message names what the nearest one lacks.
    """
    check_language_model(model)
    reasons: list[UnsupportedModel] = []
    for family in FAMILIES:
        try:
            family.config(model)
        except UnsupportedModel as error:
            reasons.append(error)
        else:
            return family
    nearest = min(reasons, key=lambda error: error.count)
    raise UnsupportedModel(
        f"No family of Hugging Face has this model. The nearest lacks least: {nearest} Change these settings before training, or "
        "use the run, which every command here reads.",
        count=nearest.count,
    )
