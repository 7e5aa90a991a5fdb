"""Compiles runs for absent TPUs: memory, FLOPs, traffic and least time per chip; searches layouts, makes tables.

Example: Llama 2 7B on sixteen v5e chips, one or two minutes on one core (needs the extra `tpu`), and a row of the tables:

  espalier precompile \\
    --gin_file=t5x_configs/models/llama2_7b.gin --gin_file=t5x_configs/runs/pretrain.gin \\
    --topology=v5e:4x4 --gin.BATCH_SIZE=16 --gin.TASK_FEATURE_LENGTHS='{"targets": 2048}'
  espalier precompile tables --rows llama2_7b_v5e_4x4

Takes the gin arguments of `train`, but reads no data and no directories. Nothing is allocated or run: the
compiler reports memory; FLOPs and collectives are counted in its program.

--search=batch finds the largest BATCH_SIZE that fits, and --search=layout the mesh, rule set and remat with the least time
for a step of this BATCH_SIZE. Both print a table of what each candidate costs, with the flags of the best one. Results are
stored, so that the same command continues a search whose time was over.
Exit status: 0 the step fits, 1 it does not fit, 2 the configuration is wrong, 75 the search's time is over.

`espalier precompile --help` shows the flags that compile one run or search, and `espalier precompile tables
--help` those of the full-size configurations of all papers.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from typing import Any

from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.precompile import tpu_topology
from espalier.launch.precompile.settings import Options, Search

COMMANDS = {"tables": "espalier.launch.precompile.tables"}
RECIPE = ("recipe",)  # the arguments of `train` that are used: no data and no directories
UNREAD = {"INITIAL_CHECKPOINT_PATH": "''"}  # a recipe may name it, as a reference's


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    tpu_topology.prepare_environment()
    words = sys.argv[1:] if argv is None else list(argv)
    return cli.main(
        __doc__,
        entry="espalier.launch.train:train",
        command="precompile",
        extra_flags=_add_flags,
        run=functools.partial(_run, words=words),
        arguments=RECIPE,
        unused=UNREAD,
        argv=argv,
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("compilation")
    group.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="slice to compile for: v5e:4x4, v6e:8x8, v5p:4x4x4, v4:2x2x2, v5e:1x1; 2xv5e:16x16 for two slices; ...",
    )
    group.add_argument("--json", metavar="FILE", help="also write the report to this JSON file")
    group.add_argument(
        "--hlo", metavar="FILE", help="also write the text of the compiled program to this file"
    )
    group.add_argument(
        "--program",
        default="train",
        choices=("train", "prefill", "decode", "covariances", "squares", "scores"),
        help="train: an update (default); prefill, decode: BATCH_SIZE prompts of TASK_FEATURE_LENGTHS tokens are read, or "
        "continued by one token; covariances, squares: a batch of documents of EK-FAC's first or third stage; scores: documents are scored "
        "for queries",
    )
    group = parser.add_argument_group("search")
    group.add_argument(
        "--search",
        choices=("batch", "layout"),
        help="batch: the largest BATCH_SIZE; layout: the best of meshes, rule sets and remat",
    )
    setting_flags.add(group, Search)
    group = parser.add_argument_group("prefill, decode")
    group.add_argument(
        "--cache_policy",
        default="full",
        metavar="NAME",
        help="policy of the key/value cache (default full), with the names of espalier generate",
    )
    cache_help = (
        "a setting of the cache policy, such as capacity=1024, like in `generate`; repeatable"
    )
    group.add_argument(
        "--cache", action="append", default=[], metavar="NAME=VALUE", help=cache_help
    )
    setting_flags.add(group, Options, names=_GENERATION)
    group = parser.add_argument_group("covariances, squares, scores")
    setting_flags.add(group, Options, names=("modules", "blocks", "queries", "rank"))


_GENERATION = ("max_new_tokens", "cache_dtype", "weights_dtype", "prefill_chunk")
# Flags that only some programs read.
_OF_PROGRAMS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("prefill", "decode"): (*_GENERATION, "cache_policy", "cache"),
    ("covariances", "squares", "scores"): ("modules",),
    ("covariances", "squares"): ("blocks",),
    ("scores",): ("queries", "rank"),
}


class FlagError(ValueError):
    """Flags that exclude each other, or that nothing would read."""


def _check(flags: argparse.Namespace) -> None:
    defaults = {"cache_policy": "full", "cache": [], **vars(Options()), **vars(Search())}
    changed = {n for n, default in defaults.items() if getattr(flags, n, default) != default}
    for programs, names in _OF_PROGRAMS.items():
        if flags.program not in programs and (wrong := [name for name in names if name in changed]):
            raise FlagError(
                f"--{wrong[0]} is read by --program={' or '.join(programs)} alone, and this is {flags.program}: remove it."
            )
    if not flags.search and (wrong := [name for name in vars(Search()) if name in changed]):
        raise FlagError(f"--{wrong[0]} is read by a search alone: add --search or remove it.")
    if flags.search and flags.program != "train":
        raise FlagError(
            f"--search={flags.search} searches for updates alone: remove --program={flags.program}."
        )
    if flags.search and flags.hlo:
        raise FlagError("--hlo writes one program's text: remove it, or --search.")


def _run(start: cli.Start, *, words: Sequence[str]) -> int:
    flags = start.flags
    _check(flags)
    recipe = start.config.arguments()["recipe"]
    if flags.search:
        from espalier.launch.precompile import search

        return search.run(recipe, flags, without_search(words), start.config.text)
    from espalier.launch.precompile import precompile

    fits = precompile.precompile(
        recipe,
        flags.topology,
        kind=flags.program,
        **_settings(flags),
        json_file=flags.json,
        hlo=flags.hlo,
    )
    return 0 if fits else 1


def without_search(words: Sequence[str]) -> list[str]:
    """Returns the words of a command line without the flags of its search and of its output."""
    removed = [f"--{name}" for name in ("search", *vars(Search()), "json", "hlo")]
    rest: list[str] = []
    values = iter(words)
    for word in values:
        if word in removed:
            next(values, None)  # its value is the next word
        elif word.partition("=")[0] not in removed:
            rest.append(word)
    return rest


def _settings(flags: argparse.Namespace) -> dict[str, Any]:
    from espalier.model.kv_cache.policies import policy_from_text, settings_of

    return {
        "policy": policy_from_text(flags.cache_policy, settings_of(flags.cache)),
        "options": Options(**setting_flags.given(flags, Options)),
    }


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("-"):
        raise SystemExit(main())
    raise SystemExit(cli.subcommand(__doc__, COMMANDS))
