"""Reads experts that a file has stacked, as transformers 5 has them in memory, as a tensor for each expert.

`experts.gate_up_proj` [E, 2F, D] holds the gates' rows and then the ups' of each expert, `experts.down_proj` is [E, D, F]. Most
published files have `experts.0.gate_proj.weight` [F, D] and so on, whose names the families have.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from espalier.model.hf.files.safetensors_files import SafetensorsReader, TensorInfo, TensorReader

_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def unstacked(source: Any) -> Any:
    """Returns a reader with one tensor for each expert instead of each stacked tensor; other tensors are unchanged."""
    stacked = [
        x for x, info in source.tensors.items() if _STACKED.fullmatch(x) and len(info.shape) == 3
    ]
    return (
        _Unstacked(source, stacked) if stacked and isinstance(source, SafetensorsReader) else source
    )


class _Unstacked(TensorReader):
    def __init__(self, source: SafetensorsReader, stacked: list[str]):
        self._source = source
        self.tensors = {name: info for name, info in source.tensors.items() if name not in stacked}
        self._starts: dict[
            str, tuple[str, int]
        ] = {}  # the stacked tensor, and the first value in it
        for name in stacked:
            self._split(name, source.tensors[name])

    def _split(self, name: str, info: TensorInfo) -> None:
        experts, _, projection = name.rpartition(".")
        parts = _PARTS[projection]
        count, rows, width = info.shape
        for i in range(count * len(parts)):
            expert, part = divmod(i, len(parts))
            own = f"{experts}.{expert}.{parts[part]}.weight"
            shape = (rows // len(parts), width)
            self._starts[own] = name, i * shape[0] * width
            self.tensors[own] = dataclasses.replace(info, shape=shape)

    def read_into(self, name: str, start: int, into: np.ndarray) -> None:
        if name not in self._starts:
            return self._source.read_into(name, start, into)
        stacked, first = self._starts[name]
        self._source.read_values(stacked, first + start * self.tensors[name].shape[1], into)
        return None
