"""Adds an expert to a mixture of launch.upcycle, or takes one away.

Examples, after python -m launch.upcycle made runs/nexus and python -m launch.prepare embed_domains --extend added the domain:

  python -m launch.upcycle extend --moe=runs/nexus --add code=runs/code --domains=domains.json --to=runs/nexus5
  python -m launch.upcycle extend --moe=runs/btx --add code=runs/code --router=reset --to=runs/btx5
  python -m launch.upcycle extend --moe=runs/nexus5 --remove code --to=runs/nexus4

The new model is a branch of the same seed. Its FFN, and its attention where attentions are experts, become the last
expert. Parameters that experts share move towards it by --merge, except the shared FFN and a projection router, which
places the expert by the embedding of its data (arXiv 2408.15901). Scales and redrawn units are as for the other experts.
The result is a run directory like launch.upcycle's: parameters without an optimiser's state. Training from it, with the
files of the mixture's run and EXPERTS one more, begins with a new optimiser.
"""

if __name__ == "__main__":
    from launch.weights import upcycle_flags

    add_flags = upcycle_flags.add_extension
    raise SystemExit(
        upcycle_flags.main(__doc__, "upcycle extend", "launch.weights.extend", add_flags)
    )

import argparse
import dataclasses
from typing import Any

import numpy as np

from data.nexus import domain_embeddings
from launch.run.load_run import RunConfig
from launch.weights import source_models, transformed_run, upcycle_flags
from launch.weights.source_models import RECORDED, SourceModel
from launch.weights.upcycle import expert_lines
from launch.weights.upcycle_flags import ExtendFlags
from model.nexus.extend import Addition, Removal
from model.transforms import base
from model.transforms.base import TransformError, TreeTransform
from model.transforms.experts import Mixture


@dataclasses.dataclass(frozen=True)
class _Change:
    """A new mixture: its transform, source models, and record."""

    transform: TreeTransform
    sources: list[SourceModel]
    record: dict[str, Any]


def run(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      TransformError, ConvertError, DamagedCheckpointError, EmbeddingsError, FileNotFoundError.
    """
    options: ExtendFlags = upcycle_flags.parsed(flags, ExtendFlags)
    moe = SourceModel(options.moe, options.params)
    record = moe.meta.get("upcycled")
    if record is None or "sources" not in record:
        raise TransformError(
            f"{options.moe} does not come from launch.upcycle: its experts have no names."
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
        config=[f"EXPERTS = {len(change.record['experts'])}"],
        gin_files=flags.gin_file,
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
            f"{moe.path} was made of the experts {', '.join(record['experts'])}, and its configuration has "
            f"{first.mlp.experts or 'none'}: give the one it was trained with."
        )
    shapes = moe.abstract.shapes
    routers = {path.rpartition("/router/")[2] for path in shapes if "/mlp/router/" in path}
    domains = next((path for path in shapes if path.endswith("mlp/router/domains")), None)
    return Mixture(
        experts=first.mlp.experts,
        kv_heads=model.config.kv_heads,
        scanned=model.config.scan_layers,
        attention=first.attention.experts > 0,
        shared_kv=first.attention.shared_kv,
        router="projection" if domains else "linear" if "kernel" in routers else "mlp",
        domains=_vectors(moe, domains) if domains else None,
        **{name: record[name] for name in RECORDED},
    )


def _vectors(moe: SourceModel, path: str) -> np.ndarray:
    """Returns the domain embeddings [E, M], which are equal in all layers."""
    vectors = moe.open(path).read()
    return vectors.reshape(-1, *vectors.shape[-2:])[0]


def _addition(
    given: ExtendFlags, add: str, moe: SourceModel, record: dict[str, Any], mixture: Mixture
) -> _Change:
    name, path = upcycle_flags.split(add)
    new = SourceModel(path, given.params)
    name = name or new.folder.name
    experts = record["experts"]
    if name in experts:
        raise TransformError(
            f"{moe.path} has an expert {name} already: give the new one another name, NAME=DIR."
        )
    source_models.check_related([moe, new], unrelated=given.unrelated)
    record = {**record, "experts": [*experts, name], "sources": [*record["sources"], new.path]}
    domains = mixture.domains
    if domains is None and given.domains is not None:
        raise TransformError(f"the router of {moe.path} reads no --domains.")
    if domains is not None:
        if given.domains is None:
            raise TransformError(
                f"the router of {moe.path} needs the embedding of {name}: --domains=FILE."
            )
        if given.router == "reset":
            raise TransformError(
                "--router=reset is of linear routers and MLPs: a projection stays."
            )
        file = domain_embeddings.read(given.domains)
        source_models.check_same_encoder(file, record["domains"])
        source_models.check_same_vectors(file, experts, domains)
        domains = np.concatenate([domains, file.vectors([name])])
        record["domains"] = source_models.domains_record(file, domains)
    count = mixture.experts + 1
    larger = dataclasses.replace(
        mixture, experts=count, domains=domains, seed=given.router_seed or 0
    )
    merge = 1 / count if given.merge is None else given.merge
    transform = Addition(larger, merge=merge, router=given.router or "append")
    return _Change(transform, [moe, new], record)


def _removal(
    model: Any, name: str, moe: SourceModel, record: dict[str, Any], mixture: Mixture
) -> _Change:
    if name not in record["experts"]:
        raise TransformError(
            f"{moe.path} has no expert {name}: there are {', '.join(record['experts'])}."
        )
    num_left = mixture.experts - 1
    first = model.layer_settings()[0]
    chosen = [("MoeMlp", first.mlp.top_k)]
    if mixture.attention and first.attention.top_k is not None:
        chosen.append(("MixtureOfAttention", first.attention.top_k))
    for owner, top_k in chosen:
        if top_k > num_left:
            raise TransformError(
                f"without {name} there {'is 1 expert' if num_left == 1 else f'are {num_left} experts'}, and "
                f"tokens use {owner}.top_k = {top_k} of them: keep as many."
            )
    index = record["experts"].index(name)
    rest = {x: record[x][:index] + record[x][index + 1 :] for x in ("experts", "sources")}
    record = {**record, **rest}
    if mixture.domains is not None:
        vectors = np.delete(mixture.domains, index, axis=0)
        record["domains"] = {**record["domains"], "digest": source_models.digest(vectors)}
    return _Change(Removal(mixture, index), [moe], record)
