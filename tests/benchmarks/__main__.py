"""Measures speed, memory and start-up, side by side with reference implementations.

Example, from a checkout, about a minute; figures and the environment go to standard output and to a file as JSON:

  python -m tests.benchmarks data_pipeline --out=/tmp/data_pipeline.json

Benchmarks that compare alternate both sides in one run and report the median of pair ratios with a 95 %
interval. Benchmarks against PyTorch (train_step, moe_step, qwen3_moe_step, adapters, t5, dpo, sft, serve, cold_start, hf_import,
first_token, influence, merge) need `make peers` first, and lm_eval needs `make peers-lm-eval`. accelerator needs a
GPU or a TPU, and measures PyTorch beside it if `make peers` installed it with CUDA.
"""

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Sequence

from espalier.launch import cli
from tests.benchmarks import compare

PROGRAM = "python -m tests.benchmarks"
# What --tiny passes to a benchmark, of what its `run` takes.
FEWEST = {
    **{"tiny": True, "rounds": 1, "steps": 2, "repeats": 2, "kills": 1, "million_tokens": 4},
    **{"many_rounds": 1, "documents": 8, "many_documents": 16, "prompts": 2, "new_tokens": 8},
    **{"tokens": 256},
}
BENCHMARKS = cli.modules_with("tests.benchmarks", r"^def run\(\s*\*,")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    texts = {name: cli.summary(f"tests.benchmarks.{name}") for name in BENCHMARKS}
    width = max(map(len, texts)) + 1
    listing = "\n".join(f"  {name:<{width}}{text}" for name, text in texts.items())
    parser = cli.make_parser(f"{__doc__}\nbenchmarks:\n{listing}", PROGRAM)
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK")
    parser.add_argument("--out", metavar="FILE", help="also writes the JSON here")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tries the benchmark: the fewest measurements, of tiny sizes where it has them; its figures say nothing",
    )
    flags = parser.parse_args(argv)

    def call() -> None:
        with cli.prepared(PROGRAM, own=argv is None):
            _measure(flags)

    try:
        return cli.status_of(call)
    except (argparse.ArgumentError, compare.PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return cli.USAGE_ERROR


def _measure(flags: argparse.Namespace) -> None:
    from espalier.launch.inference import row_files

    if flags.out:
        row_files.check_output(flags.out, "out")
    module = importlib.import_module(f"tests.benchmarks.{flags.benchmark}")
    asked = {}
    if flags.tiny:
        known = inspect.signature(module.run).parameters
        asked = {name: value for name, value in FEWEST.items() if name in known}
        if not asked:
            raise argparse.ArgumentError(
                None, f"Benchmark {flags.benchmark!r} has no tiny sizes: remove --tiny."
            )
    machine = compare.environment()
    result = {
        "benchmark": flags.benchmark,
        "command": " ".join(sys.orig_argv[1:]),
        "figures": module.run(**asked),
        "environment": machine,
    }
    print(json.dumps(result, indent=1))
    if flags.out:
        row_files.write_json(flags.out, result)


if __name__ == "__main__":
    raise SystemExit(main())
