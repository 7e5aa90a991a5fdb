"""Adds an expert to a mixture of espalier upcycle, or removes one.

Examples, after espalier upcycle made runs/nexus and espalier prepare embed_domains --extend added the domain:

  espalier upcycle extend --moe=runs/nexus --add code=runs/code --domains=domains.json --to=runs/nexus5
  espalier upcycle extend --moe=runs/btx --add code=runs/code --router=reset --to=runs/btx5
  espalier upcycle extend --moe=runs/nexus5 --remove code --to=runs/nexus4

The new model is a branch of the same seed. Its FFN, and its attention where attentions are experts, become the last
expert. Parameters that experts share move towards it by --merge, except the shared FFN and a projection router, which
places the expert by the embedding of its data (arXiv 2408.15901). Scales and redrawn units are as for the other experts.
The result is a run directory like espalier upcycle's: parameters without an optimiser's state. Training from it, with the
files of the mixture's run and EXPERTS one more, begins with a new optimiser.
"""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from espalier.data.nexus import domain_embeddings
from espalier.launch.config import setting_flags
from espalier.launch.load.load_run import RunConfig
from espalier.launch.nexus import upcycling
from espalier.launch.upcycle import upcycle_flags
from espalier.launch.upcycle.upcycle_flags import Params
from espalier.model.transforms import base
from espalier.model.transforms.base import TransformError, TreeTransform
from espalier.model.transforms.experts import LinearRouters, Mixture, Routers

if TYPE_CHECKING:  # flags are parsed before JAX is imported
    from espalier.launch.weights.source_models import SourceModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtendFlags:
    """Flags of `espalier upcycle extend`; None if a flag is not set.

    Attributes:
      moe: run or step of a mixture of espalier upcycle.
      add: NAME=DIR of a dense run that started from the same seed.
      remove: an expert of the mixture.
      params: which parameters are used: raw, their moving average (ema), or the average where there is one (auto).
      to: new run directory.
      unrelated: accept models whose embeddings are not correlated.
      domains: with --add: file of embeddings of domains, by the mixture's encoder.
      merge: with --add: weight of the new model in parameters that experts share; 1 / (number of experts + 1) by
        default, which makes a mean of n models a mean of n + 1; 0 keeps the mixture's parameters.
      router: with --add, of a linear router or an MLP: draw only the new expert's column (append, the default), or
        all of it (reset).
      level: with --add, of a projection: bring the new expert's vectors to the level of the others' (model/nexus/domain_router.py).
      router_seed: with --add: seed of the draw (0). A projection, for which sweeps may set it too, draws nothing.
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
    level: bool = False
    router_seed: int | None = None

    def check(self) -> None:
        """Raises TransformError for flags that do not go together, or a weight outside [0, 1]."""
        ignored = ("domains", "merge", "router", "router_seed")
        for name in ignored if self.remove else ():
            if getattr(self, name) is not None:
                raise TransformError(f"--{name} is only for --add: remove it.")
        if self.remove and self.level:
            raise TransformError("--level is only for --add: remove it.")
        if self.merge is not None and not 0 <= self.merge <= 1:
            raise TransformError(f"--merge={self.merge:g} must be between 0 and 1.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mixture")
    change = group.add_mutually_exclusive_group(required=True)
    setting_flags.add(change, ExtendFlags, names=("add", "remove"))
    upcycle_flags.add(group, ExtendFlags, but=("add", "remove"))


@dataclasses.dataclass(frozen=True)
class _Change:
    """A new mixture: its transform, source models, and record."""

    transform: TreeTransform
    sources: list["SourceModel"]
    record: dict[str, Any]


def extend(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      TransformError, ConvertError, DamagedCheckpointError, EmbeddingsError, FileNotFoundError.
    """
    from espalier.launch.upcycle.upcycle import expert_lines
    from espalier.launch.weights import transformed_run
    from espalier.launch.weights.source_models import SourceModel

    options: ExtendFlags = upcycle_flags.parsed(flags, ExtendFlags)
    moe = SourceModel(options.moe, options.params, flags.gin_file)
    record = moe.meta.get("upcycled")
    if record is None or "sources" not in record:
        raise TransformError(
            f"{options.moe} has no record of the names and sources of its experts, as runs of espalier upcycle have and merges of "
            "mixtures from different sources do not: give another --moe."
        )
    mixture = _mixture(config.model, moe, record)
    levelled = getattr(_first_mixture(config.model).mlp.router, "levelled", None)
    if options.add:
        if levelled and not options.level:
            raise TransformError(
                f"{moe.path} brings all experts after the first {levelled} to their level (LEVELLED), and the new one would be "
                "too: give --level."
            )
        levelled = levelled or (mixture.experts if options.level else None)
        change = _addition(options, options.add, moe, record, mixture)
    else:
        change = _removal(config.model, str(options.remove), moe, record, mixture)
        if levelled and options.remove in record["experts"][:levelled]:
            levelled -= 1
    count = len(change.record["experts"])
    if levelled is not None and levelled >= count:
        levelled = 0  # no levelled expert is left
    elif levelled is not None and levelled < 3:
        raise TransformError(
            f"LEVELLED would be {levelled}, and an expert that is levelled to fewer than 3 experts has the logits of one of them: "
            "keep at least 3 experts before it, or add it without --level."
        )
    recipes = transformed_run.write(
        options.to,
        change.transform,
        change.sources,
        config=[
            f"EXPERTS = {count}",
            *([] if levelled is None else [f"LEVELLED = {levelled or None}"]),
        ],
        gin_files=flags.gin_file,
        whole_config=flags.trust_config,
        meta={"upcycled": change.record},
    )
    lines = [*expert_lines(change.record), *base.table(recipes)]
    last = f"written to {options.to}: parameters without an optimiser's state"
    print("\n".join([*lines, last]))


def _mixture(model: Any, moe: "SourceModel", record: dict[str, Any]) -> Mixture:
    """Returns the settings of a mixture, from its configuration, parameters and record."""
    from espalier.launch.upcycle.upcycle import recorded_mixture
    from espalier.model.bam.moa import AttentionExperts
    from espalier.model.nexus.domain_router import MlpRouters, ProjectionRouters

    first = _first_mixture(model)
    if parts := record.get("granularity"):
        raise TransformError(
            f"{moe.path} has its experts in {parts} parts each (--granularity), and whole experts alone are added or removed: "
            "make a mixture of the other experts with espalier upcycle."
        )
    if record.get("average_attention"):
        raise TransformError(
            f"{moe.path} has the mean of its models as each attention expert (--average_attention), and one more or less would not "
            "be that mean: make a mixture of the other experts with espalier upcycle."
        )
    if first.mlp.experts != len(record["experts"]):
        raise TransformError(
            f"{moe.path} was made of the experts {', '.join(record['experts'])}, but its configuration has "
            f"{first.mlp.experts or 'none'}: give the configuration of its training, --gin_file=FILE."
        )
    shapes = moe.abstract.shapes
    routers = {path.rpartition("/router/")[2] for path in shapes if "/mlp/router/" in path}
    domains = next((path for path in shapes if path.endswith("mlp/router/domains")), None)
    std = record["logit_std"]
    router: Routers = MlpRouters(logit_std=std)
    if domains:
        router = ProjectionRouters(logit_std=std, domains=_vectors(moe, domains))
    elif "kernel" in routers:
        router = LinearRouters(std=record["router_std"])
    attention = AttentionExperts(
        kv_heads=model.config.kv_heads, shared_kv=first.attention.shared_kv
    )
    return recorded_mixture(
        record,
        experts=first.mlp.experts,
        scanned=model.config.scan_layers,
        attention=attention if first.attention.experts else None,
        router=router,
    )


def _first_mixture(model: Any) -> Any:
    """Returns the settings of the first layer with experts; of the first layer without any."""
    layers = model.layer_settings()
    return next((layer for layer in layers if layer.mlp.experts), layers[0])


def _domains(mixture: Mixture) -> np.ndarray | None:
    """Returns the embeddings [E, M] of a mixture's experts; None if its routers have none."""
    from espalier.model.nexus.domain_router import ProjectionRouters

    return mixture.router.domains if isinstance(mixture.router, ProjectionRouters) else None


def _vectors(moe: "SourceModel", path: str) -> np.ndarray:
    """Returns the domain embeddings [E, M], which are equal in all layers."""
    vectors = moe.open(path).read()
    return vectors.reshape(-1, *vectors.shape[-2:])[0]


def _addition(
    options: ExtendFlags, add: str, moe: "SourceModel", record: dict[str, Any], mixture: Mixture
) -> _Change:
    from espalier.launch.weights import source_models
    from espalier.model.nexus.extend import Addition

    name, path = upcycle_flags.split(add)
    new = source_models.SourceModel(path, options.params, moe.gin_files)
    name = name or new.folder.name
    experts = record["experts"]
    if name in experts:
        raise TransformError(
            f"{moe.path} already has an expert {name}: give the new one another name, --add NAME=DIR."
        )
    count = mixture.experts + 1
    merge = 1 / count if options.merge is None else options.merge
    source_models.check_related(
        [moe, new], unrelated=options.unrelated, averaged=0 < merge < 1, mixture=True
    )
    record = {**record, "experts": [*experts, name], "sources": [*record["sources"], new.path]}
    domains, router = _domains(mixture), mixture.router
    if domains is None and options.level:
        raise TransformError(f"The router of {moe.path} is no projection: remove --level.")
    if domains is None and options.domains is not None:
        raise TransformError(f"The router of {moe.path} does not use --domains: remove it.")
    if domains is not None:
        if options.domains is None:
            raise TransformError(
                f"The router of {moe.path} needs the embedding of {name}: give --domains=FILE."
            )
        if options.router == "reset":
            raise TransformError(
                f"--router=reset does not apply to the projection router of {moe.path}: remove it."
            )
        file = domain_embeddings.read(options.domains)
        upcycling.check_same_encoder(file, record["domains"])
        upcycling.check_same_vectors(file, experts, domains)
        domains = np.concatenate([domains, file.vectors([name])])
        router = dataclasses.replace(router, domains=domains)
        record["domains"] = upcycling.domains_record(file, domains)
    larger = dataclasses.replace(
        mixture, experts=count, router=router, seed=options.router_seed or 0
    )
    transform = Addition(larger, merge=merge, router=options.router or "append")
    return _Change(transform, [moe, new], record)


def _removal(
    model: Any, name: str, moe: "SourceModel", record: dict[str, Any], mixture: Mixture
) -> _Change:
    from espalier.model.nexus.extend import Removal

    if name not in record["experts"]:
        raise TransformError(
            f"{moe.path} has no expert {name}: give one of {', '.join(record['experts'])}."
        )
    rest = mixture.experts - 1
    first = _first_mixture(model)
    top_ks = {"MoeMlp": first.mlp.top_k}
    if mixture.attention and first.attention.top_k is not None:
        top_ks["MixtureOfAttention"] = first.attention.top_k
    for owner, top_k in top_ks.items():
        if top_k > rest:
            raise TransformError(
                f"Without {name} the mixture has {rest} expert{'s' * (rest != 1)}, fewer than "
                f"{owner}.top_k = {top_k} experts of a token: do not remove it, or reduce top_k."
            )
    index = record["experts"].index(name)
    lists = {x: record[x][:index] + record[x][index + 1 :] for x in ("experts", "sources")}
    record = {**record, **lists}
    if (domains := _domains(mixture)) is not None:
        vectors = np.delete(domains, index, axis=0)
        record["domains"] = {**record["domains"], "digest": upcycling.digest(vectors)}
    return _Change(Removal(mixture, index), [moe], record)


if __name__ == "__main__":
    raise SystemExit(
        upcycle_flags.main(
            __doc__, "upcycle extend", "espalier.launch.nexus.extend:extend", add_flags
        )
    )
