"""Writes verified synthetic code: Python problems with solutions and tests, each run in a sandbox.

Example: 2,000 documents, well under a minute:

  python -m launch.prepare synthetic_code --out=/tmp/synth --num_documents=2000 --seed=1

writes train.jsonl and validation.jsonl, rows {"id", "text"}, and manifest.json, which counts what was
kept and dropped. Runs take the files as any others (t5x_configs/data/files.gin), or make the same
documents by themselves (t5x_configs/data/synthetic_code.gin).
"""

import argparse
import json
import pathlib
import shutil
from collections.abc import Sequence

from launch import cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    summary, _, rest = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m launch.prepare synthetic_code",
        description=summary,
        epilog=rest.strip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument(
        "--num_documents", type=int, default=5000, metavar="N", help="of both splits (default 5000)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--variants",
        type=int,
        default=3,
        metavar="N",
        help="documents of one problem at most, other in names, layout and tests (default 3)",
    )
    parser.add_argument(
        "--mutated_share",
        type=float,
        default=0.05,
        metavar="X",
        help="of what is drawn, solutions with a fault, to measure the filter; not written "
        "(default 0.05)",
    )
    parser.add_argument(
        "--validation_fraction", type=float, default=0.05, metavar="X", help="(default 0.05)"
    )
    flags = parser.parse_args(argv)

    def call() -> None:
        from data.code_mix import synthetic_code

        settings = {name: value for name, value in vars(flags).items() if name != "out"}
        folder = synthetic_code.build(**settings)
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

    return cli.status_of(call)


if __name__ == "__main__":
    raise SystemExit(main())
