"""The configuration of a merge, as launch/merge/config_file.py reads it, and the values of its parameters for a tensor."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.model.transforms.merge_methods import METHODS

DTYPES = ("float32", "bfloat16", "float16", "float64")


class MergeError(ValueError):
    """A merge that is not possible as configured; the message names the file, the key and the remedy."""


@dataclasses.dataclass(frozen=True)
class Condition:
    """A value for some tensors.

    Attributes:
      value: a number, or a list of numbers that is spread over the layers.
      filter: part of the tensors' names; None for all.
      pattern: regular expression that is searched in the names; None for all.
      non_layer: value of tensors outside of layers; None for the first or last of `value`.
    """

    value: Any
    filter: str | None = None
    pattern: Any = None
    non_layer: Any = None

    def matches(self, names: Sequence[str]) -> bool:
        if self.pattern is not None:
            return any(self.pattern.search(name) is not None for name in names)
        return self.filter in (None, "*") or any(str(self.filter) in name for name in names)


Parameters = Mapping[str, tuple[Condition, ...]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model of a slice: its path, its layers [first, last) (None for all), and its own parameters."""

    model: str
    layers: tuple[int, int] | None
    parameters: Parameters


@dataclasses.dataclass(frozen=True)
class Slice:
    """Layers of the output that are merged of the same number of layers of each source."""

    sources: tuple[Source, ...]
    base: str | None
    parameters: Parameters


@dataclasses.dataclass(frozen=True)
class Module:
    """The slices of one stack of layers, and its parameters."""

    slices: tuple[Slice, ...]
    parameters: Parameters


@dataclasses.dataclass(frozen=True)
class TokenSource:
    """Where the embedding of a token comes from.

    Attributes:
      model: path of a model; None for the default.
      token: another token of that model, as text or id; None for the same.
      zero: whether it is zero.
      force: whether also models that have the token get this embedding.
    """

    model: str | None = None
    token: str | int | None = None
    zero: bool = False
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The output's vocabulary: 'union', 'base' or the path of a model; overrides by token; rows are padded to a multiple."""

    source: str
    tokens: Mapping[str, TokenSource] = dataclasses.field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclasses.dataclass(frozen=True)
class Merge:
    """One document of the file.

    Attributes:
      name: by which later documents refer to its result; None for the last.
      modules: by name of a stack of layers; '' for all stacks.
      dtype: dtype that inputs are rounded to; None for their own.
      out_dtype: dtype of the result; None for `dtype`.
      text: the document as it was read, for the record.
    """

    file: str
    name: str | None
    method: str
    base: str | None
    modules: Mapping[str, Module]
    parameters: Parameters
    dtype: str | None
    out_dtype: str | None
    tokens: Tokens | None
    chat_template: str | None
    text: Mapping[str, Any]

    @property
    def is_random(self) -> bool:
        """Whether the method draws random numbers."""
        return METHODS[self.method].random

    def slices(self) -> Iterator[Slice]:
        for module in self.modules.values():
            yield from module.slices

    def models(self) -> list[str]:
        """Returns the paths of all models, the base first."""
        return list(dict.fromkeys([*self._bases(), *self._sources()]))

    def merged_models(self) -> list[str]:
        """Returns the paths of the models that are merged; a base that only gives config.json and tokenizer is none."""
        bases = [] if METHODS[self.method].base == "config" else self._bases()
        return list(dict.fromkeys([*bases, *self._sources()]))

    def conditions(self) -> Iterator[tuple[str, Condition]]:
        """Yields the values of all parameters, each with its parameter's name."""
        slices, modules = [*self.slices()], self.modules.values()
        sources = [source for part in slices for source in part.sources]
        every = [self.parameters, *(x.parameters for x in modules), *(x.parameters for x in slices)]
        for parameters in (*every, *(x.parameters for x in sources)):
            for name, conditions in parameters.items():
                yield from ((name, condition) for condition in conditions)

    def _sources(self) -> list[str]:
        return [source.model for part in self.slices() for source in part.sources]

    def _bases(self) -> list[str]:
        return [base for base in (self.base, *(x.base for x in self.slices())) if base]


def evaluate(
    conditions: Sequence[Condition], names: Sequence[str], u: float, *, outside: bool = False
) -> Any:
    """Returns the value of the first condition that matches a tensor; None if none does.

    A list of numbers is interpolated at u from 0 (its first value) to 1 (its last), and of other values the entry is taken.
    """
    for condition in conditions:
        if condition.matches(names):
            if outside and condition.non_layer is not None:
                return condition.non_layer
            value = condition.value
            if not isinstance(value, list):
                return value
            if any(isinstance(x, bool | str) for x in value):
                return value[int(u * (len(value) - 1))]
            place = u * (len(value) - 1)
            low = int(place)
            high = min(len(value) - 1, low + 1)
            return (1 - (place - low)) * value[low] + (place - low) * value[high]
    return None
