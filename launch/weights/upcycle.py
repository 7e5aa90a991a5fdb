"""Makes one mixture of experts of dense models that were trained on from one seed, or of copies of one model.

Examples, of a seed's run and runs that started from it:

  python -m launch.upcycle --method=bam --experts runs/seed runs/code runs/law --to=runs/bam
  python -m launch.upcycle --method=btx --experts runs/seed runs/code runs/law --to=runs/btx --top_k=2
  python -m launch.upcycle --method=nexus --seed_model=runs/seed --experts code=runs/code law=runs/law \\
      --domains=domains.json --to=runs/nexus

With btx (arXiv 2403.07816) FFNs become experts and all else is averaged; with bam (arXiv 2408.08274) attentions do too.
With nexus (arXiv 2408.15901) the seed is no expert and in no average: its FFNs are used by every token, and a
projection of embeddings of the experts' data (launch.prepare embed_domains) routes; launch.upcycle extend adds experts later.
With soup all is averaged to a dense model, which mixtures are compared with.
The printed table shows for every parameter whether it was copied, averaged or drawn. The result is a run directory
that every command takes as --checkpoint, and training as INITIAL_CHECKPOINT_PATH with the method's file after the dense
run's files: methods/bam/btx.gin, bam.gin, or methods/nexus/nexus.gin (nexus_linear.gin, nexus_mlp.gin, nexus_bam.gin).
Its config.gin is the first expert's with the bindings of that file. Arrays are read and written a layer at a time, and
means of large ones in blocks of rows.
"""

if __name__ == "__main__":
    from launch.weights import upcycle_flags

    add_flags = upcycle_flags.add
    raise SystemExit(upcycle_flags.main(__doc__, "upcycle", "launch.weights.upcycle", add_flags))

import argparse
import collections
from typing import Any

from data.nexus import domain_embeddings
from launch.run.load_run import RunConfig
from launch.weights import source_models, transformed_run, upcycle_flags
from launch.weights.source_models import RECORDED, SourceModel
from launch.weights.upcycle_flags import UpcycleFlags
from model.transforms import base
from model.transforms.base import TransformError
from model.transforms.experts import Mixture
from model.transforms.upcycle import Upcycle


def run(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      TransformError, ConvertError, DamagedCheckpointError, EmbeddingsError, FileNotFoundError.
    """
    options: UpcycleFlags = upcycle_flags.parsed(flags, UpcycleFlags)
    named = _experts(options)
    sources = [source for _, source in named]
    names = [name for name, _ in named]
    if options.seed_model:
        sources.append(SourceModel(options.seed_model, options.params))
    source_models.check_related(sources, unrelated=options.unrelated)
    dense = config.model
    mlp = dense.layer_settings()[0].mlp
    if not mlp.gated or mlp.experts:
        raise TransformError(f"experts are gated MLPs, and the dense model has {mlp.kind}.")
    domains = domain_embeddings.read(options.domains) if options.domains else None
    projected = domains is not None and options.router_kind == "projection"
    mixture = Mixture(
        experts=len(names),
        kv_heads=dense.config.kv_heads,
        scanned=dense.config.scan_layers,
        ffn=options.method != "soup",
        attention=options.mixes_attention,
        average_attention=options.average_attention,
        shared_kv=options.shared_kv,
        router=options.router_kind,
        domains=domains.vectors(names) if projected else None,
        seed=options.router_seed,
        **{name: x for name in RECORDED if (x := getattr(options, name)) is not None},
    )
    record: dict[str, Any] = {
        "method": options.method,
        "experts": names,
        "sources": [source.path for _, source in named],
        **{name: getattr(mixture, name) for name in RECORDED},
    }
    if options.seed_model:
        record["seed_model"] = options.seed_model
    if projected:
        record["domains"] = source_models.domains_record(domains, mixture.domains)
    settings = _settings(options, len(names), domains)
    recipes = transformed_run.write(
        options.to,
        Upcycle(mixture, shared_ffn=bool(options.seed_model)),
        sources,
        config=transformed_run.method_lines(options.method_files, settings),
        gin_files=flags.gin_file,
        meta={"upcycled": record},
    )
    lines = [*expert_lines(record), *base.table(recipes)]
    print("\n".join([*lines, f"written to {options.to}"]))


def expert_lines(record: dict[str, Any]) -> list[str]:
    """Returns a line for each expert in a mixture's record, in order, with its source."""
    wide = max(map(len, record["experts"]))
    pairs = zip(record["experts"], record["sources"], strict=True)
    return [f"expert {i}  {name.ljust(wide)}  {source}" for i, (name, source) in enumerate(pairs)]


def _settings(given: UpcycleFlags, experts: int, domains: Any) -> dict[str, Any]:
    """Returns values of the method files' macros."""
    if given.method == "soup":
        return {}
    settings = {
        "EXPERTS": experts,
        "TOP_K": 1 if given.top_k is None else given.top_k,
        "RENORMALISE": given.renormalise,
    }
    if given.mixes_attention:
        settings |= {"SHARED_KV": given.shared_kv, "ATTENTION_TOP_K": given.attention_top_k}
    if domains is not None:
        settings["DOMAIN_DIM"] = domains.dim
    return settings


def _experts(given: UpcycleFlags) -> list[tuple[str, SourceModel]]:
    """Returns names and models of the experts."""
    named: list[tuple[str, SourceModel]] = []
    for entry in given.experts:
        name, path = upcycle_flags.split(entry)
        source = SourceModel(path, given.params)
        named.append((name or source.folder.name, source))
    for name, count in collections.Counter(name for name, _ in named).items():
        if count > 1:
            raise TransformError(
                f"{count} experts are called {name}: give each a name of its own, as in --experts "
                f"{name}=DIR other=DIR; --copies=N repeats a model."
            )
    if given.copies > 1:
        named = [(f"{name}.{i}", source) for name, source in named for i in range(given.copies)]
    if len(named) < 2:
        raise TransformError(
            "at least two experts are needed: give --experts of several, or --copies=N."
        )
    return named
