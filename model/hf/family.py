"""A family of Hugging Face models: its config.json and the names of its tensors.

A family is a table of settings with their config.json keys, and a table of tensor names. No list of
unsupported features is needed: a model is supported if the config.json written from its description
(model/hf/description.py) is read back as a model with the same description.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from espalier.model.hf.config_fields import NEUTRAL, ConfigFields, UnsupportedConfig
from espalier.model.hf.description import describe, differences, native_shapes
from espalier.model.hf.mapping import Piece, Row, hf_shapes, pieces_of
from espalier.model.mlp import by_kind
from espalier.model.rope import Rope
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Block, Transformer


class UnsupportedModel(ValueError):  # noqa: N818
    """A model that a family cannot express; the message names the features, of which there are `count`."""

    def __init__(self, message: str, *, count: int = 1):
        super().__init__(message)
        self.count = count


def check_language_model(model: Any) -> None:
    """Raises UnsupportedModel unless a model is a decoder or encoder-decoder with logits, without a further head."""
    if not isinstance(model, Transformer | EncoderDecoder):
        raise UnsupportedModel(
            f"Hugging Face's files are read and written of language models, and this is a {type(model).__name__}."
        )


class MismatchedTensors(ValueError):  # noqa: N818
    """Tensors that are missing, unexpected, or of another shape; one message has all of them."""


class Part(NamedTuple):
    """Some settings of a model, and the config.json fields that hold them.

    Attributes:
      read: returns the settings, by their names in a description.
      write: returns the fields, from a description.
    """

    read: Callable[[ConfigFields], dict[str, Any]] = lambda fields: {}
    write: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda here: {}


def field(
    key: str,
    *names: str,
    default: Any = ...,
    nullable: bool = False,
    absent: Any = None,
    decode: Callable[[Any], Any] = lambda value: value,
    encode: Callable[[Any], Any] = lambda setting: setting,
) -> Part:
    """Returns the part of one field.

    Args:
      key: key in config.json.
      *names: names of the settings with this value.
      default: value of an absent field; `...` if the field is required.
      nullable: whether null is a value; otherwise it means absent.
      absent: setting of models without it, such as models with another class of MLP.
      decode: returns the setting from the field's value.
      encode: returns the field's value from the setting.
    """

    def read(fields: ConfigFields) -> dict[str, Any]:
        if default is ...:
            value = fields.required(key)
        else:
            value = fields.optional(key, default) if nullable else fields.get(key, default)
        return dict.fromkeys(names, decode(value))

    return Part(read, lambda here: {key: encode(here.get(names[0], absent))})


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face's transformers.

    Attributes:
      name: the model_type, such as 'cohere2'.
      architecture: the class name in config.json.
      model_class: class of the models.
      fixed: settings that all models of the family share, by their names in a description.
      parts: the other settings; 'config.' begins the names of TransformerConfig's fields.
      rows: names of the arrays, see mapping.Row.
      norms: names of the norms that have the settings of the final norm, 'norm'.
      neutral: fields with only one supported value.
      silent: fields that say nothing of what the model computes, or that are read only with other settings.
      whole_heads: whether the family's class needs heads that divide the width.
      ignored: patterns that match the whole names of tensors that carry no weights.
      tied: for each tensor that the model has no array for, the tensor that it must be equal to if
        the checkpoint has both, such as a tied head and the embedding.
      prefix: prefix of tensor names that is missing in checkpoints of the model without its head.
    """

    name: str
    architecture: str
    _: dataclasses.KW_ONLY
    model_class: Callable[..., Any] = Transformer
    fixed: Mapping[str, Any]
    parts: tuple[Part, ...]
    rows: tuple[Row, ...]
    norms: tuple[str, ...] = ("block.norm",)
    neutral: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    silent: tuple[str, ...] = ()
    whole_heads: bool = False
    ignored: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    tied: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"lm_head.weight": "model.embed_tokens.weight"}
    )
    prefix: str = "model."

    def model(self, config_json: Mapping[str, Any], *, refuse_unknown: bool = True) -> Any:
        """Returns the model of a config.json, with scanned layers and the dtype of config.json.

        Its factories are `functools.partial`s of this project's classes. Without `refuse_unknown`, fields that are not
        known are passed over.

        Raises:
          UnsupportedConfig: a field has an unsupported value, or a field whose default differs
            between versions of transformers is absent, or a field is not known.
        """
        fields = ConfigFields(self.name, config_json)
        fields.neutral(**self.neutral)
        if self.whole_heads and fields.required("hidden_size") % fields.required(
            "num_attention_heads"
        ):
            raise fields.error("num_attention_heads", "it must divide hidden_size in this family")
        settings = {"block": Block, **self.fixed}
        for part in self.parts:
            settings |= part.read(fields)
        fields.refuse_unread(self.silent, unknown_too=refuse_unknown)
        for name, value in list(settings.items()):
            if name.partition(".")[0] == "norm":
                settings |= {copy + name.removeprefix("norm"): value for copy in self.norms}
        config = fields.sizes(**_arguments(settings, "config"))
        for rope in settings.values():
            if isinstance(rope, Rope):
                fields.check_rotation(rope, config)
        return self.model_class(config=config, **_arguments(settings, ""))

    def config(self, model: Transformer) -> dict[str, Any]:
        """Returns the config.json of a model.

        Raises:
          UnsupportedModel: the family cannot express the model; the message names every feature.
        """
        check_language_model(model)
        here = describe(model)
        dtype = model.config.param_dtype
        config = {
            "model_type": self.name,
            "architectures": [self.architecture],
            "torch_dtype": dtype,
            "dtype": dtype,
        }
        for part in self.parts:
            config |= part.write(here)
        try:
            different = differences(here, describe(self.model(config)))
        except UnsupportedConfig as error:
            different = [str(error).removesuffix(".")]
        if different:
            raise UnsupportedModel(
                f"A {self.name!r} model cannot have these settings: " + "; ".join(different) + ".",
                count=len(different),
            )
        return config

    def completed(self, config_json: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the fields that a config.json's model follows from, absent ones with their defaults, unknown ones left out.

        Raises:
          UnsupportedConfig: see `model`.
        """
        model = self.model(config_json, refuse_unknown=False)
        return {**NEUTRAL, **self.neutral, **self.config(model)}

    def pieces(self, model: Transformer) -> list[Piece]:
        """Returns the pieces of every array of the model, with layers scanned or unrolled.

        Raises:
          UnsupportedModel: the family has no tensor for an array.
        """
        try:
            return pieces_of(self.rows, native_shapes(model), model.config)
        except KeyError as error:
            raise UnsupportedModel(
                f"A {self.name!r} checkpoint has no tensor for {error}."
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
        # Few layers are compared tensor by tensor, whose names say more.
        if (layers := model.config.num_layers) > max(len(on_disk), 1000):
            raise MismatchedTensors(
                f"config.json describes {layers} layers, but the checkpoint has only {len(on_disk)} tensors: "
                "copy both from the same checkpoint."
            )
        expected = self.shapes(model)
        names = {}
        for name in on_disk:
            if not any(re.fullmatch(pattern, name) for pattern in self.ignored):
                prefixed = self.prefix + name
                names[prefixed if prefixed in expected else name] = name
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


def _arguments(settings: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Returns the settings of `owner`; classes are partials with their own settings.

    MLPs that kinds of layers name, 'mlp:dense' beside 'mlp', are the arguments of `mlp.by_kind`.
    """
    arguments: dict[str, Any] = {}
    named: dict[str, Any] = {}
    for name, value in settings.items():
        above, _, last = name.rpartition(".")
        if above == owner:
            made = isinstance(value, type)
            value = functools.partial(value, **_arguments(settings, name)) if made else value
            last, _, kind = last.partition(":")
            (named if kind else arguments)[kind or last] = value
    if named:
        arguments["mlp"] = functools.partial(by_kind, others=arguments["mlp"], **named)
    return arguments


def _listed(what: str, names: Iterable[str], most: int = 10) -> list[str]:
    names = sorted(names)
    if not names:
        return []
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what} ({', '.join(names[:most])}{more})"]
