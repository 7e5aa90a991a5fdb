"""Weights from Hugging Face checkpoints and GGUF files into runs, and from runs to Hugging Face.

Example; the run it makes is taken by every command as --checkpoint, and by training as
INITIAL_CHECKPOINT_PATH:

  espalier convert --from_hf=/models/SmolLM2-135M --to=/tmp/smollm2
  espalier score --checkpoint=/tmp/smollm2 --inputs=/tmp/x.jsonl --output=/tmp/y.jsonl
  espalier convert --from=/tmp/smollm2 --to_hf=/tmp/smollm2_hf

  espalier convert --from_gguf=/models/SmolLM2.Q4_1.gguf --to=/tmp/smollm2_q4

A run with adapters (t5x_configs/methods/adapters/) becomes a directory with the adapters alone, which every command takes as
--checkpoint while the base model stays where it is:

  espalier convert --from=/tmp/lora --to_adapter=/tmp/lora_alone

Adapters are exchanged with Hugging Face's peft (LoRA, DoRA, (IA)3):

  espalier convert --from_peft=/models/my_lora --base=/tmp/smollm2 --to=/tmp/my_lora
  espalier convert --from=/tmp/lora --to_peft=/tmp/lora_peft

Weights go through memory a layer at a time. Tensors that are missing or that nothing explains are
errors, pickles are not read, and code that comes with a checkpoint is never run. A conversion that is
cut short leaves nothing at its target.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from espalier.common.storage import mirror
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.load import load_run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Settings of a Hugging Face checkpoint to be written.

    Attributes:
      family: model_type (default: the family of the imported checkpoint, or the first that fits the model).
      shard_size: maximum data in a file, such as 500MB (default 5GB).
      params: the trained parameters (raw), their moving average (ema), or the average if there is one (auto, the default).
      gin_file: configuration of a step directory without a config.gin; repeatable.
    """

    family: str | None = None
    shard_size: str | None = None
    params: Literal["auto", "raw", "ema"] | None = None
    gin_file: Sequence[str] | None = None


def _add_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--from_hf",
        metavar="DIR",
        help="convert this folder of a Hugging Face model: config.json and safetensors",
    )
    source.add_argument(
        "--from_gguf", metavar="FILE", help="convert this GGUF file of a Llama-like model"
    )
    source.add_argument(
        "--from_peft",
        metavar="DIR",
        help="convert these adapters of peft: adapter_config.json and safetensors",
    )
    source.add_argument(
        "--from",
        dest="checkpoint",
        metavar="DIR",
        help="convert this run directory (its newest step) or step directory",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--to", metavar="DIR", help="write a run directory here")
    target.add_argument("--to_hf", metavar="DIR", help="write a Hugging Face checkpoint here")
    target.add_argument(
        "--to_adapter", metavar="DIR", help="write a run directory with only the adapters here"
    )
    target.add_argument("--to_peft", metavar="DIR", help="write adapters for peft here")
    parser.add_argument(
        "--base",
        metavar="DIR",
        help="run or step directory of the base model (default: the checkpoint that the run started from)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the written weights (default: the dtype of the source; float32 for GGUF)",
    )
    setting_flags.add(parser.add_argument_group("for --to_hf"), ExportFlags)


def _run(flags: argparse.Namespace) -> None:
    if (flags.checkpoint is None) != (flags.to is not None):
        raise ValueError(
            "--from goes with --to_hf, --to_adapter and --to_peft, --from_hf, --from_gguf and --from_peft with --to."
        )
    if (flags.base is not None) and not (flags.to_adapter or flags.from_peft):
        raise ValueError("--base is for --to_adapter and --from_peft: remove it.")
    export = setting_flags.given(flags, ExportFlags)
    if flags.to_hf is not None:
        _export(flags, export)
        return
    if flags.to_adapter is not None or flags.to_peft is not None:
        _export_adapters(flags, export)
        return
    for name in export:
        raise ValueError(f"--{name} is for --to_hf: remove it.")
    if flags.from_peft is not None:
        _import_adapters(flags)
        return
    from espalier.launch.convert import exchange

    convert, origin = exchange.import_hf, flags.from_hf
    if flags.from_gguf is not None:
        convert, origin = exchange.import_gguf, flags.from_gguf
    print(f"{flags.to}: {convert(mirror.local(origin), flags.to, dtype=flags.dtype)}")


def _import_adapters(flags: argparse.Namespace) -> None:
    from espalier.launch.convert import adapter_run

    if flags.base is None:
        raise ValueError(
            "--from_peft needs the run of the base model: --base=RUN, made by --from_hf."
        )
    if flags.dtype is not None:
        raise ValueError("--dtype is for whole models: remove it.")
    print(f"{flags.to}: {adapter_run.import_peft(flags.from_peft, flags.to, flags.base)}")


def _export(flags: argparse.Namespace, settings: dict[str, Any]) -> None:
    from espalier.launch.convert import exchange

    shard_bytes = setting_flags.size(settings.pop("shard_size", "5GB"), "shard_size")
    config = load_run.config_of(flags.checkpoint, settings.pop("gin_file", ()))
    settings |= {"dtype": flags.dtype, "shard_bytes": shard_bytes}
    weights = exchange.export_hf(flags.checkpoint, config.model, flags.to_hf, **settings)
    print(f"{flags.to_hf}: {weights}")


def _export_adapters(flags: argparse.Namespace, settings: dict[str, Any]) -> None:
    from espalier.launch.convert import adapter_run

    params = settings.pop("params", "auto")
    config = load_run.config_of(flags.checkpoint, settings.pop("gin_file", ()))
    for name in [*settings, *(["dtype"] if flags.dtype else [])]:
        raise ValueError(f"--{name} is for --to_hf: remove it.")
    source, model = flags.checkpoint, config.model
    if flags.to_peft is not None:
        print(
            f"{flags.to_peft}: {adapter_run.export_peft(source, model, flags.to_peft, params=params)}"
        )
        return
    adapters = adapter_run.export(source, model, flags.to_adapter, base=flags.base, params=params)
    print(f"{flags.to_adapter}: {adapters}")


_USAGE = """\
%(prog)s (--from_hf=DIR | --from_gguf=FILE) --to=DIR [flags]
       %(prog)s --from=DIR --to_hf=DIR [flags]
       %(prog)s --from=DIR (--to_adapter=DIR [--base=DIR] | --to_peft=DIR)
       %(prog)s --from_peft=DIR --base=DIR --to=DIR"""
main = cli.command(__doc__, "convert", _run, add_flags=_add_flags, usage=_USAGE, huge_pages=False)

if __name__ == "__main__":
    raise SystemExit(main())
