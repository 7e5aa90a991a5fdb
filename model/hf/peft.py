"""Reads adapters in the format of Hugging Face's peft: LoRA with its rank-stabilised form and DoRA, and (IA)3.

LoRA of stacked experts: model/hf/peft_experts.py; writing: model/hf/peft_writer.py.

A directory of peft has adapter_config.json and adapter_model.safetensors. Its tensors are named after the modules of the
transformers model, so that a family's table of tensors (model/hf/family.py) says which projection each belongs to.

Shapes: L stacked layers, X in, Y out, R rank.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.model.adapters.adapter import PREFIX
from espalier.model.hf import mapping, peft_config, peft_experts
from espalier.model.hf.files.safetensors_files import SafetensorsReader
from espalier.model.hf.mapping import Piece
from espalier.model.hf.peft_config import CONFIG, PeftConfig, PeftError
from espalier.model.hf.plan import FLOATS
from espalier.model.transforms import base

WEIGHTS = "adapter_model.safetensors"
ROOT = "base_model.model."
TENSOR = re.compile(
    r"(?P<module>.*)\.(?P<kind>lora_A|lora_B|lora_magnitude_vector|ia3_l)(\.default)?(\.weight)?"
)


# (path of a kernel, its leading indices) -> the kernel [X, Y].
ReadKernel = Callable[[str, tuple[int, ...]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Imported:
    """Adapters in this project's form.

    Attributes:
      method: 'lora', 'dora' or 'ia3': the gin file in t5x_configs/methods/adapters/.
      settings: macros of that file.
      arrays: parameters by path.
    """

    method: str
    settings: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]


def read(
    folder: str, pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]], kernel: ReadKernel
) -> Imported:
    """Returns the adapters in a directory of peft.

    Args:
      folder: the directory.
      pieces: the tensors of the base model, see `Family.pieces`.
      shapes: shapes of the base model's arrays by path.
      kernel: reads kernels of the base model, of which DoRA needs the norms.

    Raises:
      PeftError: another kind of adapter, a setting that has no counterpart, tensors that do not fit the settings or the base
        model, or values that are not finite.
      CheckpointFileError: damaged files, or only pickled weights.
    """
    config = peft_config.read(folder)
    by_module = collections.defaultdict(list)
    # Where the experts of the adapter are not stacked, each is a module, as in transformers 4.
    apart = config.kind == "LORA" and not config.dora and not config.parameters
    pieces = list(pieces)
    for piece in pieces:
        if piece.native.endswith("/kernel") and (apart or not is_expert(piece)):
            by_module[piece.hf.removesuffix(".weight")].append(piece)
    stacked = peft_experts.targeted(config, peft_experts.parameters(pieces, shapes), folder)
    modules = _modules(folder, {**by_module, **stacked})
    sites: dict[str, dict[tuple[int, ...], dict[str, np.ndarray]]] = collections.defaultdict(dict)
    for module, parameter in stacked.items():
        where = f"{folder}/{WEIGHTS}: {module}, the adapter of {parameter.name},"
        read = peft_experts.read(where, parameter, modules.pop(module, {}), config)
        for (site, at), own in read.items():
            scale = config.scale(parameter.name, own["lora_a"].shape[-1])
            sites[site][at] = {**own, "scale": np.asarray(scale)}
    for module, tensors in modules.items():
        _check(f"{folder}/{WEIGHTS}: {module}", module, tensors, by_module[module], shapes, config)
        for piece in by_module[module]:
            own = _of_piece(piece, tensors)
            if config.kind == "LORA":
                rank = own["lora_a"].shape[-1]
                own["scale"] = np.asarray(config.scale(module, rank))
            if "magnitude" in own:
                norms = np.linalg.norm(kernel(piece.native, piece.native_at), axis=0)
                own["magnitude_change"] = own.pop("magnitude") - norms
            sites[piece.native.removesuffix("/kernel")][piece.native_at] = own
    slot = "lora" if config.kind == "LORA" else "ia3"
    arrays = {}
    for site, layers in sites.items():
        stacks = _layers(layers, shapes[f"{site}/kernel"])
        if config.kind == "LORA":
            _rescale(stacks, config)
        for leaf, values in stacks.items():
            arrays[f"{site}/{PREFIX}{slot}/{leaf}"] = values
    if config.kind == "IA3":
        return Imported("ia3", _ia3_settings(arrays), arrays)
    return Imported("dora" if config.dora else "lora", _lora_settings(config, arrays), arrays)


def _modules(folder: str, known: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the tensors of each module by kind, float32."""
    modules: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    with SafetensorsReader(folder, single=WEIGHTS) as reader:
        for name, info in reader.tensors.items():
            match = TENSOR.fullmatch(name.removeprefix(ROOT))
            if match is None or match["module"] not in known:
                raise PeftError(
                    f"{folder}/{WEIGHTS}: {name[:200]} belongs to no projection of the base model: give the model that these "
                    "adapters were trained with, --base=RUN. Adapters of embeddings and heads are not supported, nor of stacked "
                    f"experts that target_parameters in {CONFIG} does not name."
                )
            if match["kind"] in modules[match["module"]]:
                raise PeftError(
                    f"{folder}/{WEIGHTS} has {match['kind']} of {match['module']} twice, with and without '.default' or "
                    "'.weight' in the name: remove one of them."
                )
            if info.dtype.name not in FLOATS:
                raise PeftError(
                    f"{folder}/{WEIGHTS}: {name} is {info}, but adapters must be of floats: save them again with peft."
                )
            values = reader.read(name).astype(np.float32)
            if problem := base.not_finite(values):
                raise PeftError(
                    f"{folder}/{WEIGHTS}: {name} has {problem}: use another checkpoint."
                )
            modules[match["module"]][match["kind"]] = values
    if not modules:
        raise PeftError(f"{folder}/{WEIGHTS} has no adapters.")
    return modules


def _check(
    where: str,
    module: str,
    tensors: Mapping[str, np.ndarray],
    pieces: Sequence[Piece],
    shapes: Mapping[str, tuple[int, ...]],
    config: PeftConfig,
) -> None:
    """Raises PeftError unless a module has the tensors of its kind of adapter, with the shapes of its matrix and rank."""
    [matrix] = mapping.hf_shapes(pieces, shapes).values()
    rows, columns = matrix if pieces[0].transpose else matrix[::-1]  # out, in
    rank = config.rank_of(module)
    wanted: dict[str, tuple[tuple[int, ...], ...]] = {"ia3_l": ((rows, 1), (1, columns))}
    if config.kind == "LORA":
        wanted = {"lora_A": ((rank, columns),), "lora_B": ((rows, rank),)}
        if config.dora:
            wanted["lora_magnitude_vector"] = ((rows,), (rows, 1), (1, rows))
    for kind in [*wanted, *tensors]:
        if kind not in tensors:
            raise PeftError(f"{where} has no {kind}: save the adapter again with peft.")
        if kind not in wanted:
            name = "DoRA" if config.dora else config.kind
            raise PeftError(
                f"{where} has {kind}, and {CONFIG} describes {name} without it: correct that."
            )
        if tensors[kind].shape not in wanted[kind]:
            shown = " or ".join(str(list(shape)) for shape in wanted[kind])
            rule = f" (r = {rank})" if config.kind == "LORA" else ""
            raise PeftError(
                f"{where}.{kind} is {list(tensors[kind].shape)}, and {shown} by {CONFIG}{rule} and the base model: correct "
                "the configuration, or give the base that the adapter was trained with."
            )


def _of_piece(piece: Piece, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the adapter's arrays of one projection, which may be a part of a module's columns."""
    own = {}
    for kind, value in tensors.items():
        if kind == "ia3_l":
            of_input = value.shape[0] == 1 and value.shape[1] > 1
            own["input_scale" if of_input else "output_scale"] = (
                value[0] if of_input else value[piece.outputs(len(value)), 0]
            )
        elif kind == "lora_A":
            own["lora_a"] = value.T
        elif kind == "lora_B":
            own["lora_b"] = value[piece.outputs(len(value))].T
        else:
            own["magnitude"] = value.reshape(-1)[piece.outputs(value.size)]
    return own


def _rescale(own: dict[str, np.ndarray], config: PeftConfig) -> None:
    """Multiplies B by the quotient of both factors of A B, where they differ: this project has one alpha for all modules."""
    quotient = own.pop("scale") / config.scale(None, own["lora_a"].shape[-1])
    if np.any(quotient != 1):
        quotient = quotient.reshape(quotient.shape + (1,) * (own["lora_b"].ndim - quotient.ndim))
        own["lora_b"] = (own["lora_b"] * quotient).astype(np.float32)


def _layers(
    layers: Mapping[tuple[int, ...], Mapping[str, np.ndarray]], kernel: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Returns the arrays of a projection, stacked like its kernel.

    Layers and experts without an adapter get one without effect. Lower ranks are filled up with zeros.
    """
    if set(layers) == {()}:
        return dict(layers[()])
    leaves = next(iter(layers.values())).keys()
    rank = max((own["lora_a"].shape[-1] for own in layers.values() if "lora_a" in own), default=0)
    lead = kernel[: len(next(iter(layers)))]
    stacks = {}
    for leaf in leaves:
        like = next(iter(layers.values()))[leaf]
        neutral = np.ones_like if leaf.endswith("_scale") else np.zeros_like
        values = [layers[at][leaf] if at in layers else neutral(like) for at in np.ndindex(lead)]
        values = [_widened(leaf, value, rank) for value in values]
        stacks[leaf] = np.stack(values).reshape(*lead, *values[0].shape)
    return stacks


def is_expert(piece: Piece) -> bool:
    return ".experts." in piece.hf


def _widened(leaf: str, value: np.ndarray, rank: int) -> np.ndarray:
    if leaf not in ("lora_a", "lora_b"):
        return value
    axis = -1 if leaf == "lora_a" else -2
    more = [(0, 0)] * value.ndim
    more[axis] = (0, rank - value.shape[axis])
    return np.pad(value, more)


def _ia3_settings(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for macro, leaf in (("IA3_OUTPUTS", "output_scale"), ("IA3_INPUTS", "input_scale")):
        names = [name for name in arrays if name.endswith(f"/{leaf}")]
        settings[macro] = [re.escape(_site(name)) for name in names]
    return settings


def _lora_settings(config: PeftConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    ranks = {_site(x): a.shape[-1] for x, a in arrays.items() if x.endswith("/lora_a")}
    others = [(re.escape(site), rank) for site, rank in ranks.items() if rank != config.rank]
    return {
        "LORA_RANK": config.rank,
        "LORA_RANKS": others,
        "LORA_ALPHA": float(config.alpha),
        "RANK_STABILISED": config.stabilised,
        "LORA_DROPOUT": float(config.dropout),
        "LORA_LAYERS": [re.escape(site) for site in ranks],
    }


def _site(path: str) -> str:
    return path.partition(f"/{PREFIX}")[0]
