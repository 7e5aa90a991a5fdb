"""Weights of other projects as runs of this one, and runs as checkpoints of Hugging Face's transformers."""

import json
import math
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import files, stages
from espalier.common.bars import Bar
from espalier.data.tokenizers import gguf_tokenizer, hf_tokenizer
from espalier.launch.convert import model_card
from espalier.launch.load import hf_checkpoint
from espalier.launch.run import run_vocabulary
from espalier.launch.weights import source_models
from espalier.launch.weights.target_folder import ConvertError, check_space, new_directory
from espalier.model.adapters.adapter import adapters_of
from espalier.model.hf import peft_config
from espalier.model.hf.config_fields import named
from espalier.model.hf.description import describe, differences
from espalier.model.hf.family import Family, UnsupportedModel
from espalier.model.hf.files.gguf_file import GgufReader
from espalier.model.hf.files.safetensors_files import (
    SafetensorsReader,
    SafetensorsWriter,
    read_json,
)
from espalier.model.hf.folded_routers import FoldedRouter, folded
from espalier.model.hf.mapping import Piece
from espalier.model.hf.plan import FLOATS, Plan, copy_cast, narrow_names
from espalier.model.hf.registry import family_named, family_of_config, family_of_model
from espalier.model.protocol import LanguageModel, inference_model, inference_root
from espalier.trainers.checkpoints import array_files, manifest, step_dir, stream_checkpoint
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError, Manifest
from espalier.trainers.checkpoints.stream_checkpoint import StreamedArray

_BLOCK_BYTES = 1 << 24
# Fields of config.json that do not depend on the architecture; the export of a changed model copies them.
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_COPIED = (*_TOKEN_IDS, "max_position_embeddings", "initializer_range", "use_cache")


def import_hf(source: str, target: str, *, dtype: str | None = None) -> str:
    """Writes a new run directory `target` with the weights of a Hugging Face checkpoint, stored as `dtype` if not None.

    Returns:
      A description of the weights, see `described`.

    Raises:
      ConvertError, CheckpointFileError, UnsupportedConfig, MismatchedTensors, UnsuitableDtypeError,
      CheckpointSaveError.
    """
    folder = pathlib.Path(source)
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    record = {"generation_config": read_json(generation)} if generation.exists() else {}
    with named(folder):
        family_of_config(config).model(config)  # Raises before files are opened.
    if (folder / peft_config.CONFIG).exists():
        print(
            f"note: {folder} has {peft_config.CONFIG}, of an adapter that is not part of the imported weights: import it with "
            "--from_peft.",
            file=sys.stderr,
        )
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
    return f"{family}, {sum(map(math.prod, shapes)):,} parameters in {dtype}, {stages.size(nbytes)}"


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


def export_hf(
    checkpoint: str,
    model: Any,
    target: str,
    *,
    params: str = "auto",
    family: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
) -> str:
    """Writes config.json, generation_config.json, safetensors and a model card of a run's newest undamaged step.

    Args:
      checkpoint: step or run directory.
      model: the linen module of the checkpoint; its part for inference is written.
      target: directory, which must not exist.
      params: see launch/load/load_run.py.
      family: name of a family in model/hf/families/; None for the family it was imported from, or else the first
        family that can express the model.
      dtype: dtype of all tensors; None for the dtypes of the run.
      shard_bytes: maximum bytes of tensors in one file.

    Returns:
      A description of the weights, see `described`.

    Raises:
      ConvertError, UnsupportedModel, UnsuitableDtypeError, DamagedCheckpointError.
    """
    if not isinstance(model, LanguageModel):
        raise ConvertError(f"{checkpoint} is a {type(model).__name__}, not a language model.")
    if adapters_of(model) is not None:
        raise ConvertError(
            f"{checkpoint} has adapters, which a Hugging Face checkpoint of the whole model cannot hold: merge them first, "
            "espalier upcycle merge, or write them alone with --to_peft."
        )

    def read(step: Any) -> str:
        _, recorded = source_models.checked(step)
        record = step_dir.read_record(step, recorded)
        with new_directory(target) as partial:
            return _export(
                step, recorded, record, model, partial, params, family, dtype, shard_bytes
            )

    return step_dir.newest_good(checkpoint, read)


def _export(
    step: Any,
    recorded: Manifest,
    record: Mapping[str, Any],
    model: Any,
    folder: str,
    params: str,
    name: str | None,
    dtype: str | None,
    shard_bytes: int,
) -> str:
    """Writes one step; `record` has its facts."""
    source = record["meta"].get("hf", {})  # the record of the import
    root, saved = recorded.params(params)
    if params == "ema" and not saved:
        raise ConvertError(f"checkpoint {step} has no moving average: use --params=raw.")
    root, (model, routers) = root + inference_root(model), folded(inference_model(model))
    family = _family(model, name, source.get("family"))
    pieces = family.pieces(model)
    read = {x.native: _read_for(x.native, routers) for x in pieces}
    arrays = {path: recorded.arrays.get(root + path) for paths in read.values() for path in paths}
    if missing := sorted(path for path, entry in arrays.items() if entry is None):
        raise ConvertError(
            f"checkpoint {step} has no {root}{missing[0]}, which the model of its configuration has: give "
            "the configuration of its training, --gin_file=FILE."
        )
    shapes = family.shapes(model)
    imported = source.get("dtypes", {})
    dtypes = {
        x.hf: FLOATS[dtype or imported.get(x.hf) or _narrowest(arrays[y] for y in read[x.native])]
        for x in pieces
    }
    sizes = {hf: math.prod(shapes[hf]) * dtypes[hf].itemsize for hf in shapes}
    check_space(folder, sum(sizes.values()))
    main = max(
        set(dtypes.values()), key=lambda x: sum(sizes[hf] for hf in shapes if dtypes[hf] == x)
    )
    if missing := run_vocabulary.export_files(step_dir.files_of_run(step), folder):
        print(f"note: {missing}.", file=sys.stderr)
    for kind in sorted({type(one.router).__name__ for one in routers.values()}):
        print(
            f"note: each {kind} is written as the matrix that it amounts to; only the run has what it is made of.",
            file=sys.stderr,
        )
    config = {**_config(family, model, source), "torch_dtype": main.name, "dtype": main.name}
    generation = _generation(folder, config, source)
    # A run that was not imported has these ids only in its tokenizer's files.
    config = {**{key: generation[key] for key in _TOKEN_IDS if key in generation}, **config}
    if not (model.row.encodes or {"max_position_embeddings", "n_positions"} & config.keys()):
        print(
            "note: config.json has no max_position_embeddings, and other programs then cut texts at a length of their own, "
            "such as 2,048: add the length of the rows of the training.",
            file=sys.stderr,
        )
    for name, content in (("config.json", config), (hf_tokenizer.GENERATION, generation)):
        # Not synced: an export that a power cut stops is repeated.
        style = {"indent": 2, "sort_keys": True, "ensure_ascii": True}
        files.write_json(pathlib.Path(folder, name), content, synced=False, end="\n", **style)
    tensors = {hf: (dtypes[hf], shapes[hf]) for hf in shapes}
    with (
        SafetensorsWriter(folder, tensors, shard_bytes=shard_bytes) as writer,
        progress(sum(sizes.values())) as bar,
    ):
        for group in _groups(pieces):
            _write_group(step, recorded, root, group, routers, writer, bar)
    weights = described(family.name, shapes.values(), main.name, sum(sizes.values()))
    model_card.write(
        folder,
        step_dir.files_of_run(step),
        record,
        weights=weights,
        architecture=family.architecture,
        average=root.startswith("ema"),
    )
    return weights


def _read_for(native: str, routers: Mapping[str, FoldedRouter]) -> list[str]:
    """Returns the paths of the stored arrays that an array is read or computed from."""
    return [*routers[native].inputs.values()] if native in routers else [native]


def _narrowest(entries: Iterable[Any]) -> str:
    return min((entry.dtype for entry in entries), key=lambda name: FLOATS[name].itemsize)


def _family(model: Any, name: str | None, imported: str | None) -> Family:
    if name is None and imported is None:
        return family_of_model(model)
    family = family_named(name or imported)
    try:
        family.config(model)
    except UnsupportedModel:
        if name is not None:
            raise
        return family_of_model(model)  # The model was changed after the import.
    return family


def _config(family: Family, model: Any, source: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config.json of the import if it still describes the model, else a new one."""
    original = source.get("config", {})
    if source.get("family") == family.name and not differences(
        describe(model), describe(family.model(original))
    ):
        return dict(original)
    return {**{key: original[key] for key in _COPIED if key in original}, **family.config(model)}


def _generation(
    folder: str, config: Mapping[str, Any], source: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns generation_config.json: the one of the import, else the one of the tokenizer's files."""
    if original := source.get("generation_config"):
        return original
    keys = (*_TOKEN_IDS, "decoder_start_token_id")
    token_ids = {key: config[key] for key in keys if config.get(key) is not None}
    path = pathlib.Path(folder, hf_tokenizer.GENERATION)
    return {**token_ids, **(json.loads(path.read_bytes()) if path.exists() else {})}


def _groups(pieces: list[Piece]) -> list[list[Piece]]:
    """Groups pieces by native array; arrays that share tensors (GPT-2's query, key and value) are in one group."""
    leader: dict[str, str] = {}
    owner: dict[str, str] = {}
    for piece in pieces:
        leader.setdefault(piece.native, owner.get(piece.hf, piece.native))
        owner.setdefault(piece.hf, leader[piece.native])
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(leader[piece.native], []).append(piece)
    return list(groups.values())


def _write_group(
    step: Any,
    recorded: Manifest,
    root: str,
    pieces: list[Piece],
    routers: Mapping[str, FoldedRouter],
    writer: SafetensorsWriter,
    bar: Any,
) -> None:
    """Writes the tensors of one group of arrays, and checks the arrays that are read against their digests."""
    stores = {
        x: array_files.StoredArray(step, root + x, recorded.arrays[root + x])
        for native in {p.native for p in pieces}
        for x in _read_for(native, routers)
    }
    digests = dict.fromkeys(stores, 0)
    by_tensor: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_tensor.setdefault(piece.hf, []).append(piece)

    def read(path: str, at: tuple[int, ...], rows: tuple[int, int] | None) -> np.ndarray:
        values = stores[path].read(at, rows)
        start = [*at, *(0 for _ in values.shape)]
        if rows:
            start[len(at)] += rows[0]
        digests[path] += manifest.block_digest(values.reshape((1,) * len(at) + values.shape), start)
        return values

    def region(piece: Piece, rows: tuple[int, int] | None = None) -> np.ndarray:
        if (router := routers.get(piece.native)) is None:
            return read(piece.native, piece.native_at, rows)
        return router.kernel({x: read(y, piece.native_at, None) for x, y in router.inputs.items()})

    for hf, parts in by_tensor.items():
        info = writer.tensors[hf]
        first = parts[0]
        stored = first.native in stores
        if stored and len(parts) == 1 and not first.transpose and first.whole and info.shape:
            step_rows = max(1, _BLOCK_BYTES * info.shape[0] // max(1, info.nbytes))
            for low in range(0, info.shape[0], step_rows):
                values = region(first, (low, min(low + step_rows, info.shape[0])))
                part = np.empty(values.shape, info.dtype)
                copy_cast(part, values, hf)
                writer.write(hf, part, low)
        else:
            tensor = np.empty(info.shape, info.dtype)
            for piece in parts:
                for part, values in piece.to_hf(region(piece), tensor):
                    copy_cast(part, values, hf)
            writer.write(hf, tensor)
        bar.update(info.nbytes)
    damaged = [x for x in digests if digests[x] % 2**64 != recorded.arrays[root + x].digest]
    if damaged:
        raise DamagedCheckpointError(step, {}, [root + x for x in sorted(damaged)])
