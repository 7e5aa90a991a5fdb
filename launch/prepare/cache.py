"""Builds the token caches of a mixture before a run; existing caches are checked.

Example: the English prose and docstrings of installed packages as bytes, under a minute:

  espalier prepare cache --gin_file=t5x_configs/data/bytes.gin --gin.MIXTURE_OR_TASK_NAME=text

The gin files and bindings of a training command work unchanged; settings that do not concern its data are
ignored. A run builds missing caches by itself, but stops with an error if a task has changed since its
cache was built. This command then builds the new cache beside the old one, or with --replace in its place.

With --beam_pipeline_options, Apache Beam builds the shards on a cluster, whose workers must see the files and the folder of caches
(or give an address of an object store, ESPALIER_CACHE=gs://BUCKET/cache); the caches are the same to the byte:

  espalier prepare cache --gin_file=t5x_configs/data/files.gin --gin.FILES='"/shared/web/*.jsonl"' --gin.MIXTURE_OR_TASK_NAME=files \\
    --beam_pipeline_options=--runner=FlinkRunner,--flink_master=localhost:8081
"""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import Any

from espalier.common import pipelines
from espalier.data.cache import by_beam, task_cache
from espalier.data.stream import mixing
from espalier.launch import cli


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replace",
        action="store_true",
        help="delete caches of these tasks that are damaged or out of date",
    )
    pipelines.add_flag(parser)


def build_caches(
    *,
    mixture_or_task_name: str,
    tasks: Sequence[Callable[[], Any]] = (),
    splits: Sequence[str] = ("train", "validation"),
    cache_dir: str | os.PathLike | None = None,
    replace: bool = False,
    beam_options: Sequence[str] = (),
) -> dict[str, dict[str, int]]:
    """Builds the token caches of every task of a mixture, and prints their sizes.

    Args:
      mixture_or_task_name: a SeqIO mixture or task.
      tasks: functions that register SeqIO tasks.
      splits: splits to build, for the tasks that have them.
      cache_dir: folder of caches; default $ESPALIER_CACHE or ~/.cache/espalier.
      replace: whether to delete caches of these tasks that are damaged or out of date.
      beam_options: of pipelines of Apache Beam, in place of processes of this machine.

    Returns:
      Target tokens by task and split.

    Raises:
      ValueError: no such mixture, or a task without any of the splits.
      CacheCorruptError: a cache is damaged, and `replace` is not set.
      PipelineError: a pipeline failed.
    """
    with by_beam.used(beam_options, cache_dir):
        return _built(mixture_or_task_name, tasks, splits, cache_dir, replace)


def _built(
    mixture_or_task_name: str,
    tasks: Sequence[Callable[[], Any]],
    splits: Sequence[str],
    cache_dir: str | os.PathLike | None,
    replace: bool,
) -> dict[str, dict[str, int]]:
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
    return tokens


def _run(start: cli.Start) -> dict[str, dict[str, int]]:
    given = {"replace": start.flags.replace, "beam_options": start.flags.beam_pipeline_options}
    return start(**{name: value for name, value in given.items() if value})


main = cli.gin_command(
    __doc__,
    "espalier.launch.prepare.cache:build_caches",
    command="prepare cache",
    extra_flags=_add_flags,
    run=_run,
    default_files=lambda flags: ["t5x_configs/runs/cache.gin"],
    part=True,
)

if __name__ == "__main__":
    raise SystemExit(main())
