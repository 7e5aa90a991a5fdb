"""Makes one mixture of experts of dense models that were trained on from one seed, or of copies of one model.

Examples, of a seed's run and runs that started from it:

  python -m launch.upcycle --method=bam --experts runs/seed runs/code runs/law --to=runs/bam
  python -m launch.upcycle --method=btx --experts runs/seed runs/code runs/law --to=runs/btx --top_k=2
  python -m launch.upcycle --method=nexus --seed_model=runs/seed --experts code=runs/code law=runs/law \\
      --domains=domains.json --to=runs/nexus

With btx (arXiv 2403.07816) FFNs become experts and all else is averaged; with bam (arXiv 2408.08274) attentions do too.
With nexus (arXiv 2408.15901) the seed is no expert and in no average: its FFNs are used by every token, and a
projection of embeddings of the experts' data (launch.prepare embed_domains) routes; launch.upcycle extend adds experts later.
With soup all is averaged, and a dense model comes of it: what mixtures are compared with.
The table that is printed says of every parameter whether it was copied, averaged or drawn. What is written is a run
directory that every command takes as --checkpoint, and training as INITIAL_CHECKPOINT_PATH, with methods/bam/btx.gin,
bam.gin, or nexus.gin (nexus_linear.gin, nexus_mlp.gin, nexus_bam.gin) after the dense run's files. Arrays are read and
written a layer at a time, and means of large ones in blocks of rows.
"""

if __name__ == "__main__":
    from launch import cli
    from launch.weights import upcycle_flags

    def start_run(start):
        from launch.weights import upcycle

        upcycle.run(start(), start.flags)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.run.load_run:RunConfig",
            command="upcycle",
            extra_flags=upcycle_flags.add,
            run=start_run,
            default_files=upcycle_flags.default_files,
            unused={"VOCABULARY": "None"},
        )
    )

import argparse
import collections
from collections.abc import Sequence
from typing import Any

from data.nexus import domain_embeddings
from launch.run.load_run import RunConfig
from launch.weights import mixture_records, source_models, upcycle_flags
from launch.weights.import_weights import new_directory
from launch.weights.source_models import SourceModel
from model.mlp import GatedMlp
from model.transformer import block_of
from model.transforms import upcycle as surgery
from model.transforms.experts import Mixture
from model.transforms.upcycle import UpcycleError

# Factories of routers, by the module they stand in.
_ROUTERS = {"projection": ("domain_router", "DomainRouter"), "mlp": ("mlp_router", "MlpRouter")}


def run(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      UpcycleError, ConvertError, DamagedCheckpointError, EmbeddingsError, FileNotFoundError.
    """
    check_flags(flags)
    router = _router(flags)
    named = _experts(flags)
    sources = [source for _, source in named]
    names = [name for name, _ in named]
    shared = SourceModel(flags.seed_model, flags.params) if flags.seed_model else None
    every = [*sources, *([shared] if shared else [])]
    source_models.check_related(every, unrelated=flags.unrelated)
    dense = config.model
    mlp = block_of(dense, 0).mlp(config=dense.config, name="mlp")
    if not isinstance(mlp, GatedMlp):
        raise UpcycleError(f"experts are gated MLPs, and the dense model has {type(mlp).__name__}.")
    domains = domain_embeddings.read(flags.domains) if flags.domains else None
    vectors = None
    if domains is not None and router == "projection":
        vectors = domains.vectors(names)
    mixture = Mixture(
        experts=len(sources),
        kv_heads=dense.config.kv_heads,
        ffn=flags.method != "soup",
        attention=_mixes_attention(flags),
        average_attention=flags.average_attention,
        shared_kv=flags.shared_kv,
        router=router,
        domains=vectors,
        seed=flags.router_seed,
        **{name: x for name in mixture_records.KEPT if (x := getattr(flags, name)) is not None},
    )
    meta: dict[str, Any] = {
        "method": flags.method,
        "experts": names,
        "sources": [source.path for source in sources],
        **{name: getattr(mixture, name) for name in mixture_records.KEPT},
    }
    if shared is not None:
        meta["seed_model"] = shared.path
    if domains is not None and vectors is not None:
        meta["domains"] = mixture_records.record(domains, vectors)
    with new_directory(flags.to) as folder:
        bindings = _bindings(flags, mixture, None if domains is None else domains.dim)
        source_models.write_config(folder, sources[0], bindings)
        target = source_models.parameters(folder, flags.gin_file)
        pieces = surgery.plan(
            {name: tuple(leaf.shape) for name, leaf in target.items()},
            [source.model for source in sources],
            mixture,
            shared=shared.model if shared else None,
        )
        source_models.save(
            folder,
            pieces,
            target,
            every,
            scanned=dense.config.scan_layers,
            meta={**sources[0].kept_meta(), "upcycled": meta},
        )
    lines = surgery.table(pieces, [(name, source.path) for name, source in named])
    print("\n".join([*lines, f"written to {flags.to}"]))


def _router(flags: argparse.Namespace) -> Any:
    """What routes."""
    return (flags.router or "projection") if flags.method == "nexus" else "linear"


def _mixes_attention(flags: argparse.Namespace) -> bool:
    return flags.method == "bam" or flags.attention_experts


def check_flags(flags: argparse.Namespace) -> None:
    """Raises UpcycleError for flags that say nothing here, or that must go together and do not."""
    nexus, experts, router = flags.method == "nexus", flags.method != "soup", _router(flags)
    owners = {
        "--method=nexus": (nexus, ("seed_model", "domains", "router", "attention_experts")),
        "experts, and --method=soup has none": (
            experts,
            ("top_k", "renormalise", "expert_scale", "drop_ratio"),
        ),
        "attention experts (--method=bam, or nexus with --attention_experts)": (
            _mixes_attention(flags),
            ("shared_kv", "average_attention", "attention_top_k"),
        ),
        "linear routers": (experts and router == "linear", ("router_std",)),
        "routers of --method=nexus that are not linear": (router != "linear", ("logit_std",)),
        "--drop_ratio": (flags.drop_ratio, ("drop_seed",)),
    }
    for owner, (there, names) in owners.items():
        for name in names:
            given = getattr(flags, name)
            if not there and given is not None and given is not False:
                raise UpcycleError(f"--{name} is of {owner}: leave it out.")
    if flags.copies < 1:
        raise UpcycleError(f"--copies={flags.copies} must be at least 1.")
    if not 0 <= (flags.drop_ratio or 0) <= 1:
        raise UpcycleError(f"--drop_ratio={flags.drop_ratio:g} lies between 0 and 1.")
    if flags.expert_scale is not None and not flags.expert_scale > 0:
        raise UpcycleError(f"--expert_scale={flags.expert_scale:g} must be positive.")
    if not nexus:
        return
    if not flags.seed_model:
        raise UpcycleError("--method=nexus needs --seed_model=DIR, whose FFNs all tokens share.")
    if (router != "linear") != bool(flags.domains):
        raise UpcycleError(
            "--router=linear reads no --domains."
            if flags.domains
            else f"--router={router} needs --domains=FILE of launch.prepare embed_domains, whose width it has."
        )
    if router == "projection" and flags.copies > 1:
        raise UpcycleError(
            "--copies have one embedding, so that the first would take every token: give runs of several "
            "domains, or --router=linear."
        )


def _experts(flags: argparse.Namespace) -> list[tuple[str, SourceModel]]:
    """Names and models of the experts."""
    given: list[tuple[str, SourceModel]] = []
    for entry in flags.experts:
        name, path = upcycle_flags.split(entry)
        source = SourceModel(path, flags.params)
        given.append((name or source.folder.name, source))
    for name, count in collections.Counter(name for name, _ in given).items():
        if count > 1:
            raise UpcycleError(
                f"{count} experts are called {name}: give each a name of its own, as in --experts "
                f"{name}=DIR other=DIR; --copies=N repeats a model."
            )
    if flags.copies > 1:
        given = [(f"{name}.{i}", source) for name, source in given for i in range(flags.copies)]
    if len(given) < 2:
        raise UpcycleError("one model is no mixture: give --experts of several, or --copies=N.")
    return given


def _bindings(flags: argparse.Namespace, mixture: Mixture, domain_dim: int | None) -> Sequence[str]:
    """What makes the first model's configuration that of the mixture."""
    if not mixture.ffn:
        return ["# Of launch.upcycle: a mean of models."]
    lines = ["# Of launch.upcycle.", "from model import mlp", "from model.moe import moe"]
    lines += [
        "from model import transformer",
        "transformer.Block.mlp = @moe.experts_of()",
        "moe.experts_of.mlp = @mlp.GatedMlp",
        "moe.experts_of.moe = @moe.MoeMlp",
        f"moe.MoeMlp.num_experts = {mixture.experts}",
        f"moe.MoeMlp.top_k = {1 if flags.top_k is None else flags.top_k}",
        f"moe.MoeMlp.renormalise = {flags.renormalise}",
    ]
    if flags.seed_model:
        lines.append("moe.MoeMlp.shared = @mlp.GatedMlp")
    owners = ["moe.MoeMlp"]
    if mixture.attention:
        lines += [
            "from model import attention",
            "from model.bam import moa",
            "transformer.Block.attention = @moa.experts_of()",
            "moa.experts_of.attention = @attention.Attention",
            "moa.experts_of.moa = @moa.MixtureOfAttention",
            f"moa.MixtureOfAttention.num_experts = {mixture.experts}",
            f"moa.MixtureOfAttention.top_k = {flags.attention_top_k}",
            f"moa.MixtureOfAttention.shared_kv = {flags.shared_kv}",
        ]
        owners.append("moa.MixtureOfAttention")
    if mixture.router in _ROUTERS:
        module, name = _ROUTERS[mixture.router]
        lines += [f"from model.nexus import {module}"]
        lines += [f"{module}.{name}.domain_dim = {domain_dim}"]
        lines += [f"{owner}.router = @{module}.{name}" for owner in owners]
    return lines
