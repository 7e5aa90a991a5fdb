"""LoRA on stacked experts, as Hugging Face's peft stores it with its setting `target_parameters`.

In transformers 5 the experts of a mixture are two parameters of one module, `experts.gate_up_proj` [E, 2F, D] and
`experts.down_proj` [E, D, F]. An adapter of one has tensors of two dimensions: A [E r, in], whose rows are sorted by
expert and then by rank, and B [out, r E], whose columns are sorted by rank and then by expert. Before peft 0.19.1 the sides were
exchanged: A had the parameter's second dimension, and B its third.

Each adapted parameter wraps the module once, so that the tensors of an inner parameter are named `experts.base_layer.lora_A`, and
those of the outer one `experts.lora_A`. The order is that of the parameters in the module: `down_proj` is outside.

Gate and up are one parameter there and two projections here. One A for both is their common A. Two different ones are joined by
rank, with a B that is zero where one projection does not read the other's rank.

Shapes: E experts, R rank, X in, Y out, F hidden width.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from espalier.model.hf.mapping import Piece
from espalier.model.hf.peft_config import CONFIG, PeftConfig, PeftError

# The parameters in their order in the module, and the projections that each is made of, in the order of its rows.
PARAMETERS = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
_EXPERTS = re.compile(r"(?P<layer>.*\.layers\.\d+)\.[^.]+\.experts\..*")
_SIDES_FIXED = (0, 19, 1)  # the version of peft from which A has the inputs
WRITTEN_AS = "0.21.2"  # the version whose form is written
Site = tuple[
    str, tuple[int, ...]
]  # the path of a projection, and its indices in the stack of layers


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One stacked parameter of a module of experts.

    Attributes:
      name: name in the transformers model, such as 'model.layers.0.mlp.experts.down_proj'.
      sites: the projections that it is made of.
      shape: (E, X, Y), the sizes of all its projections together.
    """

    name: str
    sites: tuple[Site, ...]
    shape: tuple[int, int, int]

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]


def parameters(
    pieces: Iterable[Piece], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Parameter]:
    """Returns the stacked parameters of a model's experts by name; parameters of one module are in its order.

    Weight files may have other names: Mixtral's have a tensor for each expert, below `block_sparse_moe`. In transformers 5 all
    of these families call the module `mlp.experts`.

    Args:
      pieces: see `Family.pieces`.
      shapes: shapes of the model's arrays by path.
    """
    sites: dict[str, dict[str, Site]] = {}
    for piece in pieces:
        path, _, kernel = piece.native.rpartition("/")
        match = _EXPERTS.fullmatch(piece.hf)
        if match and kernel == "kernel":
            at = piece.native_at[: len(shapes[piece.native]) - 3]
            module = f"{match['layer']}.mlp.experts"
            sites.setdefault(module, {})[path.rpartition("/")[2]] = (path, at)
    made = {}
    for module, own in sites.items():
        for parameter, names in PARAMETERS.items():
            parts = tuple(own[name] for name in names)
            experts, rows, columns = shapes[f"{parts[0][0]}/kernel"][-3:]
            name = f"{module}.{parameter}"
            made[name] = Parameter(name, parts, (experts, rows, columns * len(parts)))
    return made


def names(adapted: Iterable[Parameter]) -> dict[str, Parameter]:
    """Returns adapted parameters by the beginnings of their tensors' names; parameters of a module are wrapped in order."""
    modules: dict[str, list[Parameter]] = {}
    for parameter in adapted:
        modules.setdefault(parameter.module, []).append(parameter)
    return {
        module + ".base_layer" * depth: parameter
        for module, own in modules.items()
        for depth, parameter in enumerate(reversed(own))
    }


def targeted(
    config: PeftConfig, known: Mapping[str, Parameter], where: str
) -> dict[str, Parameter]:
    """Returns the parameters that a configuration names, by the beginnings of their tensors' names.

    Raises:
      PeftError: a name that is of no stacked experts.
    """
    for field, value in (("use_dora", config.dora), ("lora_dropout", config.dropout)):
        if config.parameters and value:
            raise PeftError(
                f"{where}/{CONFIG}: {field} = {value} with target_parameters, which peft does not have: correct one of the two."
            )
    for target in config.parameters:
        if not any(_is_named(name, target) for name in known):
            stacked = ", ".join(dict.fromkeys(f"experts.{name}" for name in PARAMETERS))
            raise PeftError(
                f"{where}/{CONFIG}: target_parameters names {target[:200]!r}, which is no stacked parameter of the base model's "
                f"experts: those of {stacked} are read. Adapters of other parameters, such as a router's, are not supported."
            )
    return names(
        one for name, one in known.items() if any(_is_named(name, x) for x in config.parameters)
    )


def _is_named(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def read(
    where: str, parameter: Parameter, tensors: Mapping[str, np.ndarray], config: PeftConfig
) -> dict[Site, dict[str, np.ndarray]]:
    """Returns `lora_a` [E, X, R] and `lora_b` [E, R, Y] of each projection of a parameter.

    Args:
      where: the file and the parameter, for errors.
      parameter: the parameter.
      tensors: its tensors by kind.
      config: settings of the adapter.

    Raises:
      PeftError: a tensor is missing, of another shape, or of two possible meanings.
    """
    experts, rows, columns = parameter.shape
    rank = config.rank_of(parameter.name)
    for kind in ("lora_A", "lora_B"):
        if kind not in tensors:
            raise PeftError(f"{where} has no {kind}: save the adapter again with peft.")
    if more := {*tensors} - {"lora_A", "lora_B"}:
        raise PeftError(f"{where} has {sorted(more)[0]}, which peft has not at stacked experts.")
    a, b = tensors["lora_A"], tensors["lora_B"]
    here = (a.shape, b.shape)
    fixed = ((rank * experts, rows), (columns, rank * experts))
    earlier = ((rank * experts, columns), (rows, rank * experts))
    if here not in (fixed, earlier):
        raise PeftError(
            f"{where} has lora_A {list(a.shape)} and lora_B {list(b.shape)}, and {list(fixed[0])} and {list(fixed[1])} by {CONFIG} "
            f"(r = {rank}) and the base model's {experts} experts: correct the configuration, or give the base that the adapter "
            "was trained with."
        )
    if fixed == earlier and config.version is None:
        raise PeftError(
            f"{where}: the experts' matrices are square, so that its tensors do not say which side is A's: peft exchanged the "
            f"sides in version 0.19.1. Set peft_version in {CONFIG} to the version that trained the adapter."
        )
    square = fixed == earlier
    exchanged = (config.version or ()) < _SIDES_FIXED if square else here == earlier
    if exchanged:
        a_EXR = b.reshape(rows, rank, experts).transpose(2, 0, 1)
        b_ERY = a.reshape(experts, rank, columns)
    else:
        a_EXR = a.reshape(experts, rank, rows).transpose(0, 2, 1)
        b_ERY = b.reshape(columns, rank, experts).transpose(2, 1, 0)
    parts = np.split(b_ERY, len(parameter.sites), axis=-1)
    return {
        site: {"lora_a": a_EXR, "lora_b": part}
        for site, part in zip(parameter.sites, parts, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Written:
    """The adapter of one stacked parameter in peft's form.

    Attributes:
      tensors: by the end of their names.
      rank: R.
      alpha: alpha that gives the factor of A B with this rank.
    """

    tensors: Mapping[str, np.ndarray]
    rank: int
    alpha: float


def write(
    parameter: Parameter,
    factors: Sequence[Mapping[str, np.ndarray] | None],
    *,
    alpha: float,
    stabilised: bool,
) -> Written:
    """Returns the adapter of one parameter that computes the same as the adapters of its projections.

    Args:
      parameter: the parameter.
      factors: `lora_a` and `lora_b` of each projection, or None where it has no adapter.
      alpha: alpha of the projections' adapters.
      stabilised: whether the factor of A B is alpha / sqrt(rank), and not alpha / rank.
    """
    experts, rows, columns = parameter.shape
    width = columns // len(parameter.sites)
    adapted = [own for own in factors if own is not None]
    first = adapted[0]["lora_a"]
    own_rank = first.shape[-1]
    if all(np.array_equal(own["lora_a"], first) for own in adapted):
        a_EXR, zero = first, np.zeros((experts, own_rank, width), np.float32)
        b_ERY = np.concatenate([zero if x is None else x["lora_b"] for x in factors], axis=-1)
    else:
        a_EXR = np.concatenate([own["lora_a"] for own in adapted], axis=-1)
        b_ERY = np.zeros((experts, a_EXR.shape[-1], columns), np.float32)
        stop = 0
        for i, own in enumerate(adapted):
            start, stop = stop, stop + own["lora_a"].shape[-1]
            share = own_rank / (stop - start)  # of one factor for all, that of the first rank
            b = own["lora_b"] * np.float32(share**0.5 if stabilised else share)
            b_ERY[:, start:stop, i * width : (i + 1) * width] = b
    rank = a_EXR.shape[-1]
    share = rank / own_rank
    return Written(
        tensors={
            "lora_A.weight": a_EXR.transpose(0, 2, 1).reshape(experts * rank, rows),
            "lora_B.weight": b_ERY.transpose(2, 1, 0).reshape(columns, rank * experts),
        },
        rank=rank,
        alpha=alpha * (share**0.5 if stabilised else share),
    )
