"""Merges models into one of the same size, or stacks their layers, by a configuration in mergekit's YAML dialect.

Example, of two runs of one model, in the proportion 3 to 1; docs/merging.md has the methods and their parameters:

  printf 'merge_method: linear\\nmodels:\\n  - {model: /tmp/english, parameters: {weight: 3}}\\n  - {model: /tmp/python, parameters: {weight: 1}}\\n' > /tmp/merge.yml
  python -m launch.merge --config=/tmp/merge.yml --out=/tmp/merged

Models are Hugging Face folders with safetensors, and the result is one too; or runs of this project, and the result is a
run that every command takes as --checkpoint. Weights go through memory in blocks. A merge that was killed leaves nothing
at --out; of Hugging Face folders, the same command then goes on where it was. Models, --config and --out may be addresses
of object stores (docs/remote_storage.md); a merge to an address begins again.

`python -m launch.merge search --help`: searches the weights of a linear merge on held-out texts.
"""

import argparse
import sys
from collections.abc import Sequence

from launch import cli
from launch.config import sizes


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    usage = "%(prog)s --config=FILE --out=DIR [flags]"
    return cli.run_command(
        __doc__, "merge", _run, add_flags=_add_flags, usage=usage, huge_pages=False, argv=argv
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    cli.take_addresses(parser, "config", "out")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="YAML file, see docs/merging.md"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to be made")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of methods that draw random numbers (default 0)"
    )
    parser.add_argument(
        "--shard_size",
        metavar="SIZE",
        help="maximum data in a file of safetensors (default 5GB)",
    )
    parser.add_argument(
        "--block_bytes",
        default="16MiB",
        metavar="SIZE",
        help="data of a model in memory at a time (16MiB); results do not depend on it",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="prints what each tensor is made of, and writes nothing",
    )


def _run(flags: argparse.Namespace) -> None:
    from launch.merging import run

    lines = run.merge_all(
        flags.config,
        flags.out,
        seed=flags.seed,
        shard_bytes=flags.shard_size and sizes.parse(flags.shard_size, "shard_size"),
        block_bytes=sizes.parse(flags.block_bytes, "block_bytes"),
        dry_run=flags.dry_run,
    )
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        raise SystemExit(cli.subcommand(__doc__, {"search": "launch.merging.search"}))
    raise SystemExit(main())
