"""What a family of Hugging Face models is: its config.json, and the names of its tensors.

A family is data and two functions: `read` makes a model of a config.json, `write` a config.json of a
model's description (model/hf/description.py). What a family cannot express needs no list: the model
that `read` makes of the written config.json must have the description it was written from.
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
    """A model that a family cannot express; the message names the feature."""


class MismatchedTensors(ValueError):  # noqa: N818
    """Tensors that are missing, that nothing explains, or of another shape; one message names all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type` of Hugging Face's transformers.

    Attributes:
      name: the model_type, as 'cohere2'.
      architectures: what config.json calls the class; exports name the first.
      read: a Transformer of a config.json's fields. Its factories are `functools.partial`s of this
        project's classes, so that whoever walks them finds every setting.
      write: the family's own fields of config.json of a model's description.
      rows: names of the arrays, see mapping.Row.
      ignored: patterns of tensors that carry nothing (whole names).
      tied: tensors that may lie beside the one they must be equal to, where the model has no array
        for them: a head that is the embedding.
      prefix: start of names that checkpoints of the model without its head lack.
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
        """The model that a config.json describes, with scanned layers, computing in its dtype.

        Raises:
          UnsupportedConfig: a field changes the maths in a way that is not supported, or a field
            whose default differs between versions is absent.
        """
        return self.read(ConfigFields(self.name, config))

    def config(self, model: Transformer) -> dict[str, Any]:
        """The config.json of a model.

        Raises:
          UnsupportedModel: the family has no way to say it; the message names every feature.
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
        """Every array of the model as it is configured, scanned or unrolled.

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
        """Shapes of the Hugging Face tensors of the model, by name."""
        return hf_shapes(self.pieces(model), native_shapes(model))

    def match(self, model: Transformer, on_disk: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Names on disk by the names of the pieces, of tensors whose shapes are `on_disk`.

        Tied tensors that are there have their entry too: the reader compares them by `tied`.

        Raises:
          MismatchedTensors: tensors are missing, unexplained or of another shape.
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
