"""Merges of models tensor by tensor: how a tensor of several models becomes one.

Arithmetic is in float32, or in float64 for tensors of float64; results are rounded at the end. A tensor is read in blocks
(model/transforms/merge_blocks.py), and no result depends on their size.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from espalier.model.transforms import merge_blocks
from espalier.model.transforms.base import TransformError
from espalier.model.transforms.merge_blocks import Blocks, Read
from espalier.model.transforms.merge_methods import METHODS, Tensor, Values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """How one tensor is merged.

    Attributes:
      method: name in METHODS.
      name: the tensor, for messages and random numbers.
      shape: of all inputs and the result.
      based: whether the first input is a base.
      values: parameters of the method; a list for those that each model has.
      models: keys of the inputs but the base, for random numbers.
      sources: names of all inputs, for messages; empty for none.
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
    sources: Sequence[str] = ()
    dtype: np.dtype | None = None
    out_dtype: np.dtype | None = None
    seed: int = 0

    def problem(self) -> str | None:
        """Returns why the parameters cannot be used, such as weights that cancel out; None if they can."""
        values = self.values
        weights = values.get("weight")
        divides = values.get("normalize_weights") or (
            self.method == "linear" and values["normalize"]
        )
        if weights and divides and abs(sum(weights)) < 1e-12:
            return "the weights sum to 0, by which they are normalised: change them, or do not normalise."
        if METHODS[self.method].random and "epsilon" in values:
            for d, eps in zip(values["density"], values["epsilon"], strict=True):
                if 0 < d < 1 and not (d - eps > 0 and d + eps < 1):
                    return f"density {d:g} with epsilon {eps:g} leaves (0, 1): choose a smaller epsilon."
        return None

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
          TransformError: the parameters do not fit each other or the values, such as directions that cancel out; or values of an
            input or of the result are not finite.
        """
        if problem := self.problem():
            raise TransformError(f"{self.name}: {problem}")
        method, results = METHODS[self.method], self.result_dtypes(dtypes)
        work = np.float64 if results[0] == np.float64 else np.float32
        row = 1
        if method.rows(self.values) and self.shape:
            tall = self.values.get("nuslerp_row_wise") and len(self.shape) > 1
            size = int(np.prod(self.shape))
            row = size // max(1, self.shape[0]) if tall else self.shape[-1]
        names = self.sources or None
        blocks = Blocks(
            reads, self.shape, work=work, cast=self.dtype, row=row, names=names, **settings
        )
        keys = [f"{self.seed}\0{self.name}\0{model}" for model in self.models]
        tensor = Tensor(
            blocks=blocks, based=self.based, values=self.values, keys=keys, name=self.name
        )
        if not blocks.size:
            return
        yield from blocks.map(method.compute(tensor), results)


def merged(job: Job, arrays: Sequence[np.ndarray], **settings: Any) -> np.ndarray:
    """Returns the merge of arrays in memory, the base first; see `Job.blocks`."""
    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
    reads = [lambda low, high, x=x: x[low:high] for x in flat]
    dtypes = [array.dtype for array in arrays]
    result = np.empty(flat[0].shape, job.result_dtypes(dtypes)[-1])
    for low, values in job.blocks(reads, dtypes, **settings):
        result[low : low + values.size] = values
    return result.reshape(job.shape)
