"""Measures speed, memory and start-up, side by side with reference implementations.

Example, about a minute; figures and the environment go to standard output and to a file as JSON:

  python -m launch.bench data_pipeline --out=/tmp/data_pipeline.json

Benchmarks that compare alternate both sides in one run and report the median of pair ratios with a 95 %
interval. Those against PyTorch (train_step, moe_step, dpo, cold_start, hf_import) need `make peers` first, and lm_eval
needs `make peers-lm-eval`.
"""

import argparse
import importlib
import json
import pathlib
import sys
from collections.abc import Sequence

from launch import cli

BENCHMARKS = {
    "train_step": "tokens/s of a training step against transformers, eager and compiled",
    "cold_start": "process start to first loss, cold and with a warm compilation cache",
    "low_rank_step": "a step of 1,024-wide blocks in factors against the dense step",
    "moe_step": "a step of a small Mixtral, 8 and 64 experts, against transformers",
    "moe_dense": "a layer of experts against a dense MLP of equal active FLOPs",
    "dpo": "a step of DPO against TRL with a cached reference, its memory, and how soon a second run begins",
    "online_dpo": "the share of online DPO's time that the policy spends generating samples",
    "loss_memory": "peak memory of the loss with 256,000 tokens",
    "data_pipeline": "packed tokens/s on one core, and a batch at step 10^9",
    "checkpoints": "cost of a save every ten updates",
    "hf_import": "reading a 1B-parameter checkpoint against transformers, and converting it",
    "decode": "tokens/s of greedy generation against transformers, batches of 1 and 8",
    "cache_policies": "snapkv against the full cache at 16,384 tokens, and against kvpress",
    "lm_eval": "requests/s of lm-evaluation-harness against its Hugging Face backend",
    "start_up": "--help and imports",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    listing = "\n".join(f"  {name:<15}{text}" for name, text in BENCHMARKS.items())
    doc = f"{__doc__}\nbenchmarks:\n{listing}"
    return cli.run_command(doc, "bench", _measure, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=list(BENCHMARKS), metavar="BENCHMARK")
    parser.add_argument("--out", metavar="FILE", help="also writes the JSON here")


def _measure(flags: argparse.Namespace) -> None:
    from launch.benchmarks import compare

    machine = compare.environment()
    module = importlib.import_module(f"launch.benchmarks.{flags.benchmark}")
    result = {
        "benchmark": flags.benchmark,
        "command": " ".join(sys.orig_argv[1:]),
        "figures": module.run(),
        "environment": machine,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if flags.out:
        pathlib.Path(flags.out).write_text(text + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
