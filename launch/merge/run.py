"""Runs the merges of a configuration, one after the other."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from espalier.common import stages
from espalier.common.storage import paths
from espalier.launch.merge import checks, config_file, hf_output, output, settings, tokens
from espalier.launch.merge.models import HfModel, Model, open_model
from espalier.launch.merge.output import Workers
from espalier.launch.merge.plan import Planned, Planner
from espalier.launch.merge.settings import Merge, MergeError

_SHARD = 5 * 10**9  # bytes


def merge_all(
    config: str,
    out: str,
    *,
    seed: int | None = None,
    shard_bytes: int | None = None,
    block_bytes: int = 16 << 20,
    threads: int | None = None,
    dry_run: bool = False,
) -> list[str]:
    """Merges as a file says, and returns lines for the user.

    Results of documents with a name go to OUT.stages/NAME, that of the one without a name to OUT. A stage that is there
    from the same configuration is used as it is.

    Args:
      config: path of the YAML file, or its text, if it begins with a brace.
      out: write the merged model to this folder.
      seed: of random methods; None for 0.
      shard_bytes: maximum data in a file of a Hugging Face folder; None for 5 GB.
      block_bytes: bytes of an input in memory at a time.
      threads: number of threads; None for one for each processor.
      dry_run: only return the table of tensors.

    Raises:
      MergeError, TransformError, CheckpointFileError, DamagedCheckpointError, ConvertError, OSError.
    """
    merges = config_file.read(config)
    if seed is not None and not any(merge.is_random for merge in merges):
        raise MergeError(
            f"--seed={seed} has no effect: {config} has no method that draws. Remove it."
        )
    targets = _targets(merges, out)
    lines: list[str] = []
    for merge in merges:
        target = targets[merge.name]
        located = _located(merge, {k: v for k, v in targets.items() if k is not None})
        if dry_run and any(
            path in targets.values() and not _exists(path) for path in located.models()
        ):
            lines.append(f"{target}: planned once its stages are there")
            continue
        if merge.name is not None and _is_there(located, target, seed or 0):
            lines.append(f"{target}: there already")
            continue
        with (
            stages.stage(f"merging {target}"),
            Workers(block_bytes=block_bytes, threads=threads) as workers,
        ):
            lines += _merge(located, target, seed or 0, shard_bytes, workers, dry_run=dry_run)
    return lines


def _targets(merges: Sequence[Merge], out: str) -> dict[str | None, str]:
    """Returns the folder of each merge; the last is OUT even if it has a name."""
    targets: dict[str | None, str] = {
        merge.name: paths.join(f"{out.rstrip('/')}.stages", merge.name)
        for merge in merges
        if merge.name
    }
    last = next((merge for merge in merges if merge.name is None), merges[-1])
    return targets | {last.name: out}


def _located(merge: Merge, stages: dict[str, str]) -> Merge:
    """Returns a merge with the folders of stages instead of their names."""

    def of(path: str | None) -> str | None:
        return stages.get(path, path) if path is not None else None

    def part(x: settings.Slice) -> settings.Slice:
        sources = tuple(dataclasses.replace(s, model=str(of(s.model))) for s in x.sources)
        return dataclasses.replace(x, sources=sources, base=of(x.base))

    modules = {
        name: dataclasses.replace(module, slices=tuple(map(part, module.slices)))
        for name, module in merge.modules.items()
    }
    tokens_ = merge.tokens and dataclasses.replace(
        merge.tokens, source=str(of(merge.tokens.source))
    )
    return dataclasses.replace(merge, modules=modules, base=of(merge.base), tokens=tokens_)


def _exists(target: str) -> bool:
    return bool(paths.names(target)) if paths.is_remote(target) else os.path.lexists(target)


def _is_there(merge: Merge, target: str, seed: int) -> bool:
    """Returns whether a stage is there; raises MergeError if it is of another configuration, or of other weights."""
    if not _exists(target):
        return False
    record: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        record = json.loads(paths.read(paths.join(target, output.RECORD)))
    configuration = json.loads(json.dumps(merge.text))
    if (record.get("configuration"), record.get("seed")) != (configuration, seed):
        raise MergeError(
            f"{target} is there, of another configuration or seed: remove it, or give another --out."
        )
    recorded = dict(zip(merge.models(), record.get("inputs", ()), strict=False))
    for path in merge.models():
        with contextlib.closing(open_model(path)) as model:
            if model.fingerprint() != recorded.get(path):
                raise MergeError(
                    f"{target} is there, and its {output.RECORD} does not have the weights that {path} has now: remove {target}, "
                    "or give another --out."
                )
    return True


def _merge(
    merge: Merge,
    target: str,
    seed: int,
    shard_bytes: int | None,
    workers: Workers,
    *,
    dry_run: bool,
) -> list[str]:
    with contextlib.ExitStack() as stack:
        models: dict[str, Model] = {}
        for path in merge.models():
            models[path] = stack.enter_context(contextlib.closing(open_model(path)))
        checks.check(merge, models)
        planner = Planner(merge, models, seed=seed, vocabulary=tokens.build(merge, models))
        planned = planner.plan()
        of_hf = isinstance(planner.donor, HfModel)
        if shard_bytes is not None and not of_hf:
            raise MergeError(
                f"--shard_size is of files of safetensors, and {target} will be a run: remove it."
            )
        if dry_run:
            return output.table(planned)
        workers.check_equal(planned, models, merge.file)
        checks.check_copies(merge, models)
        checks.warn(merge, models, [x.name for x in planned])
        if of_hf:
            most = _SHARD if shard_bytes is None else shard_bytes
            hf_output.write(planner, planned, target, shard_bytes=most, workers=workers)
        else:
            from espalier.launch.merge import native_output

            native_output.write(planner, planned, target, workers=workers)
    return [f"{target}: {_described(merge, planned)}"]


def _described(merge: Merge, planned: Sequence[Planned]) -> str:
    count = sum(math.prod(x.shape) for x in planned)
    shown = stages.size(output.out_bytes(planned))
    models = merge.merged_models()
    return f"{merge.method} of {len(models)} model{'s' * (len(models) != 1)}, {count:,} parameters, {shown}"
