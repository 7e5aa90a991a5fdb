"""Imports weights of other projects as a run: `config.gin` and a checkpoint that every command reads."""

import math
import os
import pathlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.bars import Bar
from espalier.data.tokenizers import gguf_tokenizer
from espalier.launch.run import hf_checkpoint
from espalier.launch.weights.target_folder import check_space, new_directory
from espalier.model.hf.families import family_of_config
from espalier.model.hf.files.gguf_file import GgufReader
from espalier.model.hf.files.safetensors_files import SafetensorsReader, read_json
from espalier.model.hf.plan import Plan, narrow_names
from espalier.trainers.checkpoints import step_dir, stream_checkpoint
from espalier.trainers.checkpoints.stream_checkpoint import StreamedArray


def import_hf(source: str, target: str, *, dtype: str | None = None) -> str:
    """Writes a new run directory `target` with the weights of a Hugging Face checkpoint, stored as `dtype` if not None.

    Returns:
      A description of the weights, see `described`.

    Raises:
      ConvertError, WeightFileError, UnsupportedConfig, MismatchedTensors, UnsuitableDtypeError,
      CheckpointSaveError.
    """
    folder = pathlib.Path(source)
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    record = {"generation_config": read_json(generation)} if generation.exists() else {}
    family_of_config(config)  # Raises before files are opened.
    with SafetensorsReader(folder) as tensors, new_directory(target) as partial:
        return _write(tensors, config, record, partial, dtype, tokenizer=folder)


def import_gguf(source: str, target: str, *, dtype: str | None = None) -> str:
    """Writes a run directory with the weights of a GGUF file, see `import_hf`; the default dtype is float32."""
    with (
        GgufReader(source) as tensors,
        new_directory(target) as partial,
        tempfile.TemporaryDirectory() as tokenizer,
    ):
        gguf_tokenizer.write(tensors.tokenizer(), tokenizer)
        folder = pathlib.Path(tokenizer)
        return _write(tensors, tensors.config, {}, partial, dtype, tokenizer=folder)


def described(family: str, shapes: Iterable[Sequence[int]], dtype: str, nbytes: int) -> str:
    """Returns family, number of parameters, most common dtype and size of weights, for a message."""
    size = f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
    return f"{family}, {sum(map(math.prod, shapes)):,} parameters in {dtype}, {size}"


def _write(
    tensors: Any,
    config: Mapping[str, Any],
    record: Mapping[str, Any],
    folder: str,
    dtype: str | None,
    *,
    tokenizer: pathlib.Path,
) -> str:
    weights = hf_checkpoint.weights(tensors, config, dtype=dtype)
    checked, stored = weights.plan, weights.model.config.param_dtype
    check_space(folder, checked.nbytes)
    meta = {
        "hf": {
            "family": weights.family,
            "config": config,
            "dtypes": {} if dtype else narrow_names(checked),
            **record,
        },
        **hf_checkpoint.write_record(folder, weights.model, tokenizer),
    }
    with progress(checked.nbytes) as bar:
        arrays = {f"params/{path}": _streamed(checked, path, bar) for path in checked.arrays}
        stream_checkpoint.save(os.path.join(folder, step_dir.CHECKPOINTS), arrays, meta=meta)
    shapes = [array.shape for array in checked.arrays.values()]
    return described(weights.family, shapes, stored, checked.nbytes)


def _streamed(checked: Plan, path: str, bar: Any) -> StreamedArray:
    target = checked.arrays[path]

    def blocks() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for start, values in checked.blocks(path):
            yield start, values
            bar.update(values.nbytes)

    return StreamedArray(target.shape, target.dtype, target.chunk, blocks)


def progress(total: int) -> Any:
    """Returns a progress bar over bytes."""
    return Bar(total=total, unit="B", unit_scale=True, desc="weights")
