"""Adds an expert to a mixture or removes one, for `launch.upcycle extend`."""

import argparse
import dataclasses
from typing import Any

import numpy as np

from espalier.data.nexus import domain_embeddings
from espalier.launch.nexus import domain_record
from espalier.launch.nexus.extend import ExtendFlags
from espalier.launch.run.load_run import RunConfig
from espalier.launch.upcycle import upcycle_flags
from espalier.launch.upcycle.mixture import expert_lines, recorded_mixture
from espalier.launch.weights import source_models, transformed_run
from espalier.launch.weights.source_models import SourceModel
from espalier.model.bam.moa import AttentionExperts
from espalier.model.nexus.domain_router import MlpRouters, ProjectionRouters
from espalier.model.nexus.extend import Addition, Removal
from espalier.model.transforms import base
from espalier.model.transforms.base import TransformError, TreeTransform
from espalier.model.transforms.experts import LinearRouters, Mixture, Routers


@dataclasses.dataclass(frozen=True)
class _Change:
    """A new mixture: its transform, source models, and record."""

    transform: TreeTransform
    sources: list[SourceModel]
    record: dict[str, Any]


def extend(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      TransformError, ConvertError, DamagedCheckpointError, EmbeddingsError, FileNotFoundError.
    """
    options: ExtendFlags = upcycle_flags.parsed(flags, ExtendFlags)
    moe = SourceModel(options.moe, options.params)
    record = moe.meta.get("upcycled")
    if record is None or "sources" not in record:
        raise TransformError(
            f"{options.moe} was not made by launch.upcycle, so its experts have no names: give another --moe."
        )
    mixture = _mixture(config.model, moe, record)
    if options.add:
        change = _addition(options, options.add, moe, record, mixture)
    else:
        change = _removal(config.model, str(options.remove), moe, record, mixture)
    recipes = transformed_run.write(
        options.to,
        change.transform,
        change.sources,
        config=[
            f"EXPERTS = {len(change.record['experts'])}",
            *([f"LEVELLED = {mixture.experts}"] if options.level else []),
        ],
        gin_files=flags.gin_file,
        whole_config=flags.trust_config,
        meta={"upcycled": change.record},
    )
    lines = [*expert_lines(change.record), *base.table(recipes)]
    last = f"written to {options.to}: parameters without an optimiser's state"
    print("\n".join([*lines, last]))


def _mixture(model: Any, moe: SourceModel, record: dict[str, Any]) -> Mixture:
    """Returns the settings of a mixture, from its configuration, parameters and record."""
    first = model.layer_settings()[0]
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


def _domains(mixture: Mixture) -> np.ndarray | None:
    """Returns the embeddings [E, M] of a mixture's experts; None if its routers have none."""
    return mixture.router.domains if isinstance(mixture.router, ProjectionRouters) else None


def _vectors(moe: SourceModel, path: str) -> np.ndarray:
    """Returns the domain embeddings [E, M], which are equal in all layers."""
    vectors = moe.open(path).read()
    return vectors.reshape(-1, *vectors.shape[-2:])[0]


def _addition(
    options: ExtendFlags, add: str, moe: SourceModel, record: dict[str, Any], mixture: Mixture
) -> _Change:
    name, path = upcycle_flags.split(add)
    new = SourceModel(path, options.params)
    name = name or new.folder.name
    experts = record["experts"]
    if name in experts:
        raise TransformError(
            f"{moe.path} already has an expert {name}: give the new one another name, --add NAME=DIR."
        )
    source_models.check_related([moe, new], unrelated=options.unrelated)
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
        domain_record.check_same_encoder(file, record["domains"])
        domain_record.check_same_vectors(file, experts, domains)
        domains = np.concatenate([domains, file.vectors([name])])
        router = dataclasses.replace(router, domains=domains)
        record["domains"] = domain_record.domains_record(file, domains)
    count = mixture.experts + 1
    larger = dataclasses.replace(
        mixture, experts=count, router=router, seed=options.router_seed or 0
    )
    merge = 1 / count if options.merge is None else options.merge
    transform = Addition(larger, merge=merge, router=options.router or "append")
    return _Change(transform, [moe, new], record)


def _removal(
    model: Any, name: str, moe: SourceModel, record: dict[str, Any], mixture: Mixture
) -> _Change:
    if name not in record["experts"]:
        raise TransformError(
            f"{moe.path} has no expert {name}: give one of {', '.join(record['experts'])}."
        )
    rest = mixture.experts - 1
    first = model.layer_settings()[0]
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
        record["domains"] = {**record["domains"], "digest": domain_record.digest(vectors)}
    return _Change(Removal(mixture, index), [moe], record)
