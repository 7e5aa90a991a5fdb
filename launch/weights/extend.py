"""Adds an expert to a mixture of launch.upcycle, or takes one away.

Examples, after python -m launch.upcycle made runs/nexus and python -m launch.prepare embed_domains --extend added the domain:

  python -m launch.upcycle extend --moe=runs/nexus --add code=runs/code --domains=domains.json --to=runs/nexus5
  python -m launch.upcycle extend --moe=runs/btx --add code=runs/code --router=reset --to=runs/btx5
  python -m launch.upcycle extend --moe=runs/nexus5 --remove code --to=runs/nexus4

The new model is a branch of the same seed. Its FFN, and its attention where attentions are experts, become the last
expert; what experts share moves to it by --merge, but the shared FFN and a projection router, which places the expert
by the embedding of its data (arXiv 2408.15901). Scales and redrawn units are those of the other experts.
What is written is a run directory as that of launch.upcycle: parameters alone, no optimiser's state, so training from
it as INITIAL_CHECKPOINT_PATH begins with a new optimiser, with the files of the mixture's run and EXPERTS one more.
"""

if __name__ == "__main__":
    from launch import cli
    from launch.weights import upcycle_flags

    def start_run(start):
        from launch.weights import extend

        extend.run(start(), start.flags)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.run.load_run:RunConfig",
            command="upcycle extend",
            extra_flags=upcycle_flags.add_extension,
            run=start_run,
            default_files=upcycle_flags.mixture_files,
            unused={"VOCABULARY": "None"},
        )
    )

import argparse
import dataclasses
from typing import Any

import numpy as np

from data.nexus import domain_embeddings
from launch.run.load_run import RunConfig
from launch.weights import mixture_records, source_models, upcycle_flags
from launch.weights.import_weights import new_directory
from launch.weights.source_models import SourceModel
from model.nexus import extend as surgery
from model.nexus.extend import Addition
from model.transforms import upcycle
from model.transforms.experts import Mixture
from model.transforms.upcycle import UpcycleError


def run(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      UpcycleError, ConvertError, DamagedCheckpointError, EmbeddingsError, FileNotFoundError.
    """
    moe = SourceModel(flags.moe, flags.params)
    made = moe.meta.get("upcycled")
    if made is None or "sources" not in made:  # which earlier ones did not record
        raise UpcycleError(
            f"{flags.moe} does not come from launch.upcycle: its experts have no names."
        )
    mixture = _mixture(config.model, moe, made)
    change = _addition if flags.add else _removal
    change(config.model, flags, moe, made, mixture)


def _mixture(model: Any, moe: SourceModel, made: dict[str, Any]) -> Mixture:
    """What the mixture is."""
    first = model.layer_settings()[0]
    if first.mlp.experts != len(made["experts"]):
        raise UpcycleError(
            f"{moe.path} was made of the experts {', '.join(made['experts'])}, and its configuration says "
            f"{first.mlp.experts or 'none'}: give the one it was trained with."
        )
    routers = {path.rpartition("/router/")[2] for path in moe.shapes if "/mlp/router/" in path}
    domains = next((x for x in moe.shapes if x.endswith("mlp/router/domains")), None)
    return Mixture(
        experts=first.mlp.experts,
        kv_heads=model.config.kv_heads,
        attention=first.attention.experts > 0,
        shared_kv=first.attention.shared_kv,
        router="projection" if domains else "linear" if "kernel" in routers else "mlp",
        domains=_vectors(moe, domains) if domains else None,
        **{name: made[name] for name in mixture_records.KEPT},
    )


def _vectors(moe: SourceModel, path: str) -> np.ndarray:
    """The embeddings [E, M], which all layers have alike."""
    vectors = moe.open(path).read()
    return vectors.reshape(-1, *vectors.shape[-2:])[0]


def _addition(
    model: Any, flags: argparse.Namespace, moe: SourceModel, made: dict[str, Any], was: Mixture
) -> None:
    name, path = upcycle_flags.split(flags.add)
    new = SourceModel(path, flags.params)
    name = name or new.folder.name
    if name in made["experts"]:
        raise UpcycleError(
            f"{moe.path} has an expert {name} already: call the new one otherwise, NAME=DIR."
        )
    source_models.check_related([moe, new], unrelated=flags.unrelated)
    merge = 1 / (was.experts + 1) if flags.merge is None else flags.merge
    if not 0 <= merge <= 1:
        raise UpcycleError(f"--merge={merge:g} lies between 0 and 1.")
    record = {**made, "experts": [*made["experts"], name]}
    record["sources"] = [*made["sources"], new.path]
    domains = was.domains
    if (domains is None) != (flags.domains is None):
        raise UpcycleError(
            f"the router of {moe.path} reads no --domains."
            if domains is None
            else f"the router of {moe.path} needs the embedding of {name}: --domains=FILE."
        )
    if domains is not None:
        if flags.router == "reset":
            raise UpcycleError("--router=reset is of linear routers and MLPs: a projection stays.")
        file = domain_embeddings.read(flags.domains)
        mixture_records.check_same_encoder(file, made["domains"])
        mixture_records.check_same_vectors(file, made["experts"], domains)
        domains = np.concatenate([domains, file.vectors([name])])
        record["domains"] = mixture_records.record(file, domains)
    mixture = dataclasses.replace(
        was, experts=was.experts + 1, domains=domains, seed=flags.router_seed or 0
    )
    addition = Addition(merge=merge, router=flags.router or "append")

    def plan(target: upcycle.Shapes) -> list[upcycle.Piece]:
        return surgery.plan_addition(target, moe.model, new.model, mixture, addition)

    _write(model, flags, [moe, new], record, mixture, plan)


def _removal(
    model: Any, flags: argparse.Namespace, moe: SourceModel, made: dict[str, Any], was: Mixture
) -> None:
    given = ("domains", "merge", "router", "router_seed")
    if named := [name for name in given if getattr(flags, name) is not None]:
        raise UpcycleError(f"--{named[0]} is of --add.")
    if flags.remove not in made["experts"]:
        raise UpcycleError(
            f"{moe.path} has no expert {flags.remove}: there are {', '.join(made['experts'])}."
        )
    left = was.experts - 1
    first = model.layer_settings()[0]
    chosen = [("MoeMlp", first.mlp.top_k)]
    if was.attention and first.attention.top_k is not None:
        chosen.append(("MixtureOfAttention", first.attention.top_k))
    for owner, top_k in chosen:
        if top_k > left:
            raise UpcycleError(
                f"without {flags.remove} there {'is 1 expert' if left == 1 else f'are {left} experts'}, and "
                f"tokens use {owner}.top_k = {top_k} of them: keep as many."
            )
    index = made["experts"].index(flags.remove)
    record = {**made, **{x: made[x][:index] + made[x][index + 1 :] for x in ("experts", "sources")}}
    domains = was.domains
    if domains is not None:
        domains = np.delete(domains, index, axis=0)
        record["domains"] = {**made["domains"], "digest": mixture_records.digest(domains)}
    mixture = dataclasses.replace(was, experts=left, domains=domains)

    def plan(target: upcycle.Shapes) -> list[upcycle.Piece]:
        return surgery.plan_removal(target, moe.model, was, index)

    _write(model, flags, [moe], record, mixture, plan)


def _write(
    model: Any,
    flags: argparse.Namespace,
    sources: list[SourceModel],
    record: dict[str, Any],
    mixture: Mixture,
    plan: Any,
) -> None:
    bindings = ["# Of launch.upcycle extend.", "from model.moe import moe"]
    bindings += [f"moe.MoeMlp.num_experts = {mixture.experts}"]
    if mixture.attention:
        bindings += ["from model.bam import moa"]
        bindings += [f"moa.MixtureOfAttention.num_experts = {mixture.experts}"]
    with new_directory(flags.to) as folder:
        source_models.write_config(folder, sources[0], bindings)
        target = source_models.parameters(folder, flags.gin_file)
        pieces = plan({name: tuple(leaf.shape) for name, leaf in target.items()})
        meta = {**sources[0].kept_meta(), "upcycled": record}
        scanned = model.config.scan_layers
        source_models.save(folder, pieces, target, sources, scanned=scanned, meta=meta)
    named = list(zip(record["experts"], record["sources"], strict=True))
    lines = upcycle.table(pieces, named)
    print(
        "\n".join(
            [
                *lines,
                f"written to {flags.to}: parameters alone, to be trained on with a new optimiser",
            ]
        )
    )
