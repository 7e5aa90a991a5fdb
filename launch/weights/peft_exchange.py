"""Adapters of Hugging Face's peft as runs of adapters alone, and runs' adapters for peft."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from launch.run import load_run
from launch.weights import adapter_run, transformed_run
from launch.weights.source_models import SourceModel
from launch.weights.target_folder import ConvertError, new_directory
from model.adapters.adapter import PREFIX, adapters_of, is_adapter
from model.hf import peft
from model.hf.families import family_named, family_of_model
from model.hf.mapping import Piece, pieces_of
from model.protocol import inference_model


def import_peft(source: str, target: str, base: str) -> str:
    """Writes a new run directory `target` with the adapters of a directory of peft, on the base model of a run.

    Returns:
      A description of the adapters.

    Raises:
      ConvertError, PeftError, WeightFileError, UnsupportedModel, BaseModelError, DamagedCheckpointError,
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
    of_base = adapter_run.find_base(base, run.base_digest)
    assert of_base is not None  # the run itself
    return adapter_run.write(target, text, dict(imported.arrays), of_base, run)


def export_peft(checkpoint: str, model: Any, target: str, *, params: str) -> str:
    """Writes a run's adapters as a directory of peft, and returns a description.

    Args:
      checkpoint: step or run directory.
      model: the linen module of the checkpoint.
      params: see launch/run/load_run.py.

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
        peft.write(folder, settings, sites, pieces, _kernels(run), encodes=model.row.encodes)
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
