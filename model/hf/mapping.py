"""The correspondence of native arrays and Hugging Face tensors as a table of pieces.

A piece says that a region of a native array and a region of a Hugging Face tensor hold the same
values. A family lists the names of a layer's arrays once, as rows; `pieces_of` expands the rows for a
model's layers and experts. Import copies tensors to arrays and export copies arrays to tensors, so both
are exact and neither needs a whole model in memory.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from espalier.model import layer_groups
from espalier.model.config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Equal regions of a native array and a Hugging Face tensor.

    Attributes:
      native: path of the array, such as 'layers/block_0/attention/query/kernel'.
      native_at: leading indices of the region in the array: index in the stack of layers, expert. The
        region covers the other dimensions of the array completely.
      hf: name of the tensor, such as 'model.layers.3.self_attn.q_proj.weight'.
      hf_columns: (start, stop) of the region on the tensor's last axis; None for the whole axis.
      hf_rows: (start, stop, every): the region has these rows of every `every` rows of the tensor; None for all rows.
      transpose: whether the region's two dimensions are swapped: kernels are [in, out], but [out, in]
        in torch.
    """

    native: str
    hf: str
    native_at: tuple[int, ...] = ()
    hf_columns: tuple[int, int] | None = None
    hf_rows: tuple[int, int, int] | None = None
    transpose: bool = False

    @property
    def whole(self) -> bool:
        """Whether the region is the whole tensor."""
        return self.hf_columns is None and self.hf_rows is None

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the values of the native region that these rows of the tensor have, a view."""
        region = self._columns(tensor)
        return region.T if self.transpose else region

    def to_hf(
        self, region: np.ndarray, tensor: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (part of the tensor, its values) for the native region; the first are views to write."""
        values = region.T if self.transpose else region
        columns = self._columns(tensor)
        if self.hf_rows is None:
            yield columns, values
            return
        for rows, start in self.runs(len(tensor)):
            yield columns[rows], values[start : start + rows.stop - rows.start]

    def runs(self, count: int) -> Iterator[tuple[slice, int]]:
        """Yields the rows of a tensor of `count` rows that the region has, and where they begin among the region's rows."""
        first, stop, every = self.hf_rows or (0, count, count)
        for i in range(count // every if every else 1):
            yield slice(i * every + first, i * every + stop), i * (stop - first)

    def outputs(self, count: int) -> np.ndarray:
        """Returns which of a projection's `count` outputs in the tensor are the region's."""
        if self.hf_columns is not None:
            return np.arange(*self.hf_columns)
        return np.concatenate([np.arange(rows.start, rows.stop) for rows, _ in self.runs(count)])

    def _columns(self, tensor: np.ndarray) -> np.ndarray:
        return tensor if self.hf_columns is None else tensor[..., slice(*self.hf_columns)]


@dataclasses.dataclass(frozen=True)
class Row:
    """A family's tensor name for one array of the model.

    Attributes:
      native: path of the array; for a layer's array, the path inside its block, in models with an encoder after the
        stack's name: 'encoder/attention/query/kernel'.
      hf: name of the tensor. `{layer}` is the number of the layer. `{expert}` is the number of the
        expert, for arrays whose first dimension is the experts.
      transpose: see `Piece`.
      unless: path of an array; layers that have it do not use this row. Of several rows for an array the last counts.
      joined: 0, 1 or 2 for query, key or value where the three are concatenated on the tensor's last
        axis (GPT-2); they then have the same number of heads. None otherwise.
      scalar: whether the tensor has no dimensions; the array has one of size 1.
      by_head: whether the three are concatenated for each head by itself, and on the tensor's first axis (GPT-NeoX).
    """

    native: str
    hf: str
    transpose: bool = False
    unless: str | None = None
    joined: int | None = None
    by_head: bool = False
    scalar: bool = False

    def part(self, width: int, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Returns the part of the tensor that an array with so many outputs has, by the name of the piece's field."""
        if self.joined is None:
            return {}
        if self.by_head:
            start = self.joined * head_dim
            return {"hf_rows": (start, start + head_dim, 3 * head_dim)}
        return {"hf_columns": (self.joined * width, (self.joined + 1) * width)}


def pieces_of(
    rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]], config: TransformerConfig
) -> list[Piece]:
    """Returns the pieces of every array in `shapes`, the shapes of a model's arrays by path.

    Raises:
      KeyError: an array has no row.
    """
    layers = {path: layer_groups.BLOCK.fullmatch(path) for path in shapes}
    inside = {
        path: f"{at[1].removesuffix('layers')}{at[3]}" if at else path
        for path, at in layers.items()
    }
    block_of = {path: at and (at[1], at[2]) for path, at in layers.items()}
    present: dict[Any, set[str]] = {}
    for path, block in block_of.items():
        present.setdefault(block, set()).add(inside[path])
    rows = list(rows)
    by_path = {
        block: {row.native: row for row in rows if row.unless not in paths}
        for block, paths in present.items()
    }
    groups = layer_groups.in_stacks(shapes, scanned=config.scan_layers)
    pieces = []
    for path, shape in shapes.items():
        layer, row = layers[path], by_path[block_of[path]].get(inside[path])
        if row is None or ("{layer}" in row.hf) != bool(layer):
            raise KeyError(path)
        numbers = layer_groups.layers_of(groups[layer[1]], int(layer[2])) if layer else [None]
        for index, number in enumerate(numbers):
            place = (index,) if layer and config.scan_layers else ()
            place = (*place, 0) if row.scalar else place
            region = shape[len(place) :]
            experts = range(region[0]) if "{expert}" in row.hf else [None]
            part: dict[str, Any] = row.part(region[-1], config.per_head_dim) if region else {}
            for expert in experts:
                pieces.append(
                    Piece(
                        native=path,
                        native_at=place if expert is None else (*place, expert),
                        hf=row.hf.format(layer=number, expert=expert),
                        transpose=row.transpose,
                        **part,
                    )
                )
    return pieces


def hf_shapes(
    pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the pieces' Hugging Face tensors; `shapes` are the native arrays' shapes."""
    tensors: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        shape = shapes[piece.native][len(piece.native_at) :]
        shape = shape[::-1] if piece.transpose else shape
        if piece.hf_columns is not None:
            stop = max(piece.hf_columns[1], tensors.get(piece.hf, (0,))[-1])
            shape = (*shape[:-1], stop)
        if piece.hf_rows is not None:
            start, stop, every = piece.hf_rows
            shape = (shape[0] // (stop - start) * every, *shape[1:])
        tensors[piece.hf] = shape
    return tensors
