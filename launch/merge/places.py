"""Where tensors are in a model: stacks of layers, tensors before and after them, tables of the vocabulary."""

import re
from collections.abc import Sequence

from espalier.launch.merge import config_defaults
from espalier.launch.merge.models import Entry, HfModel, Model

# Tensors that come before the layers; other tensors outside of layers come after them.
FIRST = re.compile(
    r"(?!lm_head)(?:.*[./])?(?:token_embed|embed_tokens|wte|wpe|shared|word_embeddings|positions?|"
    r"position_embeddings|embed_positions|embeddings?|relative_(?:attention_)?bias\w*)(?:[./].*)?"
)
HEAD = re.compile(r"(?:.*[./])?(?:lm_head|output_projection|embed_out)[./].*")


def stacks_of(model: Model) -> list[str]:
    """Returns a model's stacks of layers."""
    places = (entry.place.stack for entry in model.tensors.values())
    return list(dict.fromkeys(stack for stack in places if stack is not None))


def short(stack: str, stacks: Sequence[str]) -> str:
    """Returns the name of a stack in `modules`: that of its owner, or 'default' for the only one."""
    if len(stacks) == 1:
        return "default"
    owner, _, _ = stack.replace("/", ".").rpartition(".")
    return owner or "decoder"


def by_layer(model: Model) -> dict[tuple[str, int | None], list[str]]:
    """Returns the names of a model's tensors in each layer."""
    held = getattr(model, "_by_layer", None)
    if held is None:
        held = {}
        for entry in model.tensors.values():
            if entry.place.stack is not None:
                held.setdefault((entry.place.stack, entry.place.layer), []).append(entry.place.rest)
        model._by_layer = held  # type: ignore[union-attr]
    return held


def depth(model: Model, stack: str) -> int:
    layers = {layer for name, layer in by_layer(model) if name == stack}
    return len(layers)


def is_tied(model: Model) -> bool:
    """Returns whether a model's head is the table of the tokens."""
    if not isinstance(model, HfModel):
        return False
    default = config_defaults.of(model.config).get("tie_word_embeddings")
    return model.config.get("tie_word_embeddings", default) is True


def is_vocabulary(entry: Entry, size: int) -> bool:
    """Returns whether the rows of a tensor are the tokens of a vocabulary of this size."""
    name = entry.names[0]
    rows = bool(entry.shape) and entry.shape[0] == size
    positions = re.search(
        r"(^|[./])(wpe|positions?|position_embeddings|embed_positions)([./]|$)", name
    )
    return rows and not positions and bool(FIRST.fullmatch(name) or HEAD.fullmatch(name))


def is_embedding(name: str) -> bool:
    """Returns whether a tensor is the table of the tokens."""
    return bool(
        re.search(r"(^|[./])(token_embed|embed_tokens|wte|shared|word_embeddings)([./]|$)", name)
    )
