"""Merges models into one of the same size, or stacks their layers, by a configuration in mergekit's YAML dialect.

Example, of two runs of one model, in the proportion 3 to 1; docs/use/merging.md has the methods and their parameters:

  printf 'merge_method: linear\\nmodels:\\n  - {model: /tmp/english, parameters: {weight: 3}}\\n  - {model: /tmp/python, parameters: {weight: 1}}\\n' > /tmp/merge.yml
  espalier merge --config=/tmp/merge.yml --out=/tmp/merged

Models are Hugging Face folders with safetensors, and the result is one too; or runs of this project, and the result is a
run that every command takes as --checkpoint. Weights go through memory in blocks. A merge that was killed leaves nothing
at --out; the same command then continues where it was. Models, --config and --out may be addresses
of object stores (docs/scale/remote_storage.md); a merge to an address begins again.

`espalier merge search --help`: searches the weights of a linear merge on held-out texts.
"""

import sys
from typing import Annotated

from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.config.setting_flags import File, Folder

Size = Annotated[str, "SIZE"]


def merge(
    *,
    config: File,
    out: Folder,
    seed: int | None = None,
    shard_size: Size | None = None,
    block_bytes: Size = "16MiB",
    dry_run: bool = False,
) -> None:
    """Merges models, and prints what it did.

    Args:
      config: YAML file, see docs/use/merging.md; or its text, if it begins with a brace.
      out: write the merged model to this folder.
      seed: random seed of methods that draw random numbers (default 0).
      shard_size: maximum data in a file of safetensors (default 5GB).
      block_bytes: data of a model in memory at a time; results do not depend on it.
      dry_run: prints what each tensor is made of, and writes nothing.
    """
    from espalier.launch.merge import run

    lines = run.merge_all(
        *(config, out),
        seed=seed,
        shard_bytes=shard_size and setting_flags.size(shard_size, "shard_size"),
        block_bytes=setting_flags.size(block_bytes, "block_bytes"),
        dry_run=dry_run,
    )
    print("\n".join(lines))


main = cli.command(
    *(__doc__, "merge", merge),
    addresses=("config", "out"),
    usage="%(prog)s --config=FILE --out=DIR [flags]",
    huge_pages=False,
)

if __name__ == "__main__":
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        raise SystemExit(cli.subcommand(__doc__, {"search": "espalier.launch.merge.search"}))
    raise SystemExit(main())
