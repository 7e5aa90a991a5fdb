"""Writes a run's adapters without their base model: a run directory of a few megabytes, which every command reads.

The record names the base's step and the digest of its parameters, see trainers/checkpoints/base_step.py. Adapters of
Hugging Face's peft become such runs, and runs' adapters those of peft.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.load import load_run
from espalier.launch.weights import transformed_run
from espalier.launch.weights.source_models import SourceModel
from espalier.launch.weights.target_folder import ConvertError, new_directory
from espalier.model.adapters import adapter
from espalier.model.adapters.adapter import PREFIX, adapters_of, is_adapter
from espalier.model.hf import peft, peft_writer
from espalier.model.hf.mapping import Piece, pieces_of
from espalier.model.hf.registry import family_named, family_of_model
from espalier.model.protocol import inference_model
from espalier.trainers.checkpoints import base_step, step_dir
from espalier.trainers.checkpoints.base_step import Part
from espalier.trainers.checkpoints.stream_checkpoint import StreamedArray


def export(checkpoint: str, model: Any, target: str, *, base: str | None, params: str) -> str:
    """Writes a new run directory `target` with the adapters of a run.

    Args:
      checkpoint: step or run directory.
      model: the linen module of the checkpoint.
      base: run or step directory with the base model's parameters; None for the checkpoint that the run started from.
      params: see launch/load/load_run.py.

    Returns:
      A description of the adapters.

    Raises:
      ConvertError: the run has no adapters, or its base is not what it was when the run started.
      BaseModelError, DamagedCheckpointError, FileNotFoundError, TransformError.
    """
    source = SourceModel(checkpoint, params)
    names = [name for name in source.abstract.shapes if is_adapter(name)]
    if adapters_of(model) is None or not names:
        raise ConvertError(f"{checkpoint} has no adapters: --to_adapter is for runs with some.")
    path = base or source.meta.get("initial", {}).get("path")
    if path is None:
        raise ConvertError(
            f"{checkpoint} does not record the checkpoint that it started from: give its base model, --base=DIR."
        )
    of_base = find_base(path, source.base_digest)
    if of_base is None:
        raise ConvertError(
            f"the base model's parameters in {checkpoint} are not those of {path}, so they were trained, cast or changed: "
            "give the base that has them, --base=DIR, or use the run as it is."
        )
    arrays = {name: source.open(name).read() for name in names}
    return write(target, source.config(whole=False), arrays, of_base, source)


def find_base(path: str, digest: str) -> Part | None:
    """Returns the base's parameters in a checkpoint, trained or averaged, with this digest; None without them."""
    step = step_dir.resolve(path)
    for params in ("raw", "ema"):
        part = base_step.base_of(step, params)
        if part.entries and base_step.digest(part.entries) == digest:
            return part
    return None


def write(
    target: str, config: str, arrays: Mapping[str, Any], base: Part, source: SourceModel
) -> str:
    """Writes a run directory that has only adapters, and returns a description of them.

    Args:
      target: run directory, which must not exist.
      config: gin text of the adapted model.
      arrays: the adapters' parameters by path.
      base: the base model's parameters.
      source: the run with the vocabulary and the record of texts.

    Raises:
      ConvertError: `config` describes a model with other adapters.
    """
    record = base_step.named(base)
    with transformed_run.new_run(target, config, source) as (folder, model):
        adapters = adapters_of(model)
        _check(model, arrays)
        assert adapters is not None  # see _check
        file = pathlib.Path(folder, base_step.FILE)
        file.write_text(json.dumps({"path": record["path"]}) + "\n", encoding="utf-8")
        streamed = {name: _whole(array) for name, array in arrays.items()}
        origin = {**source.text_meta(), **source.origin_meta(), base_step.META: record}
        transformed_run.save(folder, streamed, {**origin, **adapter.record(model)})
    count = sum(array.size for array in arrays.values())
    size = sum(array.nbytes for array in arrays.values())
    kinds = ", ".join(settings["class"] for settings in adapters.settings.values())
    return f"{kinds}, {count:,} parameters, {size / 1e6:.1f} MB, of {base.step}"


def _check(model: Any, arrays: Mapping[str, Any]) -> None:
    leaves = transformed_run.abstract_params(model).items()
    wanted = {name: tuple(leaf.shape) for name, leaf in leaves if is_adapter(name)}
    there = {name: tuple(array.shape) for name, array in arrays.items()}
    for name in sorted({*wanted, *there}):
        if wanted.get(name) != there.get(name):
            raise ConvertError(
                f"{name} is {there.get(name, 'missing')}, and {wanted.get(name, 'nothing')} in the base model with these "
                "adapters: give the base that they were trained with."
            )


def _whole(array: Any) -> StreamedArray:
    blocks = [((0,) * array.ndim, array)]
    return StreamedArray(array.shape, array.dtype, array.shape, lambda: iter(blocks))


def import_peft(source: str, target: str, base: str) -> str:
    """Writes a new run directory `target` with the adapters of a directory of peft, on the base model of a run.

    Returns:
      A description of the adapters.

    Raises:
      ConvertError, PeftError, CheckpointFileError, UnsupportedModel, BaseModelError, DamagedCheckpointError,
      FileNotFoundError.
    """
    run = SourceModel(base, "auto")
    if any(map(is_adapter, run.abstract.shapes)):
        raise ConvertError(f"--base={base} has adapters itself: give the run without them.")
    pieces = _pieces(run, load_run.config_of(base).model)
    imported = peft.read(source, pieces, run.abstract.shapes, _kernels(run))
    file = f"t5x_configs/methods/adapters/{imported.method}.gin"
    lines = transformed_run.method_lines([file], imported.settings)
    text = "\n".join([run.config(whole=False), *lines, ""])
    of_base = find_base(base, run.base_digest)
    assert of_base is not None  # the run itself
    return write(target, text, dict(imported.arrays), of_base, run)


def export_peft(checkpoint: str, model: Any, target: str, *, params: str) -> str:
    """Writes a run's adapters as a directory of peft, and returns a description.

    Args:
      checkpoint: step or run directory.
      model: the linen module of the checkpoint.
      params: see launch/load/load_run.py.

    Raises:
      ConvertError: no adapters, or of a kind that peft does not have.
      PeftError, UnsupportedModel, BaseModelError, DamagedCheckpointError, FileNotFoundError, TransformError.
    """
    run = SourceModel(checkpoint, params)
    adapters = adapters_of(model)
    slots = [] if adapters is None else list(adapters.slots)
    if adapters is None or len(slots) != 1:
        raise ConvertError(
            f"{checkpoint} has {' and '.join(slots) or 'no'} adapters, and peft's directories hold those of one kind."
        )
    settings = adapters.settings[slots[0]]
    names = [name for name in run.abstract.shapes if is_adapter(name)]
    if settings["class"] not in ("Lora", "Ia3", "MoLora", "Mov") or any(
        "/router/" in name for name in names
    ):
        raise ConvertError(
            f"{checkpoint} has adapters of class {settings['class']}, which peft does not have: LoRA, DoRA and (IA)3 are "
            "exchanged, and mixtures with one expert."
        )
    sites: dict[str, dict[str, np.ndarray]] = {}
    for name in names:
        site, _, rest = name.partition(f"/{PREFIX}")
        sites.setdefault(site, {})[rest.rpartition("/")[2]] = run.open(name).read()
    with new_directory(target) as folder:
        pieces = _pieces(run, model)
        shapes = run.abstract.shapes
        parts = (pieces, shapes, _kernels(run))
        peft_writer.write(folder, settings, sites, *parts, encodes=model.row.encodes)
    return f"{settings['class']} at {len(sites)} projections"


def _pieces(run: SourceModel, model: Any) -> Sequence[Piece]:
    """Returns the pieces of the base model's arrays."""
    model = inference_model(model)
    name = run.meta.get("hf", {}).get("family")
    family = family_of_model(model) if name is None else family_named(name)
    shapes = {path: shape for path, shape in run.abstract.shapes.items() if not is_adapter(path)}
    try:
        return pieces_of(family.rows, shapes, model.config)
    except KeyError as error:
        raise ConvertError(
            f"a {family.name!r} checkpoint has no tensor for {error}, so that adapters of this model have no form in peft."
        ) from None


def _kernels(run: SourceModel) -> peft.ReadKernel:
    return lambda path, at: run.open(path).read(at).astype(np.float32)
