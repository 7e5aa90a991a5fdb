"""Builds the token caches of a mixture before a run; existing caches are checked.

Example: the English prose and docstrings of installed packages as bytes, under a minute:

  espalier prepare cache --gin_file=t5x_configs/data/bytes.gin --gin.MIXTURE_OR_TASK_NAME=text

The gin files and bindings of a training command work unchanged; settings that do not concern its data are
ignored. A run builds missing caches by itself, but stops with an error if a task has changed since its
cache was built. This command then builds the new cache beside the old one, or with --replace in its place.
With --checksums it upgrades older caches, so that they can be read in place in a store.
The rows of very large caches are planned here too, if the gin files of the run are given.

With --beam_pipeline_options, Apache Beam builds them on a cluster, the same to the byte. Its workers must see the files and
the folder of the caches, or the root of the caches is an address of an object store:

  ESPALIER_CACHE=gs://BUCKET/cache espalier prepare cache --gin_file=t5x_configs/data/files.gin \\
    --gin.FILES='"gs://BUCKET/web/*.jsonl"' --gin.MIXTURE_OR_TASK_NAME=files \\
    --beam_pipeline_options=--runner=DataflowRunner,--project=PROJECT,--region=REGION,--temp_location=gs://BUCKET/tmp
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from espalier.data import tasks as registry
from espalier.data.cache import existing, store, task_cache
from espalier.data.stream import mixing, rows, stored_plan, stream
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.prepare import workers


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    setting_flags.add(group, build_caches, names=("replace", "checksums"))
    workers.add_flags(parser)


def build_caches(
    *,
    mixture_or_task_name: str,
    tasks: Sequence[Callable[[], Any]] = (),
    splits: Sequence[str] = ("train", "validation"),
    cache_dir: str | os.PathLike | None = None,
    replace: bool = False,
    checksums: bool = False,
    plan: Mapping[str, Any] | None = None,
) -> dict[str, dict[str, int]]:
    """Builds the token caches of every task of a mixture, and prints their sizes.

    Args:
      mixture_or_task_name: a SeqIO mixture or task.
      tasks: functions that register SeqIO tasks.
      splits: splits to build, for the tasks that have them.
      cache_dir: folder of caches; default $ESPALIER_CACHE or ~/.cache/espalier.
      replace: delete caches of these tasks that are damaged or out of date.
      checksums: build nothing; add checksums of blocks to the caches of these tasks, which need them to be read in place in a store.
      plan: arguments of `data.stream.rows.plan_source`, with which a run plans its rows. Plans that would be made when the
        first run starts, those of very large caches, are made now. None makes none.

    Returns:
      Target tokens by task and split.

    Raises:
      ValueError: no such mixture, or a task without any of the splits.
      CacheCorruptError: a cache is damaged, and `replace` is not set.
    """
    for register in tasks:
        register()
    members, _ = mixing.find_tasks(mixture_or_task_name)
    wanted = [(task, split) for task in members for split in splits if split in task.splits]
    for task in members:
        if not set(splits) & set(task.splits):
            raise ValueError(
                f"Task {task.name!r} has none of the splits {', '.join(splits)}; it has "
                f"{', '.join(task.splits)}. Set build_caches.splits."
            )
    tokens: dict[str, dict[str, int]] = {}
    if checksums:
        for task, split in wanted:
            existing.add_checksums(task_cache.caches_path(task.name, split, cache_dir))
        return tokens
    print(f"{'task':20s} {'split':12s} {'records':>10s} {'tokens':>14s}  directory")
    for task, split in wanted:
        cache = task_cache.open_task_cache(
            task, split, cache_dir=cache_dir, changed="replace" if replace else "build"
        )
        feature = "targets" if "targets" in cache.columns else next(iter(cache.columns))
        count = tokens.setdefault(task.name, {})[split] = cache.tokens(feature)
        print(
            f"{task.name:20s} {split:12s} {cache.num_records:10,d} {count:14,d}  {cache.directory}"
        )
        if plan is not None and stored_plan.is_needed(cache):
            if replace:
                store.remove_plans(cache.directory)
            planned = rows.plan_source(task.name, cache, **plan).plan
            print(f"{planned.num_rows:,} rows of {planned.row_lengths} are planned")
    _tell_bad_rows(members)
    return tokens


def _tell_bad_rows(members: Sequence[Any]) -> None:
    """Prints what is left out, if rows that cannot be used are. Where no run has counted them yet, the files are read again."""
    if any(getattr(task.source, "on_bad_row", "error") == "skip" for task in members):
        for name, text in registry.notices(registry.summary()):
            print(f"{name}: {text}")


def _run(start: cli.Start) -> Any:
    names = ("task_feature_lengths", "packing", "long_documents", "inputs_prefix")
    plan: dict[str, Any] = start.config.bound_to(stream.make_stream, *names)
    lengths = plan.pop("task_feature_lengths", None)
    given = setting_flags.given(start.flags, build_caches, names=("replace", "checksums"))
    if lengths:
        given["plan"] = {"feature_lengths": lengths, **plan}
    return start(**given)


main = cli.gin_command(
    __doc__,
    "espalier.launch.prepare.cache:build_caches",
    command="prepare cache",
    extra_flags=_add_flags,
    run=workers.used(_run),
    default_files=lambda flags: ["t5x_configs/runs/cache.gin"],
    part=True,
)

if __name__ == "__main__":
    raise SystemExit(main())
