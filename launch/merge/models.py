"""The models of a merge: Hugging Face folders with safetensors, or runs of this project, as named tensors.

A tensor of a run is one layer's part of an array: 'layers/3/mlp/up/kernel', however the layers are stored.
"""

import collections
import dataclasses
import functools
import hashlib
import math
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.storage import mirror, paths
from espalier.launch.merge.settings import MergeError
from espalier.model import layer_groups
from espalier.model.hf.files.safetensors_files import SafetensorsReader, read_json

CONFIG = "config.json"
_LAYER = re.compile(r"((?:.*?\.)?(?:layers|h|blocks?|layer))\.(\d+)\.(.+)")
# Tensors that come before the layers; other tensors outside of layers come after them.
FIRST = re.compile(
    r"(?!lm_head)(?:.*[./])?(?:token_embed|embed_tokens|embed_in|wte|wpe|shared|word_embeddings|positions?|"
    r"position_embeddings|embed_positions|embeddings?|relative_(?:attention_)?bias\w*)(?:[./].*)?"
)
HEAD = re.compile(r"(?:.*[./])?(?:lm_head|output_projection|embed_out)[./].*")
_POSITIONS = re.compile(r"(^|.*[./])(wpe|positions?|position_embeddings|embed_positions)([./].*|$)")
# Tensors without weights, which readers make themselves.
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
_HELD_CHUNKS = 3
_SAMPLED = 2048  # values of each tensor in a short digest
_READ = 1 << 22  # values that are read at a time for a whole one

Read = Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of a tensor: its stack of layers, the layer, and its name in the layer; outside of layers the whole name."""

    stack: str | None
    layer: int | None
    rest: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor of a model.

    Attributes:
      shape, dtype: of the tensor.
      names: by which filters may call it; the first is its own.
      place: where it is in the model.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    names: tuple[str, ...]
    place: Place

    def is_vocabulary(self, size: int) -> bool:
        """Returns whether the rows are the tokens of a vocabulary of this size: of any matrix outside of layers with so many."""
        name, rows = self.names[0], self.shape[:1] == (size,)
        tokens = FIRST.fullmatch(name) or HEAD.fullmatch(name) or len(self.shape) > 1
        return bool(rows and tokens and self.place.stack is None and not _POSITIONS.fullmatch(name))


class _Tensors:
    """What both kinds of models have.

    Attributes:
      tensors: by name.
    """

    tensors: dict[str, Entry]

    @functools.cached_property
    def layers(self) -> dict[tuple[str, int | None], list[str]]:
        """The names of the tensors in each layer, by stack and layer."""
        layers: dict[tuple[str, int | None], list[str]] = {}
        for place in (entry.place for entry in self.tensors.values()):
            if place.stack is not None:
                layers.setdefault((place.stack, place.layer), []).append(place.rest)
        return layers

    @property
    def stacks(self) -> list[str]:
        """The stacks of layers."""
        return list(dict.fromkeys(stack for stack, _ in self.layers))

    def depth(self, stack: str) -> int:
        """Returns the number of layers of a stack."""
        return sum(name == stack for name, _ in self.layers)


def short(stack: str, stacks: Sequence[str]) -> str:
    """Returns the name of a stack in `modules`: that of its owner, or 'default' for the only one."""
    if len(stacks) == 1:
        return "default"
    owner, _, _ = stack.replace("/", ".").rpartition(".")
    return owner or "decoder"


class HfModel(_Tensors):
    """A folder with safetensors, and config.json if it has one; of an address, a copy.

    Raises:
      CheckpointFileError: a file is missing, damaged, or not safe to read.
      FileNotFoundError, StoreError: see mirror.local.
    """

    kind = "hf"

    def __init__(self, path: str):
        self.path = path
        self.folder = pathlib.Path(mirror.local(path))
        has_config = os.path.lexists(self.folder / CONFIG)
        self.config: dict[str, Any] = read_json(self.folder / CONFIG) if has_config else {}
        self._reader = SafetensorsReader(self.folder)
        self.tensors = {}
        for name, info in self._reader.tensors.items():
            if not _COMPUTED.fullmatch(name):
                place = self._place(name)
                self.tensors[name] = Entry(info.shape, info.dtype, (name,), place)

    def _place(self, name: str) -> Place:
        match = _LAYER.fullmatch(name)
        if match is None:
            return Place(None, None, name)
        stack, layer, rest = match.groups()
        # T5's first block has the table of all blocks, which stays there when blocks move; UMT5 has one in each.
        of_all = (
            "relative_attention_bias" in rest and f"{stack}.1.{rest}" not in self._reader.tensors
        )
        return Place(None, None, name) if of_all else Place(stack, int(layer), rest)

    def name(self, stack: str | None, layer: int | None, rest: str) -> str:
        return rest if stack is None else f"{stack}.{layer}.{rest}"

    def read(self, name: str) -> Read:
        dtype = self._reader.tensors[name].dtype

        def read(low: int, high: int) -> np.ndarray:
            values = np.empty(high - low, dtype)
            self._reader.read_values(name, low, values)
            return values

        return read

    def digest(self, *, whole: bool) -> str:
        """Returns a digest of the tensors, in any files: of the first values of each, or of all values."""
        result = hashlib.blake2b(digest_size=16)
        for name in sorted(self.tensors):
            entry, read = self.tensors[name], self.read(name)
            size = math.prod(entry.shape)
            result.update(f"{name} {entry.dtype} {entry.shape}\n".encode())
            for low in range(0, size if whole else min(size, _SAMPLED), _READ):
                values = read(low, min(low + _READ, size) if whole else min(size, _SAMPLED))
                result.update(values.view(np.uint8).data)
        return result.hexdigest()

    def fingerprint(self) -> list[Any]:
        """Returns facts that change if the weights' files are replaced, and not with the place of the folder."""
        files = sorted({info.file for info in self._reader.tensors.values()})
        if paths.is_remote(self.path):  # the times of a copy differ between machines
            objects = paths.entries(self.path)
            return [[x.name, objects[x.name].size, objects[x.name].version] for x in files]
        stats = [(file.name, file.stat()) for file in files]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def close(self) -> None:
        self._reader.close()


class NativeModel(_Tensors):
    """The newest undamaged step of a run, or a step.

    Raises:
      DamagedCheckpointError, FileNotFoundError, TransformError: see SourceModel.
    """

    kind = "native"

    def __init__(self, path: str):
        from espalier.launch.weights.source_models import SourceModel

        self.path = path
        self.source = SourceModel(path, "auto")
        self.folder = pathlib.Path(os.fspath(self.source.folder))
        self.model = self.source.model
        self.source.check_no_adapters()
        self.scanned = bool(getattr(self.model.config, "scan_layers", False))
        self._shapes = self.source.abstract.shapes
        self._open: tuple[str, Any] | None = None
        self._lock = threading.Lock()
        self.arrays: dict[str, list[str]] = {}  # the tensors of each array, in order
        self._where: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.tensors = {}
        groups = layer_groups.in_stacks(self._shapes, scanned=self.scanned)
        hf = self._hf_names()
        for path_, shape in self._shapes.items():
            for at, place in self._parts(path_, groups):
                name = self.name(place.stack, place.layer, place.rest)
                names = (name, *hf.get((path_, at), ()))
                self.tensors[name] = Entry(shape[len(at) :], self._dtype(path_), names, place)
                self._where[name] = (path_, at)
                self.arrays.setdefault(path_, []).append(name)

    def _parts(
        self, path: str, groups: Mapping[str, Sequence[layer_groups.Group]]
    ) -> Iterator[tuple[tuple[int, ...], Place]]:
        match = layer_groups.BLOCK.fullmatch(path)
        if match is None:
            yield (), Place(None, None, path)
            return
        layers = layer_groups.layers_of(groups[match[1]], int(match[2]))
        for index, layer in enumerate(layers):
            yield (index,) if self.scanned else (), Place(match[1], layer, match[3])

    def _hf_names(self) -> dict[tuple[str, tuple[int, ...]], tuple[str, ...]]:
        """Returns the names in Hugging Face's layout, by array and leading indices, if a family has the model."""
        from espalier.model.hf.family import UnsupportedModel
        from espalier.model.hf.registry import family_of_model

        try:
            pieces = family_of_model(self.model).pieces(self.model)
        except UnsupportedModel:
            return {}
        names: dict[tuple[str, tuple[int, ...]], tuple[str, ...]] = {}
        for piece in pieces:
            at = (
                piece.native_at[:1]
                if layer_groups.BLOCK.fullmatch(piece.native) and self.scanned
                else ()
            )
            names[piece.native, at] = (*names.get((piece.native, at), ()), piece.hf)
        return names

    def _dtype(self, path: str) -> np.dtype:
        import jax.numpy as jnp

        return np.dtype(jnp.dtype(self.source.dtype(path)))

    def name(self, stack: str | None, layer: int | None, rest: str) -> str:
        return rest if stack is None else f"{stack}/{layer}/{rest}"

    def read(self, name: str) -> Read:
        path, at = self._where[name]
        with self._lock:
            if self._open is None or self._open[0] != path:  # an array of one chunk is in memory
                self._open = (path, self.source.open(path))
            stored = self._open[1]
        return _ChunkedRead(stored, at, self.tensors[name].shape)

    def digest(self, *, whole: bool) -> str:
        """Returns the digest of all parameters, which the checkpoint has."""
        return self.source.base_digest

    def fingerprint(self) -> list[Any]:
        return [self.source.step.name, self.source.base_digest]

    def close(self) -> None:
        self._open = None


class _ChunkedRead:
    """Reads values of one layer of an array; the last chunks of rows stay in memory."""

    def __init__(self, stored: Any, at: tuple[int, ...], shape: tuple[int, ...]):
        self._stored, self._at, self._shape = stored, at, shape
        self._width = math.prod(shape[1:])
        self._rows = max(1, stored.chunk[len(at)]) if shape else 1
        self._held: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, low: int, high: int) -> np.ndarray:
        size = self._rows * self._width
        if not self._shape:
            return np.asarray(self._stored.read(self._at)).reshape(-1)[low:high]
        parts = []
        for chunk in range(low // size, (high - 1) // size + 1):
            first = chunk * size
            parts.append(self._chunk(chunk)[max(0, low - first) : high - first])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _chunk(self, chunk: int) -> np.ndarray:
        with self._lock:
            if chunk not in self._held:
                rows = (chunk * self._rows, min((chunk + 1) * self._rows, self._shape[0]))
                values = self._stored.read(self._at, rows=rows)
                self._held[chunk] = np.ascontiguousarray(values).reshape(-1)
                if len(self._held) > _HELD_CHUNKS:
                    self._held.popitem(last=False)
            return self._held[chunk]


Model = HfModel | NativeModel


def digests(models: Mapping[str, Model]) -> dict[str, str]:
    """Returns a digest of each model's weights, which does not depend on where the model is.

    It is of all values if models agree in the first ones of every tensor, as copies do.
    """
    short = {path: model.digest(whole=False) for path, model in models.items()}
    counts = collections.Counter(short.values())
    return {
        path: digest if counts[digest] == 1 else models[path].digest(whole=True)
        for path, digest in short.items()
    }


def check_distinct(file: str, digests: Mapping[str, str]) -> None:
    """Raises MergeError, which names the configuration's file, if two models have the same weights."""
    first: dict[str, str] = {}
    for path, digest in digests.items():
        if first.setdefault(digest, path) != path:
            raise MergeError(
                f"{file}: lists a model twice: {path} has the weights of {first[digest]}. Remove one of them, or give it by "
                "one path."
            )


def open_model(path: str) -> Model:
    """Opens a checkpoint of either kind.

    Raises:
      MergeError: there is none.
    """
    if paths.is_remote(path):
        names = paths.names(path)
        own = {"checkpoints", "manifest.json"}
        is_run = own.intersection(names) or path.rstrip("/").endswith("/checkpoints")
        if not is_run and not any(name.endswith(".safetensors") for name in names):
            raise MergeError(f"{path} has no checkpoint: check the address.")
        return NativeModel(path) if is_run else HfModel(path)
    folder = pathlib.Path(path)
    if (
        (folder / "checkpoints").is_dir()
        or (folder / "manifest.json").exists()
        or (folder.name == "checkpoints" and folder.is_dir())
    ):
        return NativeModel(path)
    if (folder / "adapter_config.json").exists():
        raise MergeError(
            f"{path} is an adapter of peft, not a whole model: import it with espalier convert --from_peft and merge it "
            "with espalier upcycle merge."
        )
    if not folder.is_dir():
        hint = "download it first" if re.fullmatch(r"[\w.-]+/[\w.-]+", path) else "check the path"
        raise MergeError(
            f"{path} is not a folder here: models are read from folders and object stores; {hint}."
        )
    return HfModel(path)
