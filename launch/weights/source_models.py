"""The checkpoints that a mixture is made of, read array by array, and the one that is made of them."""

import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from launch.config import gin_config
from launch.run import run_vocabulary
from launch.run.load_run import CONFIG
from model.transforms.upcycle import Model, Piece, UpcycleError
from trainers.checkpoints import manifest, state_tree, step_dir, stream_checkpoint
from trainers.checkpoints.array_files import StoredArray
from trainers.checkpoints.manifest import Block, DamagedCheckpointError, Manifest
from trainers.checkpoints.stream_checkpoint import StreamedArray

_RELATED = 0.1  # least correlation of embeddings; those of other seeds have none
_ROWS = 4096  # of them that are compared
_EMBEDDING = "token_embed/embedding"
_BLOCK_BYTES = 64 << 20  # of an array that is made in blocks of rows, in float32


class SourceModel:
    """A model's checkpoint: shapes, and arrays that are read when they are needed."""

    def __init__(self, path: str, params: str):
        self.path = path
        self._step = epath.Path(step_dir.resolve(path))
        recorded: Manifest = step_dir.read_manifest(self._step)
        if problems := manifest.check_files(self._step, recorded.files):
            raise DamagedCheckpointError(self._step, problems)
        self.meta: Mapping[str, Any] = step_dir.read_record(self._step, recorded)["meta"]
        self._root = "ema_params/" if recorded.use_ema(params) else "params/"
        self.shapes = {
            name.removeprefix(self._root): tuple(entry.shape)
            for name, entry in recorded.arrays.items()
            if name.startswith(self._root)
        }
        if not self.shapes:
            raise UpcycleError(f"{path} has no {self._root.rstrip('/')}: use --params=raw.")
        self.folder = step_dir.run_folder(self._step)

    @property
    def model(self) -> Model:
        return self.path, self.shapes

    @property
    def config(self) -> str:
        return pathlib.Path(self.folder, CONFIG).read_text(encoding="utf-8")

    def open(self, path: str) -> StoredArray:
        return StoredArray(self._step, self._root + path)

    def kept_meta(self) -> dict[str, Any]:
        keys = ("vocabulary", "add_bos", "start_token")
        return {key: self.meta[key] for key in keys if key in self.meta}


def check_related(sources: Sequence[SourceModel], *, unrelated: bool) -> None:
    """Models that can be averaged: one vocabulary, and one seed.

    Branches of one seed keep much of its embeddings; weights of others do not line up, whatever their shapes.

    Args:
      sources: all of them, the first being what the others are compared with.
      unrelated: takes those of other seeds.

    Raises:
      UpcycleError: by name.
    """
    first = sources[0]
    for other in sources[1:]:
        if other.meta.get("vocabulary") != first.meta.get("vocabulary"):
            raise UpcycleError(
                f"{other.path} was trained with another vocabulary than {first.path}: the same ids would "
                "stand for other words. Experts come from one seed and its vocabulary."
            )
    if unrelated or _EMBEDDING not in first.shapes:
        return
    count = min(_ROWS, first.shapes[_EMBEDDING][0])
    rows = first.open(_EMBEDDING).read(rows=(0, count)).astype(np.float64).ravel()
    for other in {source.path: source for source in sources[1:]}.values():
        if other.shapes.get(_EMBEDDING) != first.shapes[_EMBEDDING]:
            continue  # the plan names it
        theirs = other.open(_EMBEDDING).read(rows=(0, count)).astype(np.float64).ravel()
        found = float(np.corrcoef(rows, theirs)[0, 1])
        if not found > _RELATED:
            raise UpcycleError(
                f"{other.path} and {first.path} do not come from one seed: their embeddings correlate by "
                f"{found:.2f}, so that averages of the two mean nothing. --unrelated takes them all the same."
            )


def write_config(folder: str, source: SourceModel, bindings: Sequence[str]) -> None:
    """The configuration of a model that is made of one like `source`, and its vocabulary."""
    text = source.config + "\n".join(["", *bindings, ""])
    pathlib.Path(folder, CONFIG).write_text(text, encoding="utf-8")
    run_vocabulary.copy(source.folder, folder)


def parameters(folder: str, files: Sequence[str]) -> state_tree.Flat:
    """Shapes and dtypes of the parameters of the model that a run's configuration says.

    Args:
      folder: with a configuration made of one that came with a checkpoint.
      files: the user's own, which may import what that may not by itself.
    """
    import flax.linen as nn

    from trainers import initialise

    loaded: Any = gin_config.load(
        files,
        entry="launch.run.load_run:RunConfig",
        unused={"VOCABULARY": "None"},
        untrusted=["t5x_configs/runs/load_run.gin", os.path.join(folder, CONFIG)],
    ).entry
    variables = initialise.abstract_variables(loaded().model)
    return state_tree.flatten(nn.meta.unbox(variables["params"]))


def save(
    folder: str,
    pieces: Sequence[Piece],
    target: state_tree.Flat,
    sources: Sequence[SourceModel],
    *,
    scanned: bool,
    meta: Mapping[str, Any],
) -> None:
    """Writes the parameters of `target` as the checkpoint of a run: stacked layers one by one, large means by rows."""
    by_path = {source.path: source for source in sources}
    arrays = {
        f"params/{x.path}": _streamed(x, target[x.path].dtype, by_path, scanned=scanned)
        for x in pieces
    }
    stream_checkpoint.save(os.path.join(folder, step_dir.CHECKPOINTS), arrays, meta=meta)


def _streamed(
    piece: Piece, dtype: Any, sources: Mapping[str, SourceModel], *, scanned: bool
) -> StreamedArray:
    count, size = _block_rows(piece, scanned=scanned), piece.shape[0] if piece.shape else 0

    def blocks() -> Iterator[Block]:
        stored = [sources[name].open(path) for name, path in piece.reads]
        if not count:
            parts = [array.read() for array in stored]
            yield (0,) * len(piece.shape), piece.make(parts, 0).astype(dtype)
            return
        for first in range(0, size, count):
            rows = (first, min(first + count, size))
            parts = [array.read(rows=rows) for array in stored]
            yield (first, *(0,) * (len(piece.shape) - 1)), piece.make(parts, first).astype(dtype)

    chunk = (count, *piece.shape[1:]) if count else piece.shape
    return StreamedArray(piece.shape, np.dtype(dtype), chunk, blocks)


def _block_rows(piece: Piece, *, scanned: bool) -> int:
    """How many rows of an array are made at a time: a layer of stacked ones; 0 where it is made whole."""
    if scanned and piece.path.startswith("layers/") and piece.reads:
        return 1
    if not piece.by_rows or 4 * math.prod(piece.shape) <= _BLOCK_BYTES:
        return 0
    return max(1, _BLOCK_BYTES // (4 * math.prod(piece.shape[1:])))
