"""The common parts of the commands `espalier upcycle`, `espalier upcycle extend` and `espalier upcycle factorise`."""

import argparse
import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.load import load_run

Params = Literal["auto", "raw", "ema"]
METHOD_FILES = "t5x_configs/methods"  # folder of the methods' gin files


class Method:
    """A value of `espalier upcycle --method`: which parameters become experts, and behind which routers.

    Attributes:
      options: the command's flags, a launch.upcycle.upcycle.UpcycleFlags.
      ffn: whether FFNs become experts.
      flags: names of flags that no other method reads.
    """

    ffn: ClassVar[bool] = True
    flags: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Any):
        self.options = options

    @property
    def mixes_attention(self) -> bool:
        """Whether attentions become experts too."""
        return False

    @property
    def router_kind(self) -> str:
        """The kind of the routers, as a flag names it."""
        return "linear"

    @property
    def files(self) -> list[str]:
        """The gin files that configure the mixture's layers."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises TransformError for flags that do not go together."""

    def attention(self, kv_heads: int) -> Any:
        """Returns how attentions become experts (model/bam/moa.py); None if they do not."""
        from espalier.model.bam.moa import AttentionExperts

        if not self.mixes_attention:
            return None
        shared, averaged = self.options.shared_kv, self.options.average_attention
        return AttentionExperts(kv_heads=kv_heads, shared_kv=shared, averaged=averaged)

    def routers(self, experts: Sequence[str], record: Mapping[str, Any]) -> Any:
        """Returns the routers (model/transforms/experts.py) of these experts, with the settings that are recorded."""
        from espalier.model.transforms.experts import LinearRouters

        del experts
        return LinearRouters(std=record["router_std"])

    def record(self, experts: Sequence[str]) -> dict[str, Any]:
        """Returns what a mixture of these experts records of the method, besides what all methods record."""
        del experts
        return {}

    def settings(self, experts: int) -> dict[str, Any]:
        """Returns values of the macros of `files`."""
        options = self.options
        values = {
            "EXPERTS": experts,
            "TOP_K": 1 if options.top_k is None else options.top_k,
            "RENORMALISE": options.renormalise,
        }
        if self.mixes_attention:
            values |= {"SHARED_KV": options.shared_kv, "ATTENTION_TOP_K": options.attention_top_k}
        return values


def split(expert: str) -> tuple[str | None, str]:
    """Returns name and directory of `NAME=DIR`, or (None, DIR) without a name."""
    name, equals, path = expert.partition("=")
    return (name, path) if equals and name and os.sep not in name else (None, expert)


def add(group: Any, target: Any, *, but: Sequence[str]) -> None:
    """Adds a flag for each field of a dataclass, except those in `but`."""
    names = [field.name for field in dataclasses.fields(target) if field.name not in but]
    setting_flags.add(group, target, names=names)


def parsed(flags: argparse.Namespace, target: Any) -> Any:
    """Returns the flags as a checked dataclass of this module.

    Raises:
      TransformError: see the dataclass's `check`.
    """
    values = setting_flags.given(flags, target)
    result = target(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    result.check()
    return result


def main(doc: str, command: str, work: str, add_flags: Any) -> int:
    """Runs `espalier upcycle` or a sub-command, and returns the exit status.

    Args:
      doc: help text.
      command: name of the command, such as "upcycle extend".
      work: MODULE:FUNCTION, imported after the flags are parsed, and called with the source's configuration and the flags.
      add_flags: adds the flags to a parser.
    """

    def flags_of(parser: argparse.ArgumentParser) -> None:
        add_flags(parser)
        load_run.add_trust_flag(parser)

    def files(flags: argparse.Namespace) -> Sequence[str]:
        """Returns the gin files of the source run: of the first expert, the mixture or the model."""
        first = flags.experts[0] if hasattr(flags, "experts") else getattr(flags, "moe", None)
        checkpoint = flags.checkpoint if first is None else split(first)[1]
        return load_run.files_of(checkpoint, flags.gin_file)

    def run(start: cli.Start) -> None:
        module, _, function = work.partition(":")
        getattr(importlib.import_module(module), function)(start(), start.flags)

    return load_run.command(doc, command, run, flags_of, files=files)(None)
