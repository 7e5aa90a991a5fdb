"""Makes mixtures of experts, for `launch.upcycle`."""

import argparse
import collections
from collections.abc import Mapping
from typing import Any

from espalier.launch.run.load_run import RunConfig
from espalier.launch.upcycle import upcycle_flags
from espalier.launch.upcycle.upcycle import UpcycleFlags
from espalier.launch.weights import source_models, transformed_run
from espalier.launch.weights.source_models import SourceModel
from espalier.model.transforms import base
from espalier.model.transforms.base import TransformError
from espalier.model.transforms.experts import Mixture, Upcycle

# What a mixture records for experts added later: flags of launch.upcycle, and their values if they are not set.
_RECORDED = {
    **{"expert_scale": 1.0, "drop_ratio": 0.0, "drop_seed": 0},
    **{"router_std": 0.02, "logit_std": 0.1},
}


def upcycle(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      TransformError, ConvertError, DamagedCheckpointError, EmbeddingsError, FileNotFoundError.
    """
    options: UpcycleFlags = upcycle_flags.parsed(flags, UpcycleFlags)
    names, experts = map(list, zip(*_experts(options), strict=True))
    sources = experts.copy()
    if options.seed_model:
        sources.append(SourceModel(options.seed_model, options.params))
    source_models.check_related(sources, unrelated=options.unrelated)
    dense = config.model
    mlp = dense.layer_settings()[0].mlp
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
    record: dict[str, Any] = {
        "method": options.method,
        "experts": names,
        "sources": [source.path for source in experts],
        **made,
    }
    if options.seed_model:
        record["seed_model"] = options.seed_model
    record |= method.record(names)
    recipes = transformed_run.write(
        options.to,
        Upcycle(mixture, shared_ffn=bool(options.seed_model)),
        sources,
        config=transformed_run.method_lines(method.files, method.settings(len(names))),
        gin_files=flags.gin_file,
        whole_config=flags.trust_config,
        meta={"upcycled": record},
    )
    lines = [*expert_lines(record), *base.table(recipes)]
    print("\n".join([*lines, f"written to {options.to}"]))


def recorded_mixture(record: Mapping[str, Any], **settings: Any) -> Mixture:
    """Returns a mixture with the experts' scale and redrawn units of a mixture's record."""
    own = {name: record[name] for name in ("expert_scale", "drop_ratio", "drop_seed")}
    return Mixture(**settings, **own)


def expert_lines(record: dict[str, Any]) -> list[str]:
    """Returns a line for each expert in a mixture's record, in order, with its source."""
    wide = max(map(len, record["experts"]))
    pairs = zip(record["experts"], record["sources"], strict=True)
    return [f"expert {i}  {name.ljust(wide)}  {source}" for i, (name, source) in enumerate(pairs)]


def _experts(options: UpcycleFlags) -> list[tuple[str, SourceModel]]:
    """Returns names and models of the experts."""
    named: list[tuple[str, SourceModel]] = []
    for entry in options.experts:
        name, path = upcycle_flags.split(entry)
        source = SourceModel(path, options.params)
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
