"""The correspondence of native arrays and Hugging Face tensors as a table of pieces.

A piece says that a region of a native array and a region of a Hugging Face tensor hold the same
values. A family lists the names of a layer's arrays once, as rows; `pieces_of` expands the rows for a
model's layers and experts. Import copies tensors to arrays and export copies arrays to tensors, so both
are exact and neither needs a whole model in memory.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

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
      transpose: whether the region's two dimensions are swapped: kernels are [in, out], but [out, in]
        in torch.
    """

    native: str
    hf: str
    native_at: tuple[int, ...] = ()
    hf_columns: tuple[int, int] | None = None
    transpose: bool = False

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the values of the native region, a view of the tensor."""
        region = self.region(tensor)
        return region.T if self.transpose else region

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """Returns the values of the tensor's region, a view of the native array."""
        region = array[self.native_at]
        return region.T if self.transpose else region

    def region(self, tensor: np.ndarray) -> np.ndarray:
        """Returns the region of the tensor, a view to read or to write."""
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
      unless: path of an array; models that have it do not use this row.
      joined: 0, 1 or 2 for query, key or value where the three are concatenated on the tensor's last
        axis (GPT-2); they then have the same number of heads. None otherwise.
    """

    native: str
    hf: str
    transpose: bool = False
    unless: str | None = None
    joined: int | None = None


def pieces_of(
    rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]], config: TransformerConfig
) -> list[Piece]:
    """Returns the pieces of every array in `shapes`, the shapes of a model's arrays by path.

    Raises:
      KeyError: an array has no row.
    """
    layers = {path: re.fullmatch(r"(.*/)?layers/block_(\d+)/(.*)", path) for path in shapes}
    inside = {path: f"{at[1] or ''}{at[3]}" if at else path for path, at in layers.items()}
    present = set(inside.values())
    by_path = {row.native: row for row in rows if row.unless not in present}
    pieces = []
    for path, shape in shapes.items():
        layer, row = layers[path], by_path.get(inside[path])
        if row is None or ("{layer}" in row.hf) != bool(layer):
            raise KeyError(path)
        for number, place in _places(int(layer[2]), shape, config) if layer else [(None, ())]:
            region = shape[len(place) :]
            experts = range(region[0]) if "{expert}" in row.hf else [None]
            for expert in experts:
                width = region[-1]
                pieces.append(
                    Piece(
                        native=path,
                        native_at=place if expert is None else (*place, expert),
                        hf=row.hf.format(layer=number, expert=expert),
                        hf_columns=None
                        if row.joined is None
                        else (row.joined * width, (row.joined + 1) * width),
                        transpose=row.transpose,
                    )
                )
    return pieces


def _places(
    block: int, shape: tuple[int, ...], config: TransformerConfig
) -> list[tuple[int, tuple[int, ...]]]:
    """Returns (layer number, leading indices) for each layer in an array of block `block`."""
    if not config.scan_layers:
        return [(block, ())]
    period = len(config.layer_pattern)
    return [(g * period + block, (g,)) for g in range(shape[0])]


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
        tensors[piece.hf] = shape
    return tensors
