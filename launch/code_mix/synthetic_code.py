"""Writes verified synthetic code: Python problems with solutions and tests, each run in a sandbox.

Example: 2,000 documents, well under a minute:

  espalier prepare synthetic_code --out=/tmp/synth --num_documents=2000 --seed=1

writes train.jsonl and validation.jsonl, rows {"id", "text"}, and manifest.json with the numbers of accepted
and dropped documents. Runs read them like other files (t5x_configs/data/files.gin), or generate the same
documents themselves (t5x_configs/data/synthetic_code.gin).
"""

import argparse
import json
import pathlib
import shutil

from espalier.data.code_mix import synthetic_code
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.inference import row_files

_SETTINGS = ("num_documents", "seed", "variants", "mutated_share", "validation_fraction")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="write the files to this folder"
    )
    setting_flags.add(parser, synthetic_code.build, names=_SETTINGS)


def _run(flags: argparse.Namespace) -> None:
    row_files.check_folder(flags.out)
    folder = synthetic_code.build(**setting_flags.given(flags, synthetic_code.build, _SETTINGS))
    out = pathlib.Path(flags.out)
    shutil.copytree(folder, out, dirs_exist_ok=True)
    manifest = json.loads((out / synthetic_code.MANIFEST).read_text(encoding="utf-8"))
    counts = ", ".join(f"{count:,} {split}" for split, count in manifest["documents"].items())
    caught = manifest["mutated"] - manifest["mutated_passed"]
    print(
        f"{out}: {counts} documents of {manifest['problems']:,} problems in "
        f"{len(manifest['families'])} families; {manifest['dropped']:,} did not pass; of "
        f"{manifest['mutated']:,} with a fault {caught:,} were caught"
    )


main = cli.command(__doc__, "prepare synthetic_code", _run, add_flags=_add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
