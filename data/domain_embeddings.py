"""Embeddings of domains, read from one JSON file. Shapes: N domains, M width of an embedding."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Embeddings:
    """Vectors of domains by name, what encoded them, and the mean they are centred by."""

    names: tuple[str, ...]
    encoder: Mapping[str, Any]
    mean: np.ndarray
    _vectors: Mapping[str, np.ndarray]

    def vectors(self, names: Sequence[str]) -> np.ndarray:
        """[N, M] float32."""
        return np.stack([self._vectors[name] for name in names]).astype(np.float32)


def read(path: str) -> Embeddings:
    """The embeddings of a file of launch.embed_domains."""
    found = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    vectors = {name: np.asarray(x["vector"]) for name, x in found["domains"].items()}
    return Embeddings(tuple(vectors), found["encoder"], np.asarray(found["mean"]), vectors)
