"""The exchange of weights with Hugging Face as a table of pieces, read in either direction.

A piece says that a region of a native array and a region of a Hugging Face tensor hold the same
values. A family (model/hf/families) lists the pieces of a model once; import copies from right to left
and export from left to right, so that both are exact and neither needs a whole model in memory.
"""

import dataclasses

import numpy as np


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
        region = tensor if self.hf_columns is None else tensor[..., slice(*self.hf_columns)]
        return region.T if self.transpose else region

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The tensor's region: a view of the native array."""
        region = array[self.native_at]
        return region.T if self.transpose else region
