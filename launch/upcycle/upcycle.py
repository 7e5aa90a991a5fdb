"""Makes one mixture of experts of dense models that were trained on from one seed, or of copies of one model.

Examples, of a seed's run and runs that started from it:

  espalier upcycle --method=bam --experts runs/seed runs/code runs/law --to=runs/bam
  espalier upcycle --method=btx --experts runs/seed runs/code runs/law --to=runs/btx --top_k=2
  espalier upcycle --method=nexus --seed_model=runs/seed --experts code=runs/code law=runs/law \\
      --domains=domains.json --to=runs/nexus

With btx (arXiv 2403.07816) FFNs become experts and all else is averaged; with bam (arXiv 2408.08274) attentions do too.
With nexus (arXiv 2408.15901) the seed is not an expert and not averaged: its FFNs are used by every token, and a
projection of embeddings of the experts' data (espalier prepare embed_domains) routes; espalier upcycle extend adds experts later.
With soup all is averaged to a dense model, to compare mixtures with.
The printed table shows for every parameter whether it was copied, averaged or drawn. The result is a run directory
that every command takes as --checkpoint, and training as INITIAL_CHECKPOINT_PATH with the method's file after the dense
run's files: methods/bam/btx.gin, bam.gin, or methods/nexus/nexus.gin (nexus_linear.gin, nexus_mlp.gin, nexus_bam.gin).
Its config.gin is the first expert's with the bindings of that file. Arrays are read and written a layer at a time, and
means of large ones in blocks of rows.
"""

import argparse
import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from espalier.common.ranges import Size
from espalier.launch.load.load_run import RunConfig
from espalier.launch.nexus.upcycling import Nexus
from espalier.launch.upcycle import upcycle_flags
from espalier.launch.upcycle.upcycle_flags import Method, Params
from espalier.model.transforms import base
from espalier.model.transforms.base import TransformError

if TYPE_CHECKING:  # jax is imported with the work
    from espalier.launch.weights.source_models import SourceModel
    from espalier.model.transforms.experts import Mixture

# What a mixture records for experts added later: flags of espalier upcycle, and their values if they are not set.
_RECORDED = {
    **{"expert_scale": 1.0, "drop_ratio": 0.0, "drop_seed": 0},
    **{"router_std": 0.02, "logit_std": 0.1},
}
_FINER = [f"{upcycle_flags.METHOD_FILES}/moe/fine_grained.gin"]  # of --granularity


class Btx(Method):
    """FFNs become experts (arXiv 2403.07816)."""

    files = [f"{upcycle_flags.METHOD_FILES}/bam/btx.gin"]


class Bam(Method):
    """FFNs and attentions become experts (arXiv 2408.08274)."""

    mixes_attention = True
    files = [f"{upcycle_flags.METHOD_FILES}/bam/bam.gin"]


class Soup(Method):
    """All is averaged to a dense model."""

    ffn = False
    files = []

    def settings(self, experts: int) -> dict[str, Any]:
        del experts
        return {}


METHODS: dict[str, type[Method]] = {"btx": Btx, "bam": Bam, "nexus": Nexus, "soup": Soup}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpcycleFlags:
    """Flags of `espalier upcycle`; None if a flag is not set.

    Attributes:
      method: decides which parameters become experts.
      experts: NAME=DIR or DIR of each.
      copies: number of copies of each expert (sparse upcycling of one model).
      params: see espalier score.
      to: new run directory.
      unrelated: accept models whose embeddings are not correlated.
      top_k: number of FFNs that a token uses (1).
      renormalise: make the weights of the chosen FFNs sum to 1.
      shared_kv: attention experts share one set of keys and values, the mean.
      attention_top_k: number of attention experts that a token mixes (all).
      average_attention: make each attention expert the mean of all, as a control without specialisation.
      router_std: standard deviation of linear routers' kernels (0.02).
      router_seed: seed of the routers' first values. A soup, for which sweeps may set it too, has no router.
      seed_model: nexus: the run whose FFNs are shared by all tokens.
      domains: nexus: file of embeddings of the experts' data, from espalier prepare embed_domains.
      router: nexus: projection of --domains (default), or for comparison a linear one, or an MLP of the token with as
        many parameters as the projection.
      logit_std: nexus: standard deviation of the first logits of a projection or an MLP (0.1).
      attention_experts: nexus: attentions become experts too, as with bam, behind routers of the same kind.
      expert_scale: multiplies the down-projections of routed experts (arXiv 2410.07524): copies of one FFN behind
        small probabilities then compute about what it computed.
      granularity: split the FFN of each expert in so many parts, which are experts of their own (arXiv 2410.07524); a token
        uses so many times as many. Equal columns of the router and a factor on the parts let the mixture begin equal to one of
        whole experts, if its weights are a softmax, or are renormalised.
      drop_ratio: share of the hidden units of each routed expert to redraw (Drop-Upcycling, arXiv 2502.19261).
      drop_seed: seed of that draw (0).
    """

    method: Literal["btx", "bam", "nexus", "soup"]
    experts: tuple[str, ...]
    to: str
    copies: Size = 1
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
    granularity: int | None = None
    drop_ratio: float | None = None
    drop_seed: int | None = None

    @property
    def made_by(self) -> Method:
        """The method, with these flags."""
        return METHODS[self.method](self)

    def check(self) -> None:
        """Raises TransformError for flags that would be ignored, or need another flag."""
        method = self.made_by
        uses = {
            **{
                f"--method={name}": (isinstance(method, kind), kind.flags)
                for name, kind in METHODS.items()
            },
            "experts, which --method=soup does not make": (
                method.ffn,
                ("top_k", "renormalise", "expert_scale", "granularity", "drop_ratio"),
            ),
            "attention experts (--method=bam, or nexus with --attention_experts)": (
                method.mixes_attention,
                ("shared_kv", "average_attention", "attention_top_k"),
            ),
            "linear routers": (method.ffn and method.router_kind == "linear", ("router_std",)),
            "routers of --method=nexus that are not linear": (
                method.router_kind != "linear",
                ("logit_std",),
            ),
            "--drop_ratio": (self.drop_ratio, ("drop_seed",)),
        }
        for use, (used, names) in uses.items():
            for name in () if used else names:
                value = getattr(self, name)
                if value is not None and value is not False:
                    raise TransformError(f"--{name} is only for {use}: remove it.")
        if self.granularity is not None and self.granularity < 2:
            raise TransformError(
                f"--granularity={self.granularity} must be at least 2; without it experts are whole."
            )
        if self.granularity and method.router_kind == "projection":
            raise TransformError(
                f"--granularity={self.granularity} splits experts, and the parts of an expert have one embedding, so that a token "
                "would always get all of them: give --router=linear or mlp."
            )
        if not 0 <= (self.drop_ratio or 0) <= 1:
            raise TransformError(f"--drop_ratio={self.drop_ratio:g} must be between 0 and 1.")
        if self.expert_scale is not None and not self.expert_scale > 0:
            raise TransformError(f"--expert_scale={self.expert_scale:g} must be positive.")
        method.check()


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mixture")
    group.add_argument(
        "--experts",
        required=True,
        nargs="+",
        metavar="NAME=DIR",
        help="run or step directories of the experts, in their order, with the seed among them except for nexus; an expert "
        "without NAME is called like its run directory",
    )
    upcycle_flags.add(group, UpcycleFlags, but=("experts",))


def upcycle(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      TransformError, ConvertError, DamagedCheckpointError, EmbeddingsError, FileNotFoundError.
    """
    from espalier.launch.weights import source_models, transformed_run
    from espalier.launch.weights.source_models import SourceModel
    from espalier.model.transforms.experts import Upcycle

    options: UpcycleFlags = upcycle_flags.parsed(flags, UpcycleFlags)
    names, experts = map(list, zip(*_experts(options, flags.gin_file), strict=True))
    sources = experts.copy()
    if options.seed_model:
        sources.append(SourceModel(options.seed_model, options.params, flags.gin_file))
    averaged = len({source.path for source in experts}) > 1
    source_models.check_related(sources, unrelated=options.unrelated, averaged=averaged)
    dense = config.model
    for mlp in (layer.mlp for layer in dense.layer_settings()):
        if not mlp.gated or mlp.experts:
            raise TransformError(
                f"Experts must be gated MLPs, but the dense model has {mlp.kind}: give other --experts."
            )
    method = options.made_by
    made = {
        name: default if (x := getattr(options, name)) is None else x
        for name, default in _RECORDED.items()
    }
    mixture = recorded_mixture(
        made,
        experts=len(names),
        scanned=dense.config.scan_layers,
        ffn=method.ffn,
        attention=method.attention(dense.config.kv_heads),
        router=method.routers(names, made),
        seed=options.router_seed,
    )
    finer = {} if options.granularity is None else {"granularity": options.granularity}
    mixture = dataclasses.replace(mixture, **finer)
    record: dict[str, Any] = {
        "method": options.method,
        "experts": names,
        "sources": [source.path for source in experts],
        **made,
        **finer,
    }
    if options.seed_model:
        record["seed_model"] = options.seed_model
    if options.average_attention:
        record["average_attention"] = True
    record |= method.record(names)
    recipes = transformed_run.write(
        options.to,
        Upcycle(mixture, shared_ffn=bool(options.seed_model)),
        sources,
        config=transformed_run.method_lines(
            [*method.files, *(_FINER if finer else ())],
            method.settings(len(names)) | {name.upper(): value for name, value in finer.items()},
        ),
        gin_files=flags.gin_file,
        whole_config=flags.trust_config,
        meta={"upcycled": record},
    )
    lines = [*expert_lines(record), *base.table(recipes)]
    print("\n".join([*lines, f"written to {options.to}"]))


def recorded_mixture(record: Mapping[str, Any], **settings: Any) -> "Mixture":
    """Returns a mixture with the experts' scale and redrawn units of a mixture's record."""
    from espalier.model.transforms.experts import Mixture

    own = {name: record[name] for name in ("expert_scale", "drop_ratio", "drop_seed")}
    return Mixture(**settings, **own)


def expert_lines(record: dict[str, Any]) -> list[str]:
    """Returns a line for each expert in a mixture's record, in order, with its source."""
    wide = max(map(len, record["experts"]))
    pairs = zip(record["experts"], record["sources"], strict=True)
    return [f"expert {i}  {name.ljust(wide)}  {source}" for i, (name, source) in enumerate(pairs)]


def _experts(options: UpcycleFlags, gin_files: Sequence[str]) -> list[tuple[str, "SourceModel"]]:
    """Returns names and models of the experts."""
    from espalier.launch.weights.source_models import SourceModel

    named: list[tuple[str, SourceModel]] = []
    for entry in options.experts:
        name, path = upcycle_flags.split(entry)
        source = SourceModel(path, options.params, gin_files)
        named.append((name or source.folder.name, source))
    for name, count in collections.Counter(name for name, _ in named).items():
        if count > 1:
            raise TransformError(
                f"{count} experts are named {name}: give different names, as in --experts {name}=DIR "
                "other=DIR; --copies=N repeats a model."
            )
    if options.copies > 1:
        named = [(f"{name}.{i}", source) for name, source in named for i in range(options.copies)]
    if len(named) < 2:
        raise TransformError(
            "At least two experts are needed: give several --experts, or --copies=N."
        )
    return named


if __name__ == "__main__":
    raise SystemExit(
        upcycle_flags.main(__doc__, "upcycle", "espalier.launch.upcycle.upcycle:upcycle", add_flags)
    )
