"""Writes adapters in the format of Hugging Face's peft, which model/hf/peft.py describes."""

import collections
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from espalier.model.hf import peft_experts
from espalier.model.hf.files.safetensors_files import SafetensorsWriter
from espalier.model.hf.mapping import Piece
from espalier.model.hf.peft import ROOT, TENSOR, WEIGHTS, ReadKernel, is_expert
from espalier.model.hf.peft_config import CONFIG, PeftError
from espalier.model.hf.peft_experts import Parameter

# Of modules in transformers 4 that became a part of the stacked experts. peft takes the names for the experts' in any mixture.
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def write(
    folder: str,
    settings: Mapping[str, Any],
    sites: Mapping[str, Mapping[str, np.ndarray]],
    pieces: Iterable[Piece],
    shapes: Mapping[str, tuple[int, ...]],
    kernel: ReadKernel,
    *,
    encodes: bool,
) -> None:
    """Writes adapters as a directory of peft.

    Args:
      folder: an existing directory.
      settings: settings of the adapter, see `Adapter.settings`.
      sites: the adapter's arrays by path of the projection and name.
      pieces, shapes, kernel: see `peft.read`.
      encodes: whether the model is an encoder-decoder, for which peft has a class of its own.

    Raises:
      PeftError: adapters that peft does not have.
    """
    pieces = list(pieces)
    stacked = peft_experts.parameters(pieces, shapes)
    experts = _of_experts(settings, sites, stacked)
    by_kernel = collections.defaultdict(list)
    names = collections.Counter[str]()
    for piece in pieces:
        by_kernel[piece.native].append(piece)
        if piece.native.endswith("/kernel"):
            names[piece.hf.removesuffix(".weight").rpartition(".")[2]] += 1
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    inputs: list[str] = []
    transposed = True
    apart = {site: own for site, own in sites.items() if site not in _sites(stacked)}
    for site, own in apart.items():
        for piece in by_kernel[f"{site}/kernel"]:
            module = piece.hf.removesuffix(".weight")
            if not piece.whole or is_expert(piece):
                raise PeftError(
                    f"{site}: its projection is a part of {piece.hf}, and peft's adapters are of whole matrices: merge the "
                    "adapters instead, espalier upcycle merge."
                )
            if stacked and module.rpartition(".")[2] in _OF_EXPERTS:
                raise PeftError(
                    f"{site}: in a model with experts, peft takes the name of {module} for the experts' and would not load its "
                    "adapter: merge the adapters instead, espalier upcycle merge, or train some without this projection."
                )
            here = {leaf: value[piece.native_at] for leaf, value in own.items()}
            transposed = transposed and piece.transpose
            if "input_scale" in here:
                inputs.append(module)
            if "lora_a" in here:
                ranks[module], alphas[module] = here["lora_a"].shape[-1], settings["alpha"]
            base_kernel = (
                kernel(piece.native, piece.native_at) if "magnitude_change" in here else None
            )
            for kind, value in _to_peft(here, base_kernel).items():
                tensors[f"{ROOT}{module}.{kind}"] = np.ascontiguousarray(value, np.float32)
    targets = sorted({_module_of(name) for name in tensors})
    for prefix, parameter in peft_experts.names(stacked[name] for name in experts).items():
        written = experts[parameter.name]
        ranks[parameter.name], alphas[parameter.name] = written.rank, written.alpha
        for kind, value in written.tensors.items():
            tensors[f"{ROOT}{prefix}.{kind}"] = np.ascontiguousarray(value, np.float32)
    if not tensors:
        raise PeftError("no adapter belongs to a matrix of the Hugging Face model.")
    config: dict[str, Any] = {
        "base_model_name_or_path": None,  # whoever loads the adapters names their copy of the base
        "inference_mode": True,
        "task_type": "SEQ_2_SEQ_LM" if encodes else "CAUSAL_LM",
        "target_modules": _short(targets, names),
    }
    if ranks:
        rank, rank_pattern = _usual(ranks)
        alpha, alpha_pattern = _usual(alphas)
        config |= {
            "peft_type": "LORA",
            "r": rank,
            "rank_pattern": rank_pattern,
            "lora_alpha": alpha,
            "alpha_pattern": alpha_pattern,
            "use_rslora": settings["rank_stabilised"],
            "use_dora": settings["dora"],
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": not transposed,
        }
    else:
        config |= {"peft_type": "IA3", "feedforward_modules": _short(sorted(inputs), names)}
    if experts:
        config |= {
            "target_parameters": _parameters(experts, stacked),
            "peft_version": peft_experts.WRITTEN_AS,
        }
    path = pathlib.Path(folder)
    (path / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in sorted(tensors.items())}
    with SafetensorsWriter(folder, layout, single=WEIGHTS) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def _sites(stacked: Mapping[str, Parameter]) -> set[str]:
    return {site for parameter in stacked.values() for site, _ in parameter.sites}


def _of_experts(
    settings: Mapping[str, Any],
    sites: Mapping[str, Mapping[str, np.ndarray]],
    stacked: Mapping[str, Parameter],
) -> dict[str, peft_experts.Written]:
    """Returns the adapters of stacked parameters by name."""
    written = {}
    for name, parameter in stacked.items():
        factors = [
            {leaf: values[at] for leaf, values in sites[site].items()} if site in sites else None
            for site, at in parameter.sites
        ]
        for (site, _), own in zip(parameter.sites, factors, strict=True):
            if own is not None and set(own) != {"lora_a", "lora_b"}:
                raise PeftError(
                    f"{site}: its experts are one parameter in the Hugging Face model, of which peft has LoRA alone, and these "
                    f"adapters have {', '.join(sorted(own))}: merge the adapters instead, espalier upcycle merge."
                )
        if any(own is not None for own in factors):
            written[name] = peft_experts.write(
                parameter,
                factors,
                alpha=settings["alpha"],
                stabilised=settings["rank_stabilised"],
            )
    return written


def _parameters(experts: Iterable[str], stacked: Mapping[str, Parameter]) -> list[str]:
    """Returns the end of parameters' names where all layers' with this end are meant, else whole names."""

    def ends(names: Iterable[str]) -> collections.Counter[str]:
        return collections.Counter(".".join(name.split(".")[-3:]) for name in names)

    meant, known = ends(experts), ends(stacked)
    short = [end for end, count in meant.items() if count == known[end]]
    return short + [name for name in experts if not name.endswith(tuple(short))]


def _usual(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the commonest value of modules, and the others by a pattern of the module."""
    usual = collections.Counter(values.values()).most_common(1)[0][0]
    return usual, {re.escape(name): one for name, one in values.items() if one != usual}


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
    match = TENSOR.fullmatch(tensor.removeprefix(ROOT))
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
