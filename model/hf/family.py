"""A family of Hugging Face models: its config.json and the names of its tensors.

A family is data and two functions. `read` makes a model from a config.json; `write` makes the fields of
a config.json from a model's description (model/hf/description.py). No list of unsupported features is
needed: a model is supported if `read` returns a model with the same description from the written
config.json.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from model.hf.config_fields import ConfigFields, UnsupportedConfig
from model.hf.description import describe, differences, native_shapes
from model.hf.mapping import Piece, Row, hf_shapes, pieces_of
from model.transformer import Transformer


class UnsupportedModel(ValueError):  # noqa: N818
    """A model that a family cannot express; the message names the features."""


class MismatchedTensors(ValueError):  # noqa: N818
    """Tensors that are missing, unexpected, or of another shape; one message has all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face's transformers.

    Attributes:
      name: the model_type, such as 'cohere2'.
      architectures: the class names in config.json; exports write the first.
      read: returns a Transformer from the fields of a config.json. Its factories are
        `functools.partial`s of this project's classes, so that their settings can be inspected.
      write: returns the family's own config.json fields from a model's description.
      rows: names of the arrays, see mapping.Row.
      ignored: patterns that match the whole names of tensors that carry no weights.
      tied: for each tensor that the model has no array for, the tensor that it must be equal to if
        the checkpoint has both, such as a tied head and the embedding.
      prefix: prefix of tensor names that is missing in checkpoints of the model without its head.
    """

    name: str
    architectures: tuple[str, ...]
    read: Callable[[ConfigFields], Transformer]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    tied: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"lm_head.weight": "model.embed_tokens.weight"}
    )
    prefix: str = "model."

    def model(self, config: Mapping[str, Any]) -> Transformer:
        """Returns the model of a config.json, with scanned layers and the dtype of config.json.

        Raises:
          UnsupportedConfig: a field has an unsupported value, or a field whose default differs
            between versions of transformers is absent.
        """
        return self.read(ConfigFields(self.name, config))

    def config(self, model: Transformer) -> dict[str, Any]:
        """Returns the config.json of a model.

        Raises:
          UnsupportedModel: the family cannot express the model; the message names every feature.
        """
        here = describe(model)
        dtype = model.config.param_dtype
        config = {
            "model_type": self.name,
            "architectures": [self.architectures[0]],
            "torch_dtype": dtype,
            "dtype": dtype,
            **self.write(here),
        }
        try:
            there = describe(self.model(config))
        except UnsupportedConfig as error:
            raise UnsupportedModel(
                f"No {self.name!r} model can be like this one: {error}"
            ) from None
        different = differences(here, there)
        if different:
            raise UnsupportedModel(
                f"No {self.name!r} model can be like this one: " + "; ".join(different) + "."
            )
        return config

    def pieces(self, model: Transformer) -> list[Piece]:
        """Returns the pieces of every array of the model, with layers scanned or unrolled.

        Raises:
          UnsupportedModel: the family has no tensor for an array.
        """
        try:
            return pieces_of(self.rows, native_shapes(model), model.config)
        except KeyError as error:
            raise UnsupportedModel(
                f"A {self.name!r} checkpoint has no place for {error}."
            ) from None

    def shapes(self, model: Transformer) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the model's Hugging Face tensors, by name."""
        return hf_shapes(self.pieces(model), native_shapes(model))

    def match(self, model: Transformer, on_disk: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Returns the name on disk of each Hugging Face tensor of the model.

        Tied tensors on disk have an entry too; the reader compares each with its original.

        Args:
          model: the model of the checkpoint's config.json.
          on_disk: shapes of the checkpoint's tensors, by name.

        Raises:
          MismatchedTensors: tensors are missing, unexpected or of another shape.
        """
        expected = self.shapes(model)
        names = {self._name(name, expected): name for name in on_disk if not self._ignored(name)}
        copies = [name for name in names if name in self.tied and name not in expected]
        shapes = expected | {copy: expected[self.tied[copy]] for copy in copies}
        problems = [
            *_listed("missing", (name for name in expected if name not in names)),
            *_listed("without a counterpart", (names[n] for n in names if n not in shapes)),
            *_listed(
                "of another shape",
                (
                    f"{names[n]} {tuple(on_disk[names[n]])} instead of {shape}"
                    for n, shape in shapes.items()
                    if n in names and tuple(on_disk[names[n]]) != shape
                ),
            ),
        ]
        if problems:
            raise MismatchedTensors(
                f"The tensors do not fit the {self.name!r} model that config.json describes: "
                + "; ".join(problems)
                + "."
            )
        return names

    def _name(self, name: str, expected: Mapping[str, Any]) -> str:
        return self.prefix + name if self.prefix + name in expected else name

    def _ignored(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def _listed(what: str, names: Iterable[str], most: int = 10) -> list[str]:
    names = sorted(names)
    if not names:
        return []
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what} ({', '.join(names[:most])}{more})"]
