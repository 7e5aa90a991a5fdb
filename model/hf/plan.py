"""Plans the import of a checkpoint of another layout, before any weight is read."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from espalier.model.hf.description import native_shapes
from espalier.model.hf.family import Family, MismatchedTensors
from espalier.model.hf.files.safetensors_files import TensorInfo
from espalier.model.hf.files.stacked_experts import unstacked
from espalier.model.hf.mapping import Piece
from espalier.model.transformer import Transformer
from espalier.model.transforms import base

FLOATS = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
_BLOCK_BYTES = 1 << 24  # bytes of a table in one block
_READ_BYTES = 1 << 21  # bytes read at a time, to fit the L2 cache
_TILE_ROWS = 256  # rows copied at a time: as many as the L1 cache has lines for
_CACHE_LINE = 64  # bytes


class UnsuitableDtypeError(ValueError):
    """Weights that are not floats, not finite, or do not fit the requested dtype."""


class Source(Protocol):
    """Named tensors that are read whole or by rows, such as a SafetensorsReader."""

    tensors: dict[str, TensorInfo]

    def read_into(self, name: str, start: int, into: np.ndarray) -> None:
        """Fills an array of the tensor's dtype with its rows from `start` on."""


@dataclasses.dataclass(frozen=True)
class Target:
    """An array to create; its pieces cover each element once."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk(self) -> tuple[int, ...]:
        """The shape of a block: the part of the array in one tensor, or some rows of a table."""
        piece = self.pieces[0]
        rest = self.shape[len(piece.native_at) :]
        if piece.native_at or not _is_table(piece):
            return (*(1 for _ in piece.native_at), *rest)
        width = math.prod(rest[1:]) * self.dtype.itemsize
        return (max(1, min(rest[0], _BLOCK_BYTES // max(width, 1))), *rest[1:])


def _is_table(piece: Piece) -> bool:
    """Returns whether rows of the array are rows of one tensor, so that any rows can be copied alone."""
    return not piece.native_at and not piece.transpose and piece.whole


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of an import.

    Attributes:
      source: the tensors to read.
      names: the name in the source of each Hugging Face tensor name in the pieces.
      arrays: the arrays to create, by native path.
    """

    source: Source
    names: Mapping[str, str]
    arrays: Mapping[str, Target]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.arrays.values())

    def blocks(self, path: str) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yields the blocks of an array, as (start indices, values).

        Raises:
          UnsuitableDtypeError: values are not finite, or do not fit the array's dtype.
        """
        target = self.arrays[path]
        for piece in target.pieces:
            region = target.shape[len(piece.native_at) :]
            step = target.chunk[0] if _is_table(piece) else None
            for low in range(0, region[0], step) if step else [0]:
                rows = (min(step, region[0] - low),) if step else region[:1]
                values = np.empty((*rows, *region[1:]), target.dtype)
                self.fill(values, piece, low)
                if problem := base.not_finite(values):
                    info = self.source.tensors[self.names[piece.hf]]
                    raise UnsuitableDtypeError(
                        f"{info.file}: {self.names[piece.hf]} has {problem}: download it again, or use another checkpoint."
                    )
                start = (*piece.native_at, *(low for _ in region[:1]), *(0 for _ in region[1:]))
                yield start, values.reshape((1,) * len(piece.native_at) + values.shape)

    def fill(self, into: np.ndarray, piece: Piece, start: int = 0) -> None:
        """Copies a piece to an array, some rows at a time.

        Args:
          into: the piece's region of the array; for a table, its rows from `start` on.
          piece: the piece.
          start: for a table, the first row of the tensor.
        """
        name = self.names[piece.hf]
        info = self.source.tensors[name]
        into = into if info.shape else into.reshape(1)
        if _is_table(piece) and info.dtype == into.dtype and into.flags.c_contiguous:
            self.source.read_into(name, start, into)
            return
        count = len(into) if _is_table(piece) else math.prod(info.shape[:1])
        step = _TILE_ROWS
        held = None
        if piece.transpose:
            held = tile_buffer(len(into), into.dtype)
        elif info.shape:
            step = max(1, _READ_BYTES * info.shape[0] // max(1, info.nbytes))
        rows = np.empty((min(step, count), *info.shape[1:]), info.dtype)
        for run, at in piece.runs(count):
            for low in range(run.start, run.stop, step):
                high = min(low + step, run.stop)
                self.source.read_into(name, start + low, rows[: high - low])
                values = piece.from_hf(rows[: high - low])
                here = slice(low - run.start + at, high - run.start + at)
                copy_cast(into[..., here] if piece.transpose else into[here], values, name, held)


def copy_cast(
    into: np.ndarray, values: np.ndarray, name: str, held: np.ndarray | None = None
) -> None:
    """Copies the tensor `name` with `copy_tiled`; UnsuitableDtypeError if a value is too large for `into`."""
    with np.errstate(over="ignore"):
        copy_tiled(into, values, held)
    narrow = into.dtype == np.float16 and values.dtype != np.float16
    if narrow and bool(np.any(np.isinf(into) & ~np.isinf(values.astype(np.float32)))):
        raise UnsuitableDtypeError(
            f"{name} has values beyond 65504, the largest of float16: use --dtype=bfloat16 or float32."
        )


def plan(family: Family, model: Transformer, source: Source, *, dtype: str | None = None) -> Plan:
    """Returns the plan of an import of `source` into `model`; all tensors are checked.

    `dtype` is the dtype of all arrays; None gives each array the widest dtype of its tensors.

    Raises:
      MismatchedTensors: tensors are missing, unexpected or of another shape, or a tied tensor differs.
      UnsuitableDtypeError: a tensor or `dtype` is not a float type.
    """
    source = unstacked(source)
    on_disk = {name: info.shape for name, info in source.tensors.items()}
    names = family.match(model, on_disk)
    pieces = family.pieces(model)
    if dtype is not None and dtype not in FLOATS:
        raise UnsuitableDtypeError(
            f"{dtype!r} is not a dtype of weights: use one of {', '.join(FLOATS)}."
        )
    for name in (names[piece.hf] for piece in pieces):
        if source.tensors[name].dtype.name not in FLOATS:
            raise UnsuitableDtypeError(
                f"{name} is {source.tensors[name]}, but weights must be floats: use the checkpoint before "
                "its quantisation."
            )
    used = {piece.hf for piece in pieces}
    for copy, original in family.tied.items():
        if copy in names and copy not in used:
            _check_tied(source, names[copy], names[original])
    grouped: dict[str, list[Piece]] = {}
    for piece in pieces:
        grouped.setdefault(piece.native, []).append(piece)
    shapes = native_shapes(model)
    arrays = {}
    for path, parts in grouped.items():
        dtypes = {source.tensors[names[piece.hf]].dtype for piece in parts}
        of_source = np.dtype(functools.reduce(jnp.promote_types, sorted(dtypes, key=str)))
        arrays[path] = Target(shapes[path], FLOATS[dtype] if dtype else of_source, tuple(parts))
    return Plan(source, names, arrays)


def _check_tied(source: Source, copy: str, original: str) -> None:
    """Raises MismatchedTensors if two tensors differ; compares some rows at a time to save memory."""
    here, there = source.tensors[copy], source.tensors[original]
    same = here.dtype == there.dtype
    step = max(1, _BLOCK_BYTES * here.shape[0] // max(1, here.nbytes))
    for low in range(0, here.shape[0], step) if same else ():
        rows, tied_rows = np.empty((2, min(step, here.shape[0] - low), *here.shape[1:]), here.dtype)
        source.read_into(copy, low, rows)
        source.read_into(original, low, tied_rows)
        same = same and np.array_equal(rows.view(np.uint8), tied_rows.view(np.uint8))
    if not same:
        raise MismatchedTensors(
            f"{copy} differs from {original}, but config.json ties them. If the model has a head of its "
            'own, set "tie_word_embeddings": false there.'
        )


def narrow_names(plan: Plan) -> dict[str, Any]:
    """Returns the dtypes of tensors whose dtype differs from their array's, by Hugging Face name.

    An array has one dtype; an export needs these to restore the dtype of each tensor.
    """
    return {
        piece.hf: plan.source.tensors[plan.names[piece.hf]].dtype.name
        for target in plan.arrays.values()
        for piece in target.pieces
        if plan.source.tensors[plan.names[piece.hf]].dtype != target.dtype
    }


def tile_buffer(width: int, dtype: np.dtype) -> np.ndarray:
    """Returns the buffer that `copy_tiled` uses for rows of `width` elements; reuse it for many copies."""
    word = np.dtype(f"u{dtype.itemsize}")
    return np.empty((_TILE_ROWS, width + _CACHE_LINE // word.itemsize), word)[:, :width]


def copy_tiled(into: np.ndarray, values: np.ndarray, held: np.ndarray | None = None) -> None:
    """Copies `values` to `into`, cast to its dtype.

    A transposed matrix is copied through a buffer, some rows at a time. Buffer rows are one cache line
    longer than needed: rows whose size is a power of two would otherwise share a few cache lines.
    Elements are moved as plain integers, which is fast in NumPy and releases the GIL.
    """
    if into.dtype != values.dtype:
        into[...] = values.astype(into.dtype)
        return
    into, values = (x.view(f"u{x.itemsize}") for x in (into, values))
    if into.ndim != 2 or values.strides[0] >= values.strides[1]:
        into[...] = values
        return
    matrix = values.T
    if held is None:
        held = tile_buffer(matrix.shape[1], into.dtype)
    for low in range(0, matrix.shape[0], _TILE_ROWS):
        part = matrix[low : low + _TILE_ROWS]
        held[: len(part)] = part
        into[:, low : low + _TILE_ROWS] = held[: len(part)].T
