"""Merges of models tensor by tensor: how a tensor of several models becomes one.

Arithmetic is in float32, or in float64 for tensors of float64; results are rounded at the end. A tensor is read in blocks
(model/transforms/merge_blocks.py), and no result depends on their size.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from model.transforms import merge_blocks
from model.transforms.base import Recipe, Shapes, Source, TransformError
from model.transforms.merge_blocks import Blocks, Read
from model.transforms.merge_methods import METHODS, Tensor, Values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """How one tensor is merged.

    Attributes:
      method: name in METHODS.
      name: the tensor, for messages and random numbers.
      shape: of all inputs and the result.
      based: whether the first input is a base.
      values: parameters of the method; a list for those that each model has.
      models: names of the inputs but the base, for random numbers.
      dtype: dtype that inputs are rounded to, and the result before `out_dtype`; None for that of the inputs.
      out_dtype: dtype of the result; None for `dtype`.
      seed: of random numbers.
    """

    method: str
    name: str
    shape: tuple[int, ...]
    based: bool
    values: Values
    models: Sequence[str]
    dtype: np.dtype | None = None
    out_dtype: np.dtype | None = None
    seed: int = 0

    def result_dtypes(self, dtypes: Sequence[Any]) -> list[np.dtype]:
        """Returns the dtypes that results are rounded to, one after the other, from the inputs' dtypes."""
        dtype = merge_blocks.promoted(dtypes) if self.dtype is None else np.dtype(self.dtype)
        return [dtype] if self.out_dtype is None else [dtype, np.dtype(self.out_dtype)]

    def blocks(
        self, reads: Sequence[Read], dtypes: Sequence[Any], **settings: Any
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the merged tensor as (first index, values) in order.

        Args:
          reads: of each input, the base first, see `Blocks`.
          dtypes: of each input.
          settings: `block`, `pool` and `threads` of `Blocks`.

        Raises:
          TransformError: the parameters do not fit the values, such as weights that cancel out.
        """
        method, results = METHODS[self.method], self.result_dtypes(dtypes)
        work = np.float64 if results[0] == np.float64 else np.float32
        row = 1
        if method.rows(self.values) and self.shape:
            tall = self.values.get("nuslerp_row_wise") and len(self.shape) > 1
            size = int(np.prod(self.shape))
            row = size // max(1, self.shape[0]) if tall else self.shape[-1]
        blocks = Blocks(reads, self.shape, work=work, cast=self.dtype, row=row, **settings)
        keys = [f"{self.seed}\0{self.name}\0{model}" for model in self.models]
        tensor = Tensor(
            blocks=blocks, based=self.based, values=self.values, keys=keys, name=self.name
        )
        if not blocks.size:
            return
        for low, values in blocks.map(method.compute(tensor), results):
            if values.dtype == np.float16 and not np.isfinite(values).all():
                raise TransformError(
                    f"{self.name} has values that are not finite in float16: use bfloat16 or float32."
                )
            yield low, values


def merged(job: Job, arrays: Sequence[np.ndarray], **settings: Any) -> np.ndarray:
    """Returns the merge of arrays in memory, the base first; see `Job.blocks`."""
    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
    reads = [lambda low, high, x=x: x[low:high] for x in flat]
    dtypes = [array.dtype for array in arrays]
    result = np.empty(flat[0].shape, job.result_dtypes(dtypes)[-1])
    for low, values in job.blocks(reads, dtypes, **settings):
        result[low : low + values.size] = values
    return result.reshape(job.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """A tree transform that merges models of one shape, every layer by itself; the first is the base if the method has one.

    Attributes:
      method: name in METHODS.
      values: parameters of the method that differ from their defaults; a list for those that each model but the base has.
      scanned: whether arrays below `layers/` are stacks of layers.
      seed: of random numbers.
    """

    method: str
    values: Values
    scanned: bool = True
    seed: int = 0

    def plan(self, sources: Sequence[Source], target: Shapes) -> list[Recipe]:
        """Returns the recipes of all parameters; raises TransformError for unknown parameters or other shapes."""
        method = METHODS[self.method]
        based = method.base == "needed"
        count = len(sources) - based
        values = {}
        for name, parameter in method.parameters.items():
            if (value := self.values.get(name, parameter.default)) is ...:
                raise TransformError(f"{self.method} needs {name}.")
            spread = parameter.each and not isinstance(value, list | tuple)
            values[name] = [value] * count if spread else value
        if unknown := set(self.values) - set(values):
            raise TransformError(f"{self.method} has no parameter {min(unknown)}.")
        models = [source.name for source in sources[based:]]
        return [
            self._recipe(path, tuple(shape), sources, values, models)
            for path, shape in target.items()
        ]

    def _recipe(
        self,
        path: str,
        shape: tuple[int, ...],
        sources: Sequence[Source],
        values: Values,
        models: Sequence[str],
    ) -> Recipe:
        for source in sources:
            if source.shape(path) != shape:
                raise TransformError(
                    f"{path} is {list(source.shape(path))} in {source.name}, and {list(shape)} in the new model: use "
                    "models of equal sizes."
                )
        layers = self.scanned and "layers/" in path

        def compute(parts: Sequence[Any], first: int) -> list[np.ndarray]:
            arrays = [np.asarray(part) for part in parts]
            job = Job(
                method=self.method,
                name=f"{path}[{first}]" if layers else path,
                shape=arrays[0].shape[1:] if layers else shape,
                based=METHODS[self.method].base == "needed",
                values=values,
                models=models,
                seed=self.seed,
            )
            return [merged(job, arrays).reshape(arrays[0].shape)]

        return Recipe(
            outputs={path: shape},
            inputs=tuple((source.name, path) for source in sources),
            origin=f"{self.method} of {len(sources)}",
            compute=compute,
            slices="layers" if layers else "whole",
        )
