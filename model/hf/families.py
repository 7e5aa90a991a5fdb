"""Selects a family by its name, by a config.json, or by a model that it can express."""

from collections.abc import Mapping
from typing import Any

from model.hf.cohere import COHERE, COHERE2
from model.hf.config_fields import UnsupportedConfig
from model.hf.family import Family, UnsupportedModel
from model.hf.gemma2 import GEMMA2
from model.hf.gpt2 import GPT2
from model.hf.llama import LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3
from model.transformer import Transformer

# Exports use the first family that can express the model.
FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, GEMMA2, COHERE, COHERE2, GPT2)


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
        same = set(architectures) & set(family.architectures)
        if model_type == family.name and (same or not architectures):
            return family
        if model_type is None and same:
            return family
    supported = ", ".join(f"{f.name} ({f.architectures[0]})" for f in FAMILIES)
    raise UnsupportedConfig(
        f"config.json: model_type {model_type!r} with architectures {list(architectures)} is not "
        f"supported; supported are {supported}."
    )


def family_of_model(model: Transformer) -> Family:
    """Returns the first family that can express the model.

    Raises:
      UnsupportedModel: no family can; the message has the reason for each.
    """
    reasons = []
    for family in FAMILIES:
        try:
            family.config(model)
        except UnsupportedModel as error:
            reasons.append(str(error))
        else:
            return family
    raise UnsupportedModel("\n".join(reasons))
