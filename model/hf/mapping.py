"""The exchange of weights with Hugging Face as a table of pieces, read in either direction.

A piece says that a region of a native array and a region of a Hugging Face tensor hold the same
values. A family lists, once, how the arrays of a layer are called (rows); `pieces_of` spells the rows
out for a model's layers and experts. Import copies from right to left and export from left to right, so
that both are exact and neither needs a whole model in memory.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import numpy as np

from model.config import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Equal regions of a native array and a Hugging Face tensor.

    Attributes:
      native: path of the array, as 'layers/block_0/attention/query/kernel'.
      native_at: leading indices of the region in it: place in the stack of layers, expert. The rest
        of the array's dimensions belong to the region whole.
      hf: name of the tensor, as 'model.layers.3.self_attn.q_proj.weight'.
      hf_columns: (start, stop) of the region on the tensor's last axis; None for all of it.
      transpose: the region's two dimensions are swapped: kernels are [in, out], torch's [out, in].
    """

    native: str
    hf: str
    native_at: tuple[int, ...] = ()
    hf_columns: tuple[int, int] | None = None
    transpose: bool = False

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """The native region: a view of the tensor."""
        region = self.region(tensor)
        return region.T if self.transpose else region

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The tensor's region: a view of the native array."""
        region = array[self.native_at]
        return region.T if self.transpose else region

    def region(self, tensor: np.ndarray) -> np.ndarray:
        """The region of the tensor, a view to read or to write."""
        return tensor if self.hf_columns is None else tensor[..., slice(*self.hf_columns)]


@dataclasses.dataclass(frozen=True)
class Row:
    """How a family calls one array of the model.

    Attributes:
      native: path of the array; of a layer's arrays, the path inside its block.
      hf: name of the tensor; `{layer}` is the layer's number, and `{expert}` that of the expert, of
        arrays that hold the experts in their first dimension.
      transpose: as of a piece.
      joined: query, key and value side by side on the tensor's last axis (GPT-2): which of them, 0 to
        2. All have as many heads then.
    """

    native: str
    hf: str
    transpose: bool = False
    joined: int | None = None


def pieces_of(
    rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]], config: TransformerConfig
) -> list[Piece]:
    """The pieces of every array in `shapes`, a model's arrays by path.

    Raises:
      KeyError: no row for an array.
    """
    by_path = {row.native: row for row in rows}
    pieces = []
    for path, shape in shapes.items():
        layer = re.fullmatch(r"layers/block_(\d+)/(.*)", path)
        row = by_path.get(layer[2] if layer else path)
        if row is None or ("{layer}" in row.hf) != bool(layer):
            raise KeyError(path)
        for number, place in _places(int(layer[1]), config) if layer else [(None, ())]:
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


def _places(block: int, config: TransformerConfig) -> list[tuple[int, tuple[int, ...]]]:
    """Numbers of the layers in an array of block `block`, and their leading indices."""
    if not config.scan_layers:
        return [(block, ())]
    period = len(config.layer_pattern)
    return [(g * period + block, (g,)) for g in range(config.num_layers // period)]


def hf_shapes(
    pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the pieces make up; `shapes` are of the native arrays."""
    tensors: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        shape = shapes[piece.native][len(piece.native_at) :]
        shape = shape[::-1] if piece.transpose else shape
        if piece.hf_columns is not None:
            stop = max(piece.hf_columns[1], tensors.get(piece.hf, (0,))[-1])
            shape = (*shape[:-1], stop)
        tensors[piece.hf] = shape
    return tensors
