"""Weights of a family in memory: imported by the plan of an import, exported by the family's pieces."""

import pathlib

import numpy as np
from flax import traverse_util

from espalier.model.hf import load
from espalier.model.hf.files.safetensors_files import TensorInfo
from espalier.model.hf.plan import plan


class Memory:
    """Named arrays as the source of a plan."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.tensors = {k: TensorInfo(x.dtype, x.shape, pathlib.Path()) for k, x in arrays.items()}

    def read_into(self, name, start, into):
        into[...] = np.atleast_1d(self.arrays[name])[start : start + len(into)]


def to_native(family, model, tensors):
    """Returns the parameters of `model`, as a nested dict, from Hugging Face tensors."""
    arrays = load.fill(plan(family, model, Memory(tensors)))
    return traverse_util.unflatten_dict(arrays, sep="/")


def to_hf(family, model, params):
    """Returns the Hugging Face tensors of the parameters of `model`, in the parameters' dtypes."""
    shapes = family.shapes(model)
    arrays = traverse_util.flatten_dict(params, sep="/")
    tensors = {}
    for piece in family.pieces(model):
        array = np.asarray(arrays[piece.native])
        tensors.setdefault(piece.hf, np.empty(shapes[piece.hf], array.dtype))
        for part, values in piece.to_hf(array[piece.native_at], tensors[piece.hf]):
            part[...] = values
    return tensors
