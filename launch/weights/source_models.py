"""Checkpoints that a tree transform reads array by array."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.config import gin_source, model_file
from espalier.launch.run.model_record import CONFIG
from espalier.model.transforms.base import Source, TransformError
from espalier.trainers.checkpoints import base_step, manifest, step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.checkpoints.manifest import ArrayEntry, DamagedCheckpointError

_RELATED = 0.1  # minimum correlation of embeddings; models of other seeds have none
_ROWS = 4096  # number of embedding rows that are compared
_EMBEDDING = "token_embed/embedding"


class SourceModel:
    """A checkpoint of a model, or of a model's part for inference: shapes, and arrays that are read on demand.

    Args:
      path: a step directory, or a run directory for its newest undamaged step.
      params: see launch/load/load_run.py.

    Raises:
      DamagedCheckpointError, FileNotFoundError: no undamaged checkpoint.
      TransformError: the checkpoint has no such parameters.
    """

    def __init__(self, path: str, params: str):
        self.path = path
        self.step, recorded = step_dir.newest_good(path, checked)
        self.meta: Mapping[str, Any] = step_dir.read_record(self.step, recorded)["meta"]
        parts = base_step.parts(self.step, recorded, params)
        if not parts[0].entries:
            raise TransformError(f"{path} has no {parts[0].root.rstrip('/')}: use --params=raw.")
        for part in parts[1:]:
            checked(part.step)
        self.folder = step_dir.files_of_run(self.step)
        part = self._model_file().inference_part
        self._root = part and f"{part}/"
        self._parts = {
            name.removeprefix(self._root): part
            for part in parts
            for name in part.entries
            if name.startswith(self._root)
        }
        shapes = {path: tuple(self._entry(path).shape) for path in self._parts}
        self.abstract = Source(path, shapes)

    def config(self, *, whole: bool) -> str:
        """Returns the gin text of the model, or of the run's whole configuration.

        Raises:
          TransformError: the whole configuration is of a model with further heads.
        """
        if not whole:
            return self._model_file().for_inference().gin()
        if self._root:
            raise TransformError(
                f"{self.path} has a model with further heads, of which its {self._root}... is used: its whole configuration "
                "does not fit the result; leave --trust_config out."
            )
        return gin_source.read(os.path.join(self.folder, CONFIG))

    def _model_file(self) -> model_file.ModelFile:
        return model_file.read(os.path.join(self.folder, model_file.NAME))

    def open(self, path: str) -> StoredArray:
        part = self._parts[path]
        return StoredArray(part.step, part.root + self._root + path, self._entry(path))

    def dtype(self, path: str) -> str:
        """Returns the name of a parameter's dtype."""
        return self._entry(path).dtype

    def _entry(self, path: str) -> ArrayEntry:
        return self._parts[path].entries[self._root + path]

    @property
    def base_digest(self) -> str:
        """The digest of the parameters that are no adapters', see base_step.digest."""
        entries = {path: self._entry(path) for path in self._parts}
        return base_step.digest(base_step.added(self.meta).base_of(entries))

    def hf_meta(self) -> dict[str, Any]:
        """Returns the metadata of an import from Hugging Face, if there is some."""
        return {"hf": self.meta["hf"]} if "hf" in self.meta else {}

    def text_meta(self) -> dict[str, Any]:
        """Returns the metadata on the vocabulary and on tokens before a text."""
        keys = ("vocabulary", "add_bos", "start_token")
        return {key: self.meta[key] for key in keys if key in self.meta}


def checked(step: Any) -> tuple[Any, manifest.Manifest]:
    """Returns a step and its manifest.

    Raises:
      DamagedCheckpointError: a file differs from the manifest.
    """
    recorded = step_dir.read_manifest(step)
    problems = manifest.check_files(step, recorded.files)
    # Arrays are read without their digests, so that no other file may take part.
    if problems := problems or manifest.unlisted(step, recorded.files):
        raise DamagedCheckpointError(step, problems)
    return step, recorded


def check_related(sources: Sequence[SourceModel], *, unrelated: bool) -> None:
    """Checks that models can be averaged: they have one vocabulary and, unless `unrelated`, one seed model.

    Embeddings of runs that continue one seed model stay correlated. Weights of models from other seeds do not correspond,
    even if their shapes agree.

    Raises:
      TransformError: a model cannot be averaged with the first.
    """
    first = sources[0]
    for other in sources[1:]:
        if other.meta.get("vocabulary") != first.meta.get("vocabulary"):
            raise TransformError(
                f"{other.path} was trained with another vocabulary than {first.path}, in which the same ids "
                "are other words: give models of one vocabulary."
            )
    shape = first.abstract.shapes.get(_EMBEDDING)
    if unrelated or shape is None:
        return
    count = min(_ROWS, shape[0])
    rows = first.open(_EMBEDDING).read(rows=(0, count)).astype(np.float64).ravel()
    for other in {source.path: source for source in sources[1:]}.values():
        if other.abstract.shapes.get(_EMBEDDING) != shape:
            continue  # the transform's plan reports the difference
        theirs = other.open(_EMBEDDING).read(rows=(0, count)).astype(np.float64).ravel()
        correlation = float(np.corrcoef(rows, theirs)[0, 1])
        if not correlation > _RELATED:
            raise TransformError(
                f"{other.path} and {first.path} did not start from the same seed model: the correlation of their "
                f"embeddings is {correlation:.2f}, so their average is meaningless. --unrelated accepts them."
            )
