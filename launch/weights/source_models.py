"""Checkpoints that a tree transform reads array by array."""

import functools
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.config import gin_config, gin_source, model_file
from espalier.launch.run.model_record import CONFIG
from espalier.model.transforms.base import Source, TransformError
from espalier.trainers.checkpoints import base_step, manifest, step_dir
from espalier.trainers.checkpoints.array_files import StoredArray
from espalier.trainers.checkpoints.manifest import ArrayEntry, DamagedCheckpointError

COMPARED = 1 << 20  # number of values of embeddings that are compared
_RELATED = 0.1  # minimum correlation of embeddings; models of other seeds have none
_EMBEDDING = "token_embed/embedding"
_TEXT_DEFAULTS = {"add_bos": False, "start_token": 0}
# Settings, as model/hf/description.py names them, that a mixture does not share with the dense models that it is made of.
_OF_EXPERTS = r"block(_\d+)?\.(attention|mlp(:\w+)?)"


class SourceModel:
    """A checkpoint of a model, or of a model's part for inference: shapes, and arrays that are read on demand.

    Args:
      path: a step directory, or a run directory for its newest undamaged step.
      params: see launch/load/load_run.py.
      gin_files: the user's own gin files, which import modules of the model that are not of this project.

    Raises:
      DamagedCheckpointError, FileNotFoundError: no undamaged checkpoint.
      TransformError: the checkpoint has no such parameters.
    """

    def __init__(self, path: str, params: str, gin_files: Sequence[str] = ()):
        self.path = path
        self.gin_files = gin_files
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

    @functools.cached_property
    def model(self) -> Any:
        """The linen module of the model's part for inference."""
        from espalier.model.protocol import inference_model

        return inference_model(model_of(os.fspath(self.folder), self.gin_files))

    def check_no_adapters(self) -> None:
        """Raises TransformError if the model has adapters."""
        from espalier.model.protocol import adapters_of

        if adapters_of(self.model) is not None:
            raise TransformError(
                f"{self.path} has adapters: merge them into its weights first, espalier upcycle merge."
            )

    def factors(self) -> list[str]:
        """Returns the paths of the matrices that are stored as two factors."""
        from espalier.model.low_rank.decompose import factorised_modules

        return factorised_modules(self.abstract.shapes)

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

    def origin_meta(self) -> dict[str, Any]:
        """Returns the metadata of an import from Hugging Face and of a mixture's experts, if there is some."""
        return {key: self.meta[key] for key in ("hf", "upcycled") if key in self.meta}

    def embedding(self) -> np.ndarray | None:
        """Returns the first rows of the tokens' table; None if the model has none."""
        if (shape := self.abstract.shapes.get(_EMBEDDING)) is None:
            return None
        return self.open(_EMBEDDING).read(rows=(0, min(shape[0], max(1, COMPARED // shape[1]))))

    def text_meta(self) -> dict[str, Any]:
        """Returns the metadata on the vocabulary and on tokens before a text."""
        keys = ("vocabulary", *_TEXT_DEFAULTS)
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


def model_of(folder: str, gin_files: Sequence[str] = ()) -> Any:
    """Returns the linen module in the model.json of a run's directory, which needs no checkpoint.

    Of the user's own gin files only the imports are read: their bindings are not the recorded model's.
    """
    loaded: Any = gin_config.load(
        entry="espalier.launch.load.load_run:RunConfig",
        unused={"VOCABULARY": "None"},
        defaults=["t5x_configs/runs/load_run.gin", os.path.join(folder, model_file.NAME)],
        imports_of=gin_files,
    ).entry
    return loaded().model


def check_related(
    sources: Sequence[SourceModel], *, unrelated: bool, averaged: bool, mixture: bool = False
) -> None:
    """Checks that models can become one: they are alike and, unless `unrelated`, have one seed model.

    Args:
      sources: some may be the same.
      unrelated: see `espalier upcycle`.
      averaged: whether parameters of different models are averaged.
      mixture: see `check_alike`.

    Raises:
      TransformError: a model does not fit the first, or its parameters cannot be averaged.
    """
    different = {source.path: source for source in sources}.values()
    for source in different:
        if averaged or not mixture:
            source.check_no_adapters()
        if averaged and (modules := source.factors()):
            raise TransformError(
                f"{source.path} stores {modules[0]} as factors, and the product of mean factors is not the mean of the "
                "matrices: make it dense first, espalier upcycle factorise --recompose."
            )
    first, *others = different
    for other in others:
        check_alike(first, other, mixture=mixture)
    for other, correlation in () if unrelated else unlike({x: x.embedding() for x in different}):
        raise TransformError(
            f"{other.path} and {first.path} did not start from the same seed model: the correlation of their "
            f"embeddings is {correlation:.2f}, so their average is meaningless. --unrelated accepts them."
        )


def check_alike(
    first: SourceModel, other: SourceModel, *, but: Collection[str] = (), mixture: bool = False
) -> None:
    """Checks that two models compute one function of their parameters, of one vocabulary; warns of texts that begin otherwise.

    Args:
      but: settings that are not compared, as model/hf/description.py names them.
      mixture: whether the first is a mixture, and the other a dense model like those that it was made of.

    Raises:
      TransformError: they do not; the message names the settings.
    """
    from espalier.model.hf.description import describe, differences

    here, there = describe(first.model), describe(other.model)
    left_out = {*but}
    if mixture:
        left_out |= here.keys() ^ there.keys()
        left_out |= {name for name in here if re.fullmatch(rf"{_OF_EXPERTS}(\.adapters)?", name)}
    sides = ({name: x[name] for name in x if name not in left_out} for x in (here, there))
    if words := differences(*sides):
        raise TransformError(
            f"{first.path} and {other.path} are not of one model: {'; '.join(words[:5])}. Models that compute "
            "differently cannot be merged."
        )
    if first.meta.get("vocabulary") != other.meta.get("vocabulary"):
        raise TransformError(
            f"{other.path} was trained with another vocabulary than {first.path}, in which the same ids "
            "are other words: give models of one vocabulary."
        )
    for key, default in _TEXT_DEFAULTS.items():
        a, b = (x.meta.get(key, default) for x in (first, other))
        if a != b:
            print(
                f"warning: {key} is {a} in {first.path}, whose setting the result has, and {b} in {other.path}.",
                file=sys.stderr,
            )


def unlike(embeddings: Mapping[Any, np.ndarray | None]) -> Iterator[tuple[Any, float]]:
    """Yields the models whose embeddings are not correlated with the first model's, and the correlation.

    Embeddings of runs that continue one model stay correlated. Weights of models from other starts do not correspond, even
    if their shapes agree. Embeddings of other sizes are not compared.
    """
    (_, first), *others = embeddings.items()
    for model, values in others:
        if first is None or values is None or values.size != first.size or not first.size:
            continue
        pair = [x.astype(np.float64).ravel() for x in (first, values)]
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = float(np.corrcoef(*pair)[0, 1])
        if not correlation > _RELATED:
            yield model, correlation
