"""Flags of `launch.upcycle` and its sub-commands, and the checks that need no checkpoint."""

import argparse
import dataclasses
import importlib
import os
from collections.abc import Sequence
from typing import Any, Literal

from launch import cli
from launch.config import setting_flags
from launch.run import load_run
from model.transforms.base import TransformError

Params = Literal["auto", "raw", "ema"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleFlags:
    """Flags of `launch.upcycle`; None where a flag is not given.

    Attributes:
      method: what becomes experts.
      experts: NAME=DIR or DIR of each.
      copies: of each expert (sparse upcycling of one model).
      params: see launch.score.
      to: run directory to be made.
      unrelated: take models whose embeddings have nothing in common.
      top_k: FFNs a token uses (1).
      renormalise: weights of the chosen FFNs sum to 1.
      shared_kv: attention experts share one set of keys and values, the mean.
      attention_top_k: attention experts a token mixes (all).
      average_attention: each attention expert is the mean of all: a control, of parameters without specialisation.
      router_std: standard deviation of linear routers' kernels (0.02).
      router_seed: of routers' draws. A soup, for which sweeps may give it too, draws nothing.
      seed_model: nexus: the run whose FFNs are shared by all tokens.
      domains: nexus: file of embeddings of the experts' data, from launch.prepare embed_domains.
      router: nexus: projection of --domains (default), or for comparison a linear one, or an MLP of the token with as
        many parameters as the projection.
      logit_std: nexus: standard deviation of the first logits of a projection or an MLP (0.1).
      attention_experts: nexus: attentions become experts too, as with bam, behind routers of the same kind.
      expert_scale: multiplies the down-projections of routed experts (arXiv 2410.07524): copies of one FFN behind
        small probabilities then compute about what it computed.
      drop_ratio: share of the hidden units of each routed expert that is redrawn (Drop-Upcycling, arXiv 2502.19261).
      drop_seed: of that draw (0).
    """

    method: Literal["btx", "bam", "nexus", "soup"]
    experts: tuple[str, ...]
    to: str
    copies: int = 1
    params: Params = "auto"
    unrelated: bool = False
    top_k: int | None = None
    renormalise: bool = False
    shared_kv: bool = False
    attention_top_k: int | None = None
    average_attention: bool = False
    router_std: float | None = None
    router_seed: int = 0
    seed_model: str | None = None
    domains: str | None = None
    router: Literal["projection", "linear", "mlp"] | None = None
    logit_std: float | None = None
    attention_experts: bool = False
    expert_scale: float | None = None
    drop_ratio: float | None = None
    drop_seed: int | None = None

    @property
    def router_kind(self) -> Literal["projection", "linear", "mlp"]:
        return (self.router or "projection") if self.method == "nexus" else "linear"

    @property
    def mixes_attention(self) -> bool:
        return self.method == "bam" or self.attention_experts

    @property
    def method_files(self) -> list[str]:
        """Returns the gin files that configure the mixture's layers."""
        folder = "t5x_configs/methods"
        attention = f"{folder}/bam/attention_experts.gin"
        if self.method == "soup":
            return []
        if self.method != "nexus":
            return [f"{folder}/bam/{self.method}.gin"]
        if self.router_kind == "linear":
            linear = f"{folder}/nexus/nexus_linear.gin"
            return [linear, attention] if self.attention_experts else [linear]
        name = "nexus" if self.router_kind == "projection" else "nexus_mlp"
        return [f"{folder}/nexus/{name}{'_bam' if self.attention_experts else ''}.gin"]

    def check(self) -> None:
        """Raises TransformError for flags that would be ignored, or need another flag."""
        nexus, ffn, router = self.method == "nexus", self.method != "soup", self.router_kind
        owners = {
            "--method=nexus": (nexus, ("seed_model", "domains", "router", "attention_experts")),
            "experts, and --method=soup has none": (
                ffn,
                ("top_k", "renormalise", "expert_scale", "drop_ratio"),
            ),
            "attention experts (--method=bam, or nexus with --attention_experts)": (
                self.mixes_attention,
                ("shared_kv", "average_attention", "attention_top_k"),
            ),
            "linear routers": (ffn and router == "linear", ("router_std",)),
            "routers of --method=nexus that are not linear": (router != "linear", ("logit_std",)),
            "--drop_ratio": (self.drop_ratio, ("drop_seed",)),
        }
        for owner, (there, names) in owners.items():
            for name in names:
                value = getattr(self, name)
                if not there and value is not None and value is not False:
                    raise TransformError(f"--{name} is of {owner}: leave it out.")
        if self.copies < 1:
            raise TransformError(f"--copies={self.copies} must be at least 1.")
        if not 0 <= (self.drop_ratio or 0) <= 1:
            raise TransformError(f"--drop_ratio={self.drop_ratio:g} lies between 0 and 1.")
        if self.expert_scale is not None and not self.expert_scale > 0:
            raise TransformError(f"--expert_scale={self.expert_scale:g} must be positive.")
        if nexus:
            self._check_nexus(router)

    def _check_nexus(self, router: str) -> None:
        if not self.seed_model:
            raise TransformError(
                "--method=nexus needs --seed_model=DIR, whose FFNs all tokens share."
            )
        if router == "linear" and self.domains:
            raise TransformError("--router=linear reads no --domains.")
        if router != "linear" and not self.domains:
            raise TransformError(
                f"--router={router} needs --domains=FILE of launch.prepare embed_domains, whose width it has."
            )
        if router == "projection" and self.copies > 1:
            raise TransformError(
                "--copies have one embedding, so that the first would take every token: give runs of several "
                "domains, or --router=linear."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtendFlags:
    """Flags of `launch.upcycle extend`; None where a flag is not given.

    Attributes:
      moe: run or step of a mixture of launch.upcycle.
      add: NAME=DIR of a dense run that began from the same seed.
      remove: an expert of the mixture.
      params: see launch.score.
      to: run directory to be made.
      unrelated: take models whose embeddings have nothing in common.
      domains: with --add: file of embeddings of domains, by the mixture's encoder.
      merge: with --add: weight of the new model in parameters that experts share; 1 / (number of experts + 1) by
        default, which makes a mean of n models one of n + 1; 0 leaves the mixture's.
      router: with --add, of a linear router or an MLP: the new expert's column is drawn (append, the default), or all
        is (reset).
      router_seed: with --add: of the draw (0). Behind a projection, for which sweeps may give it too, nothing is drawn.
    """

    moe: str
    to: str
    add: str | None = None
    remove: str | None = None
    params: Params = "auto"
    unrelated: bool = False
    domains: str | None = None
    merge: float | None = None
    router: Literal["append", "reset"] | None = None
    router_seed: int | None = None

    def check(self) -> None:
        """Raises TransformError for flags that do not go together, or a weight outside [0, 1]."""
        ignored = ("domains", "merge", "router", "router_seed")
        for name in ignored if self.remove else ():
            if getattr(self, name) is not None:
                raise TransformError(f"--{name} is of --add.")
        if self.merge is not None and not 0 <= self.merge <= 1:
            raise TransformError(f"--merge={self.merge:g} lies between 0 and 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoriseFlags:
    """Flags of `launch.upcycle factorise`; None where a flag is not given.

    Attributes:
      checkpoint, params: see launch.score.
      to: run directory to be made.
      recompose: multiply factors; no flag below goes with it.
      rank: a fraction, or with 'absolute' the rank itself.
      rank_rule: rank is a fraction of the smaller side (min_dim, the default), of the parameters (param_ratio), or of
        the squared singular values (energy).
      layers: patterns of whole paths of modules, repeatable (default: attention's and MLPs' projections).
      calibrate: file of JSON lines {"text": "..."}.
      calibrate_length: tokens of a row (512).
    """

    checkpoint: str
    to: str
    params: Params = "auto"
    recompose: bool = False
    rank: float | None = None
    rank_rule: Literal["min_dim", "param_ratio", "absolute", "energy"] | None = None
    layers: tuple[str, ...] = ()
    calibrate: str | None = None
    calibrate_length: int | None = None

    def check(self) -> None:
        """Raises TransformError for flags that do not go together."""
        names = ("rank", "rank_rule", "layers", "calibrate", "calibrate_length")
        named = [name for name in names if getattr(self, name) not in (None, ())]
        if self.recompose and named:
            raise TransformError(f"--recompose takes no --{named[0]}: it multiplies what there is.")
        if not self.recompose and self.rank is None:
            raise TransformError("give --rank, such as --rank=0.5, or --recompose.")
        if self.calibrate_length is not None and not self.calibrate:
            raise TransformError("--calibrate_length is of --calibrate: give both or none.")


def split(expert: str) -> tuple[str | None, str]:
    """Returns name and directory of `NAME=DIR`, or (None, DIR) without a name."""
    name, equals, path = expert.partition("=")
    return (name, path) if equals and name and os.sep not in name else (None, expert)


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `launch.upcycle`."""
    group = parser.add_argument_group("mixture")
    group.add_argument(
        "--experts",
        required=True,
        nargs="+",
        metavar="NAME=DIR",
        help="runs or steps in the order of the experts, with the seed among them but for nexus; DIR alone is "
        "called as the run's directory",
    )
    _add(group, UpcycleFlags, but=("experts",))


def add_extension(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `launch.upcycle extend`."""
    group = parser.add_argument_group("mixture")
    change = group.add_mutually_exclusive_group(required=True)
    setting_flags.add(change, ExtendFlags, names=("add", "remove"))
    _add(group, ExtendFlags, but=("add", "remove"))


def add_factorisation(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `launch.upcycle factorise`."""
    load_run.add_flags(parser)
    group = parser.add_argument_group("factors")
    _add(group, FactoriseFlags, but=("checkpoint", "params", "layers"))
    group.add_argument(
        "--layers",
        action="append",
        metavar="REGEX",
        default=[],
        help="whole paths of modules, repeatable (default: attention's and MLPs' projections)",
    )


def _add(group: Any, target: Any, *, but: Sequence[str]) -> None:
    names = [field.name for field in dataclasses.fields(target) if field.name not in but]
    setting_flags.add(group, target, names=names)


def parsed(flags: argparse.Namespace, target: Any) -> Any:
    """Returns the flags as a checked dataclass of this module.

    Raises:
      TransformError: see the dataclass's `check`.
    """
    values = setting_flags.given(flags, target)
    result = target(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    result.check()
    return result


def main(doc: str, command: str, module: str, add_flags: Any) -> int:
    """Runs `launch.upcycle` or a sub-command: calls a module's `run` with the source's configuration and the flags.

    Args:
      doc: help text.
      command: name of the command, such as "upcycle extend".
      module: the module, imported after the flags are parsed.
      add_flags: a function of this module that adds the flags.

    Returns:
      The exit status.
    """

    def files(flags: argparse.Namespace) -> Sequence[str]:
        """Returns the gin files of the source run: of the first expert, the mixture or the model."""
        first = flags.experts[0] if hasattr(flags, "experts") else getattr(flags, "moe", None)
        checkpoint = flags.checkpoint if first is None else split(first)[1]
        return load_run.files_of(checkpoint, flags.gin_file)

    return cli.main(
        doc,
        entry="launch.run.load_run:RunConfig",
        command=command,
        extra_flags=add_flags,
        run=lambda start: importlib.import_module(module).run(start(), start.flags),
        default_files=files,
        unused={"VOCABULARY": "None"},
    )
