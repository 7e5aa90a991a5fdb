"""Adapters in the format of Hugging Face's peft: LoRA with its rank-stabilised form and DoRA, and (IA)3.

A directory of peft has adapter_config.json and adapter_model.safetensors. Its tensors are named after the modules of the
transformers model, so that a family's table of tensors (model/hf/family.py) says which projection each belongs to.

Shapes: L stacked layers, X in, Y out, R rank.
"""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.model.adapters.adapter import PREFIX
from espalier.model.hf import mapping, peft_config
from espalier.model.hf.files.safetensors_files import SafetensorsReader, SafetensorsWriter
from espalier.model.hf.mapping import Piece
from espalier.model.hf.peft_config import CONFIG, PeftConfig, PeftError
from espalier.model.hf.plan import FLOATS
from espalier.model.transforms import base

WEIGHTS = "adapter_model.safetensors"
_ROOT = "base_model.model."
_TENSOR = re.compile(
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
      WeightFileError: damaged files, or only pickled weights.
    """
    config = peft_config.read(folder)
    by_module = collections.defaultdict(list)
    for piece in pieces:
        if piece.native.endswith("/kernel") and not _is_expert(piece):
            by_module[piece.hf.removesuffix(".weight")].append(piece)
    modules = _modules(folder, by_module)
    sites: dict[str, dict[tuple[int, ...], dict[str, np.ndarray]]] = collections.defaultdict(dict)
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
        stacks = _stacked(layers, shapes[f"{site}/kernel"])
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
            match = _TENSOR.fullmatch(name.removeprefix(_ROOT))
            if match is None or match["module"] not in known:
                raise PeftError(
                    f"{folder}/{WEIGHTS}: {name[:200]} belongs to no projection of the base model: give the model that these "
                    "adapters were trained with, --base=RUN. Adapters of embeddings and heads are not supported."
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
    columns = slice(*piece.hf_columns) if piece.hf_columns else slice(None)
    own = {}
    for kind, value in tensors.items():
        if kind == "ia3_l":
            of_input = value.shape[0] == 1 and value.shape[1] > 1
            own["input_scale" if of_input else "output_scale"] = (
                value[0] if of_input else value[columns, 0]
            )
        elif kind == "lora_A":
            own["lora_a"] = value.T
        elif kind == "lora_B":
            own["lora_b"] = value[columns].T
        else:
            own["magnitude"] = value.reshape(-1)[columns]
    return own


def _rescale(own: dict[str, np.ndarray], config: PeftConfig) -> None:
    """Multiplies B by the quotient of both factors of A B, where they differ: this project has one alpha for all modules."""
    quotient = own.pop("scale") / config.scale(None, own["lora_a"].shape[-1])
    if np.any(quotient != 1):
        own["lora_b"] = (own["lora_b"] * quotient[..., None, None]).astype(np.float32)


def _stacked(
    layers: Mapping[tuple[int, ...], Mapping[str, np.ndarray]], kernel: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Returns the arrays of a projection, stacked like its kernel.

    Layers without an adapter get one without effect. Lower ranks are filled up with zeros.
    """
    if set(layers) == {()}:
        return dict(layers[()])
    leaves = next(iter(layers.values())).keys()
    rank = max((own["lora_a"].shape[-1] for own in layers.values() if "lora_a" in own), default=0)
    places = [(i,) for i in range(kernel[0])]
    stacks = {}
    for leaf in leaves:
        like = next(iter(layers.values()))[leaf]
        neutral = np.ones_like if leaf.endswith("_scale") else np.zeros_like
        values = [layers[place][leaf] if place in layers else neutral(like) for place in places]
        stacks[leaf] = np.stack([_widened(leaf, value, rank) for value in values])
    return stacks


def _is_expert(piece: Piece) -> bool:
    return ".experts." in piece.hf


def _widened(leaf: str, value: np.ndarray, rank: int) -> np.ndarray:
    if leaf not in ("lora_a", "lora_b"):
        return value
    more = rank - value.shape[-1 if leaf == "lora_a" else 0]
    return np.pad(value, [(0, 0), (0, more)] if leaf == "lora_a" else [(0, more), (0, 0)])


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


def write(
    folder: str,
    settings: Mapping[str, Any],
    sites: Mapping[str, Mapping[str, np.ndarray]],
    pieces: Iterable[Piece],
    kernel: ReadKernel,
    *,
    encodes: bool,
) -> None:
    """Writes adapters as a directory of peft.

    Args:
      folder: an existing directory.
      settings: settings of the adapter, see `Adapter.settings`.
      sites: the adapter's arrays by path of the projection and name.
      pieces, kernel: see `read`.
      encodes: whether the model is an encoder-decoder, for which peft has a class of its own.

    Raises:
      PeftError: adapters that peft does not have.
    """
    by_kernel = collections.defaultdict(list)
    names = collections.Counter[str]()
    for piece in pieces:
        by_kernel[piece.native].append(piece)
        if piece.native.endswith("/kernel"):
            names[piece.hf.removesuffix(".weight").rpartition(".")[2]] += 1
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    inputs: list[str] = []
    for site, own in sites.items():
        for piece in by_kernel[f"{site}/kernel"]:
            module = piece.hf.removesuffix(".weight")
            if piece.hf_columns is not None or _is_expert(piece):
                raise PeftError(
                    f"{site}: its projection is a part of {piece.hf}, and peft's adapters are of whole matrices: merge the "
                    "adapters instead, espalier upcycle merge."
                )
            here = {leaf: value[piece.native_at] for leaf, value in own.items()}
            if "input_scale" in here:
                inputs.append(module)
            if "lora_a" in here:
                ranks[module] = here["lora_a"].shape[-1]
            base_kernel = (
                kernel(piece.native, piece.native_at) if "magnitude_change" in here else None
            )
            for kind, value in _to_peft(here, base_kernel).items():
                tensors[f"{_ROOT}{module}.{kind}"] = np.ascontiguousarray(value, np.float32)
    if not tensors:
        raise PeftError("no adapter belongs to a matrix of the Hugging Face model.")
    targets = sorted({_module_of(name) for name in tensors})
    config: dict[str, Any] = {
        "base_model_name_or_path": None,  # whoever loads the adapters names their copy of the base
        "inference_mode": True,
        "task_type": "SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM",
        "target_modules": _short(targets, names),
    }
    if ranks:
        usual = collections.Counter(ranks.values()).most_common(1)[0][0]
        others = {module: rank for module, rank in ranks.items() if rank != usual}
        config |= {
            "peft_type": "LORA",
            "r": usual,
            "rank_pattern": {re.escape(module): rank for module, rank in others.items()},
            "lora_alpha": settings["alpha"],
            "alpha_pattern": {},
            "use_rslora": settings["rank_stabilised"],
            "use_dora": settings["dora"],
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": not all(
                p.transpose for p in by_kernel[f"{next(iter(sites))}/kernel"]
            ),
        }
    else:
        config |= {"peft_type": "IA3", "feedforward_modules": _short(sorted(inputs), names)}
    path = pathlib.Path(folder)
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in sorted(tensors.items())}
    with SafetensorsWriter(folder, layout, single=WEIGHTS) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _to_peft(own: Mapping[str, np.ndarray], kernel: np.ndarray | None) -> dict[str, np.ndarray]:
    """Returns the tensors of one projection by the end of their names."""
    if "lora_a" not in own:
        (leaf, scale) = next(iter(own.items()))
        return {"ia3_l": scale[None] if leaf == "input_scale" else scale[:, None]}
    tensors = {"lora_A.weight": own["lora_a"].T, "lora_B.weight": own["lora_b"].T}
    if kernel is not None:
        tensors["lora_magnitude_vector"] = np.linalg.norm(kernel, axis=0) + own["magnitude_change"]
    return tensors


def _module_of(tensor: str) -> str:
    match = _TENSOR.fullmatch(tensor.removeprefix(_ROOT))
    assert match is not None
    return match["module"]


def _short(modules: list[str], all_of_them: Mapping[str, int]) -> list[str]:
    """Returns the last parts of modules' names where all modules with this part are meant, else whole names."""
    counts = collections.Counter(module.rpartition(".")[2] for module in modules)
    short = {name for name, count in counts.items() if count == all_of_them[name]}
    last = (module.rpartition(".")[2] for module in modules)
    return sorted(
        {name if name in short else module for module, name in zip(modules, last, strict=True)}
    )
