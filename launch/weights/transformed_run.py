"""Writes a run directory with parameters that a tree transform computes from checkpoints, a slice of an array at a time.

`espalier upcycle`, `espalier upcycle extend` and `espalier upcycle factorise` use it, and measure their
transforms on texts as rows without padding.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from gin import config_parser

from espalier.common.bars import Bar
from espalier.launch.config import gin_config, gin_reader, gin_source, model_file
from espalier.launch.inference import row_files
from espalier.launch.load.load_run import EXAMPLE
from espalier.launch.run import model_record, run_vocabulary
from espalier.launch.run.model_record import CONFIG
from espalier.launch.weights.source_models import SourceModel, model_of
from espalier.launch.weights.target_folder import new_directory
from espalier.model.transforms import base
from espalier.model.transforms.base import Recipe, TransformError, TreeTransform
from espalier.trainers.checkpoints import state_tree, step_dir, stream_checkpoint
from espalier.trainers.checkpoints.manifest import Block
from espalier.trainers.checkpoints.stream_checkpoint import Interrupted, StreamedArray

_LENGTH = 512
_BLOCK_BYTES = 64 << 20  # float32 bytes of a block, for arrays computed in blocks of rows


def token_rows(loaded: Any, path: str, *, flag: str, length: int | None = None) -> np.ndarray:
    """Returns the texts of a file, one after the other, cut into C rows of T tokens: [C, 1, T].

    Args:
      loaded: the run whose vocabulary reads the texts.
      path: file of rows as for espalier score.
      flag: the flag with the path, for messages; `--<flag>_length` is T.
      length: T; None for 512.

    Raises:
      TransformError: the texts are shorter than a row.
      RowFileError: the file cannot be read.
    """
    length = _LENGTH if length is None else length
    rows = row_files.read(path, example=EXAMPLE, flag=flag)
    ids = [id for where, row in rows for id in loaded.context(loaded.tokens(row, where))]
    if len(ids) < length:
        raise TransformError(
            f"--{flag}={path} has {len(ids)} tokens, fewer than one row of {length}: give more text, or a smaller "
            f"--{flag}_length."
        )
    count = len(ids) // length
    return np.asarray(ids[: count * length], np.int32).reshape(count, 1, length)


def write(
    target: str,
    transform: TreeTransform,
    sources: Sequence[SourceModel],
    *,
    config: Sequence[str],
    gin_files: Sequence[str],
    whole_config: bool,
    meta: Mapping[str, Any],
) -> list[Recipe]:
    """Writes a run directory with transformed parameters.

    Only the arrays of one recipe are in memory, or only a layer or block of rows of them if the recipe allows it and the
    sources are stored in parts.

    Args:
      target: run directory, which must not exist.
      transform: transform of the sources, in their order.
      sources: source models; the new run gets the model, vocabulary and record of texts of the first one.
      config: gin lines that turn the first source's configuration into the new model's.
      gin_files: the user's own gin files, which import modules of the model that are not of this project.
      whole_config: whether the new config.gin has all of the first source's, such as its data, and not only its model.
      meta: facts to record with the new checkpoint.

    Returns:
      The executed plan.

    Raises:
      TransformError, ConfigError, ConvertError, CheckpointSaveError.
    """
    first = sources[0]
    _check_foreign(first, gin_files)
    text = "\n".join([first.config(whole=whole_config), *config, ""])
    with new_run(target, text, first, gin_files) as (folder, model):
        leaves = abstract_params(model)
        shapes = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
        recipes = base.plan(transform, [source.abstract for source in sources], shapes)
        by_name = {source.path: source for source in sources}
        with Bar(total=len(shapes), desc="arrays", leave=False, delay=5) as bar:
            arrays = {
                path: array
                for recipe in recipes
                for path, array in _streamed(recipe, leaves, by_name, bar).items()
            }
            made_of = [
                f"{os.path.basename(source.folder)}, step {source.step.name}" for source in sources
            ]
            recorded = {**first.text_meta(), "made_of": made_of, **meta}
            save(folder, arrays, recorded)
    return recipes


@contextlib.contextmanager
def new_run(
    target: str,
    config: str,
    source: SourceModel,
    gin_files: Sequence[str] = (),
    *,
    goes_on: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, Any]]:
    """Context manager: yields the folder of a new run without a checkpoint, and the linen module of its configuration.

    Args:
      target: run directory, which must not exist.
      config: gin text.
      source: the run whose vocabulary the new one gets.
      gin_files: see `write`.
      goes_on: see `new_directory`; the folder then has what a killed conversion has left.
    """
    with new_directory(target, goes_on=goes_on) as folder:
        pathlib.Path(folder, CONFIG).write_text(config, encoding="utf-8")
        model_record.write(folder)
        run_vocabulary.copy(source.folder, folder)
        yield folder, model_of(folder, gin_files)


def save(
    folder: str,
    arrays: Mapping[str, StreamedArray],
    meta: Mapping[str, Any],
    interrupted: Interrupted | None = None,
) -> None:
    """Writes the checkpoint of a new run with these parameters, see stream_checkpoint.py."""
    named = {f"params/{path}": array for path, array in arrays.items()}
    checkpoints = os.path.join(folder, step_dir.CHECKPOINTS)
    stream_checkpoint.save(checkpoints, named, meta=meta, interrupted=interrupted)


def method_lines(files: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Returns the bindings of methods' gin files, includes resolved, as lines to append to a run's configuration.

    Later bindings win. `settings` has values of macros of the files, whose paths are relative to the repository's root.

    Raises:
      ValueError: the files do not define one of these macros.
    """
    imports: dict[str, None] = {}
    bindings: dict[str, str] = {}

    def read(file: str) -> None:
        text = gin_source.read(os.path.join(gin_source.ROOT, file))
        for statement in gin_source.parse(text, file):
            if isinstance(statement, config_parser.IncludeStatement):
                read(statement.filename)
            elif isinstance(statement, config_parser.ImportStatement):
                imports[statement.format()] = None
            else:
                scope = f"{statement.scope}/" if statement.scope else ""
                argument = f".{statement.arg_name}" if statement.arg_name else ""
                bindings[scope + statement.selector + argument] = repr(statement.value)

    for file in files:
        read(file)
    if unknown := settings.keys() - bindings.keys():
        raise ValueError(f"{', '.join(files)} do not define {min(unknown)}.")
    bindings |= {name: repr(value) for name, value in settings.items()}
    names = [name for name in imports if "dynamic_registration" not in name]
    return [*names, *(f"{name} = {value}" for name, value in bindings.items())]


def _check_foreign(source: SourceModel, gin_files: Sequence[str]) -> None:
    """Raises ConfigError if a source's model uses a module that the user's own gin files do not import."""
    reader = gin_reader.Reader(own_modules=gin_source.imported_modules(gin_files, ()))
    reader.read_file(os.path.join(source.folder, model_file.NAME))
    if problems := [reader.refused] if reader.refused else reader.checked.problems:
        raise gin_config.ConfigError(problems)


def abstract_params(model: Any) -> state_tree.Flat:
    """Returns shapes and dtypes of a model's parameters by path."""
    import flax.linen as nn

    from espalier.trainers import initialise

    variables = initialise.abstract_variables(model)
    return state_tree.flatten(nn.meta.unbox(variables["params"]))


def _streamed(
    recipe: Recipe, leaves: state_tree.Flat, sources: Mapping[str, SourceModel], bar: Any
) -> dict[str, StreamedArray]:
    """Returns the outputs of a recipe, computed while they are written; writing the first may compute several."""
    ready: dict[str, Any] = {}

    def streamed(path: str, shape: tuple[int, ...]) -> StreamedArray:
        dtype, count = np.dtype(leaves[path].dtype), _block_rows(recipe, shape)
        size = shape[0] if count else 1

        def blocks() -> Iterator[Block]:
            stored = [sources[name].open(source) for name, source in recipe.inputs]
            for first in range(0, size, count or 1):
                if path not in ready:
                    rows = (first, min(first + count, size)) if count else None
                    parts = [array.read(rows=rows) for array in stored]
                    ready.update(zip(recipe.outputs, recipe.compute(parts, first), strict=True))
                values = np.asarray(ready.pop(path)).astype(dtype)
                yield (first, *(0,) * (len(shape) - 1)) if shape else (), values
            bar.update()

        return StreamedArray(shape, dtype, (count, *shape[1:]) if count else shape, blocks)

    return {path: streamed(path, tuple(shape)) for path, shape in recipe.outputs.items()}


def _block_rows(recipe: Recipe, shape: tuple[int, ...]) -> int:
    """Returns the rows of an array that are computed at a time; 0 if it is computed whole."""
    if recipe.slices == "layers":
        return 1
    if recipe.slices == "whole" or 4 * math.prod(shape) <= _BLOCK_BYTES:
        return 0
    return max(1, _BLOCK_BYTES // (4 * math.prod(shape[1:])))
