"""What becomes of every tensor in a merge: its inputs, its method and its parameters, before any weight is read."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.merge.checks import copies
from espalier.launch.merge.models import (
    FIRST,
    HEAD,
    Entry,
    Model,
    check_distinct,
    digests,
    short,
)
from espalier.launch.merge.settings import Merge, MergeError, Module, Slice, Source, evaluate
from espalier.launch.merge.tokens import Vocabulary
from espalier.model.transforms.merge import Job
from espalier.model.transforms.merge_blocks import is_float
from espalier.model.transforms.merge_methods import METHODS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A tensor of the output.

    Attributes:
      name: of the tensor.
      stack, layer, rest: its place, see models.Place.
      inputs: (path of the model, name of its tensor), the base first.
      job: how they are merged; None if they are not floats and must be equal.
      shape, dtypes: of the inputs.
    """

    name: str
    stack: str | None
    layer: int | None
    rest: str
    inputs: tuple[tuple[str, str], ...]
    job: Job | None
    shape: tuple[int, ...]
    dtypes: tuple[np.dtype, ...]

    @property
    def out_dtype(self) -> np.dtype:
        return self.dtypes[0] if self.job is None else self.job.result_dtypes(self.dtypes)[-1]


@dataclasses.dataclass(frozen=True)
class _Group:
    """The inputs of some tensors: a layer of the output, or all tensors before or after the layers.

    Attributes:
      part, module: the slice and the module, for their parameters.
      sources: the inputs with their layers, the base first if there is one.
      base: whether the first source is the base.
      u: place among the slice's layers, from 0 to 1.
    """

    part: Slice
    module: Module
    sources: tuple[tuple[Source, int | None], ...]
    base: bool
    u: float


class Planner:
    """Plans one merge.

    Args:
      merge: the configuration.
      models: by path.
      seed: of random methods.
      vocabulary: of the output, if vocabularies are re-indexed.

    Attributes:
      donor: the first model, whose configuration and files the output has.
      layers: the model and layer of the first input of each layer, by output stack.
    """

    def __init__(
        self,
        merge: Merge,
        models: Mapping[str, Model],
        *,
        seed: int,
        vocabulary: Vocabulary | None = None,
    ):
        self.merge, self.models, self.seed, self.vocabulary = merge, models, seed, vocabulary
        self._shapes: dict[str, tuple[int, ...]] = {}  # of tables of a re-indexed vocabulary
        for path in merge.models() if vocabulary is not None else ():
            for name, entry in models[path].tensors.items():
                if entry.is_vocabulary(vocabulary.sizes[path]):
                    self._shapes[name] = (vocabulary.size, *entry.shape[1:])
        self._method = METHODS[merge.method]
        self._digests = digests(models)
        self._copies = {copy for model in models.values() for copy in copies(model)}
        self.donor = models[merge.models()[0]]
        self.layers: dict[str, list[tuple[str, int]]] = {}

    def plan(self) -> list[Planned]:
        """Returns all tensors of the output.

        Raises:
          MergeError: the models, or the parameters, do not fit the method or each other.
        """
        check_distinct(self.merge.file, self._digests)
        stacks = self.donor.stacks
        modules = self._modules(stacks)
        planned: list[Planned] = []
        for own, module, names in modules:
            first_part, last_part = module.slices[0], module.slices[-1]
            before = self._group(first_part, module, None, 0, 0.0)
            after = self._group(last_part, module, None, 0, 1.0)
            outside = self._outside(own, module, stacks)
            for rest in outside:
                if FIRST.fullmatch(rest):
                    planned += self._tensor(before, None, None, rest)
            for stack in names:
                planned += self._stack(stack, module)
            for rest in outside:
                if not FIRST.fullmatch(rest):
                    planned += self._tensor(after, None, None, rest)
        return planned

    def _error(self, problem: str) -> MergeError:
        return MergeError(f"{self.merge.file}: {problem}")

    def _modules(self, stacks: Sequence[str]) -> list[tuple[str, Module, list[str]]]:
        """Returns the modules by name, with the stacks of layers of each."""
        merge = self.merge
        if "" in merge.modules:
            module = merge.modules[""]
            if len(stacks) > 1 and any(x.layers for part in module.slices for x in part.sources):
                names = ", ".join(short(stack, stacks) for stack in stacks)
                raise self._error(
                    f"the models have several stacks of layers: give modules with slices for {names}."
                )
            return [("", module, [*stacks])]
        by_name = {short(stack, stacks): stack for stack in stacks}
        for name in merge.modules:
            if name not in by_name and name != "shared":
                raise self._error(
                    f"modules.{name}: the models have the modules {', '.join([*by_name, 'shared'])}."
                )
        if missing := [name for name in by_name if name not in merge.modules]:
            raise self._error(
                f"modules.{missing[0]} is missing: the models have this stack of layers."
            )
        shared = [("shared", merge.modules["shared"], [])] if "shared" in merge.modules else []
        return shared + [(name, merge.modules[name], [stack]) for name, stack in by_name.items()]

    def _outside(self, own: str, module: Module, stacks: Sequence[str]) -> list[str]:
        """Returns the names of a module's tensors outside of layers, in the donor's order, without copies such as tied heads."""
        paths = {source.model for part in module.slices for source in part.sources}
        names: dict[str, None] = {}
        for model in (self.donor, *(self.models[path] for path in sorted(paths))):
            names |= {n: None for n, entry in model.tensors.items() if entry.place.stack is None}
        return [x for x in names if x not in self._copies and self._owner(x, stacks) == own]

    def _owner(self, tensor: str, stacks: Sequence[str]) -> str:
        """Returns the module of a tensor outside of layers: that of its stack, else `shared` or the first."""
        modules = self.merge.modules
        for stack in stacks:
            own = short(stack, stacks)
            if own in modules and tensor.startswith(f"{own}{'/' if '/' in stack else '.'}"):
                return own
        return "shared" if "shared" in modules else next(iter(modules))

    def _stack(self, stack: str, module: Module) -> Iterator[Planned]:
        """Yields the tensors of a stack's layers."""
        number, origins = 0, []
        for part in module.slices:
            count = self._count(stack, part)
            for i in range(count):
                u = i / (count - 1) if count > 1 else 1.0
                group = self._group(part, module, stack, i, u)
                source, layer = group.sources[0]
                assert layer is not None  # in a stack
                origins.append((source.model, layer))
                rests = self._rests(stack, group)
                for rest in rests:
                    yield from self._tensor(group, stack, number, rest)
                number += 1
        self.layers[stack] = origins

    def _rests(self, stack: str, group: _Group) -> list[str]:
        """Returns the names of a layer's tensors, of the first source that has the layer's."""
        names: dict[str, None] = {}
        for source, layer in group.sources:
            names |= dict.fromkeys(self.models[source.model].layers.get((stack, layer), ()))
        return list(names)

    def _count(self, stack: str, part: Slice) -> int:
        """Returns the number of layers of a slice."""
        counts = {}
        for source in part.sources:
            there = self.models[source.model].depth(stack)
            if source.layers and source.layers[1] > there:
                raise self._error(
                    f"layer_range {list(source.layers)} of {source.model}: it has {there} layers in {stack}."
                )
            counts[source.model] = (
                there if source.layers is None else source.layers[1] - source.layers[0]
            )
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise self._error(
                f"models of different depth ({shown} layers): give slices with layer ranges."
            )
        return next(iter(counts.values()))

    def _group(
        self, part: Slice, module: Module, stack: str | None, index: int, u: float
    ) -> _Group:
        """Returns the inputs of a layer of a slice, or of tensors outside of layers."""

        def at(source: Source) -> tuple[Source, int | None]:
            return source, None if stack is None else (source.layers or (0, 0))[0] + index

        base_path = part.base or self.merge.base
        sources = list(part.sources)
        names = [source.model for source in sources]
        kind = self._method.base
        name = self.merge.method
        if base_path is not None and base_path not in names:
            if kind == "config" and name == "karcher":
                raise self._error(
                    f"base_model {base_path} is not among the models, which karcher averages: add it to them, or remove it."
                )
            if kind != "config":
                if any(source.layers for source in sources):
                    raise self._error(
                        f"base_model {base_path} is not among a slice's sources: add it there."
                    )
                sources.append(Source(base_path, None, {}))
        based = kind != "config" and base_path is not None
        if kind == "needed" and base_path is None:
            raise self._error(f"{name} needs a base_model.")
        if based:
            bases = [source for source in sources if source.model == base_path]
            others = [source for source in sources if source.model != base_path]
            if len(bases) > 1:
                raise self._error(f"base_model {base_path} is twice in a slice: give it once.")
            sources = [*bases, *others]
        count = len(sources) - based
        least, most = self._method.least, self._method.most
        if count < least or (most is not None and count > most):
            wanted = (
                f"{least}"
                if least == most
                else f"{least} or more"
                if most is None
                else f"{least} to {most}"
            )
            besides = " besides base_model" if based else ""
            raise self._error(
                f"{name} merges {wanted} model{'s' * (wanted != '1')}{besides}, not {count}."
            )
        return _Group(part, module, tuple(map(at, sources)), based, u)

    def _tensor(
        self, group: _Group, stack: str | None, layer: int | None, rest: str
    ) -> list[Planned]:
        """Returns the plan of a tensor."""
        inputs, entries = [], []
        for source, at in group.sources:
            model = self.models[source.model]
            name = model.name(stack, at, rest)
            if name not in model.tensors:
                having = [
                    s.model
                    for s, i in group.sources
                    if self.models[s.model].name(stack, i, rest) in self.models[s.model].tensors
                ]
                raise self._error(
                    f"{source.model} has no {name}, which {having[0] if having else 'another model'} has: merge models of "
                    "one architecture."
                )
            inputs.append((source.model, name))
            entries.append(model.tensors[name])
        name = self.donor.name(stack, layer, rest)
        shape = self._shape(name, inputs, entries)
        dtypes = tuple(entry.dtype for entry in entries)
        floats = {is_float(dtype) for dtype in dtypes}
        if len(floats) > 1:
            raise self._error(
                f"{name} is of floats in some models only: merge models of one architecture."
            )
        job = self._job(name, group, shape, entries, inputs, dtypes) if floats == {True} else None
        return [
            Planned(
                name=name,
                stack=stack,
                layer=layer,
                rest=rest,
                inputs=tuple(inputs),
                job=job,
                shape=shape,
                dtypes=dtypes,
            )
        ]

    def _shape(
        self, name: str, inputs: Sequence[tuple[str, str]], entries: Sequence[Entry]
    ) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        for (path, _), entry in zip(inputs, entries, strict=True):
            if entry.shape != entries[0].shape:
                vocabulary = FIRST.fullmatch(name) or HEAD.fullmatch(name)
                remedy = (
                    "add `tokenizer_source: union` (or base) to align vocabularies"
                    if vocabulary and entry.shape[1:] == entries[0].shape[1:]
                    else "merge models of one architecture"
                )
                raise self._error(
                    f"{name} is {list(entry.shape)} in {path}, and {list(entries[0].shape)} in {inputs[0][0]}: {remedy}."
                )
        return entries[0].shape

    def _job(
        self,
        name: str,
        group: _Group,
        shape: tuple[int, ...],
        entries: Sequence[Entry],
        inputs: Sequence[tuple[str, str]],
        dtypes: Sequence[np.dtype],
    ) -> Job:
        whole = (name, *entries[0].names[1:])
        own = group.sources[group.base :]
        shared = (group.part.parameters, group.module.parameters, self.merge.parameters)
        u = group.u

        def value(parameter: str, names: Sequence[str], source: Source | None = None) -> Any:
            default = self._method.parameters[parameter].default
            for setting in (*([source.parameters] if source else []), *shared):
                result = evaluate(
                    setting.get(parameter, ()), names, u, outside=entries[0].place.stack is None
                )
                if result is not None:
                    return result
            if default is ...:
                where = f" of {source.model}" if source else ""
                raise self._error(
                    f"{parameter}{where} is missing for {name}: add `parameters: {{{parameter}: ...}}`, with a value for every tensor."
                )
            return default

        values: dict[str, Any] = {}
        for parameter, kind in self._method.parameters.items():
            if kind.each:
                # By the names in each model: layers of slices have other numbers there.
                values[parameter] = [
                    value(parameter, entry.names, source)
                    for (source, _), entry in zip(own, entries[group.base :], strict=True)
                ]
            else:
                values[parameter] = value(parameter, whole)
        job = Job(
            method=self.merge.method,
            name=name,
            shape=shape,
            based=group.base,
            values=values,
            models=[self._key(source, group) for source, _ in own],
            sources=[f"{path}: {tensor}" for path, tensor in inputs],
            dtype=_dtype(self.merge.dtype),
            out_dtype=_dtype(self.merge.out_dtype),
            seed=self.seed,
        )
        if problem := job.problem():
            raise self._error(f"{name}: {problem}")
        return job

    def _key(self, source: Source, group: _Group) -> str:
        """Returns the key of a source for random numbers, also if a model is in a slice twice."""
        same = [s for s, _ in group.sources if s.model == source.model]
        digest = self._digests[source.model]
        return digest if len(same) == 1 else f"{digest}{list(source.layers or ())}"


def _dtype(name: str | None) -> np.dtype | None:
    import ml_dtypes

    return None if name is None else np.dtype(getattr(ml_dtypes, name, name))
