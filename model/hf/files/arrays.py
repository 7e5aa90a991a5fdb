"""Converts weights between layouts in memory; launch/convert converts files tensor by tensor."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from model.hf.description import native_shapes
from model.hf.family import Family, MismatchedTensors
from model.transformer import Transformer


def to_native(
    family: Family, model: Transformer, tensors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Returns the parameters of `model` from Hugging Face tensors, as a nested dict with their dtypes.

    Raises:
      MismatchedTensors: tensors are missing, unexpected or of another shape, or a tied tensor differs.
    """
    names = family.match(model, {name: tensor.shape for name, tensor in tensors.items()})
    pieces = family.pieces(model)
    for copy, original in family.tied.items():
        if copy in names and copy not in {piece.hf for piece in pieces}:
            check_tied(names[copy], tensors[names[copy]], tensors[names[original]])
    shapes = native_shapes(model)
    arrays: dict[str, np.ndarray] = {}
    for piece in pieces:
        tensor = tensors[names[piece.hf]]
        if piece.native not in arrays:
            arrays[piece.native] = np.empty(shapes[piece.native], tensor.dtype)
        arrays[piece.native][piece.native_at] = piece.from_hf(tensor)
    params: dict[str, Any] = {}
    for path, array in arrays.items():
        *folders, leaf = path.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return params


def to_hf(family: Family, model: Transformer, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the Hugging Face tensors of the parameters of `model`, in the parameters' dtypes."""
    shapes = family.shapes(model)
    tensors: dict[str, np.ndarray] = {}
    for piece in family.pieces(model):
        array: Any = params
        for name in piece.native.split("/"):
            array = array[name]
        array = np.asarray(array)
        if piece.hf not in tensors:
            tensors[piece.hf] = np.empty(shapes[piece.hf], array.dtype)
        piece.region(tensors[piece.hf])[...] = piece.to_hf(array)
    return tensors


def check_tied(name: str, copy: np.ndarray, original: np.ndarray) -> None:
    """Raises MismatchedTensors if a tensor differs from the tensor it is tied to."""
    if copy.dtype != original.dtype or copy.tobytes() != original.tobytes():
        raise MismatchedTensors(
            f"{name} differs from the embedding that config.json ties it to: if the model has a head "
            'of its own, say so there by "tie_word_embeddings": false.'
        )
