"""Imports weights of other projects as a run: `config.gin` and a checkpoint that every command reads."""

import dataclasses
import math
import os
import pathlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm

from data.tokenizers import gguf_tokenizer, hf_tokenizer
from launch.config import gin_writer
from launch.run import model_record, run_vocabulary
from launch.run.model_record import CONFIG
from launch.weights.target_folder import check_space, new_directory
from model.hf.families import family_of_config
from model.hf.files.gguf_file import GgufReader
from model.hf.files.safetensors_files import SafetensorsReader, read_json
from model.hf.plan import Plan, narrow_names, plan
from trainers.checkpoints import step_dir, stream_checkpoint
from trainers.checkpoints.stream_checkpoint import StreamedArray


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
    family = family_of_config(config)
    model = family.model(config)
    checked = plan(family, model, tensors, dtype=dtype)
    check_space(folder, checked.nbytes)
    sizes: Counter[str] = Counter()
    for array in checked.arrays.values():
        sizes[array.dtype.name] += array.nbytes
    stored = sizes.most_common(1)[0][0]
    model = model.clone(config=dataclasses.replace(model.config, param_dtype=stored))
    meta = {
        "hf": {
            "family": family.name,
            "config": config,
            "dtypes": {} if dtype else narrow_names(checked),
            **record,
        },
        "start_token": None,  # There is no token before a text except the tokenizer's BOS.
        **_keep_tokenizer(folder, tokenizer),
    }
    text = gin_writer.write(model)
    pathlib.Path(folder, CONFIG).write_text(text, encoding="utf-8")
    model_record.write(folder)
    with progress(checked.nbytes) as bar:
        arrays = {f"params/{path}": _streamed(checked, path, bar) for path in checked.arrays}
        stream_checkpoint.save(os.path.join(folder, step_dir.CHECKPOINTS), arrays, meta=meta)
    shapes = [array.shape for array in checked.arrays.values()]
    return described(family.name, shapes, stored, checked.nbytes)


def _keep_tokenizer(folder: str, source: pathlib.Path) -> dict[str, Any]:
    """Copies a checkpoint's tokenizer to the run; returns the facts about texts for the checkpoint's meta."""
    if not any(
        (source / name).exists() for name in (hf_tokenizer.TOKENIZER, hf_tokenizer.SENTENCEPIECE)
    ):
        print(f"{source} has no tokenizer: the run accepts tokens, not texts.", file=sys.stderr)
        return {}
    digest = run_vocabulary.save_files(folder, source)
    files = getattr(run_vocabulary.load(folder=folder), "files", None)
    if files is not None:
        return {"vocabulary": digest, "add_bos": files.adds_bos}
    # A SentencePiece model alone; transformers begins texts with BOS by default.
    path = source / hf_tokenizer.CONFIG
    settings = read_json(path) if path.exists() else {}
    return {"vocabulary": digest, "add_bos": bool(settings.get("add_bos_token", True))}


def _streamed(checked: Plan, path: str, bar: Any) -> StreamedArray:
    target = checked.arrays[path]

    def blocks() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        for start, values in checked.blocks(path):
            yield start, values
            bar.update(values.nbytes)

    return StreamedArray(target.shape, target.dtype, target.chunk, blocks)


def progress(total: int) -> Any:
    """Returns a progress bar over bytes, shown only on a terminal."""
    return tqdm.tqdm(
        total=total, unit="B", unit_scale=True, desc="weights", disable=not sys.stderr.isatty()
    )
