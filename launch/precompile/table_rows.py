"""Full-size configurations of the papers that `precompile tables` compiles for absent TPUs.

Each paper lists its own as ROWS in a file of its folder. Llama 2 7B, which several papers use, is here, on each generation of
chips.
"""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Mapping
from typing import Any

from espalier.launch import cli

_LLAMA = ("t5x_configs/models/llama2_7b.gin", "t5x_configs/runs/pretrain.gin")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One program of a table.

    Attributes:
      name: unique among all papers.
      title: what is compiled, for a reader.
      files: gin files.
      topology: see launch/precompile/tpu_topology.py.
      bindings: 'NAME=VALUE'. Values of macros that only data need may be any.
      flags: further flags of `precompile`.
      note: a sentence for the page.
      fits: whether the program fits its chips; a row that is there because it does not has a note that says why.
      hbm_gb: the most memory of a chip, in GB (1e9 bytes); None without a bound.
      sent_gb: the most that a chip sends, in GB; None without a bound.
      bounds_from: where the bounds come from.
    """

    name: str
    title: str
    files: tuple[str, ...]
    topology: str
    bindings: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    note: str = ""
    fits: bool = True
    hbm_gb: float | None = None
    sent_gb: float | None = None
    bounds_from: str = ""

    @property
    def words(self) -> list[str]:
        """Arguments of `launch.precompile`."""
        files = [f"--gin_file={file}" for file in self.files]
        bindings = [f"--gin.{binding}" for binding in self.bindings]
        return [*files, f"--topology={self.topology}", *bindings, *self.flags]

    def digest(self, versions: dict[str, str]) -> str:
        """Returns a digest of the program's definition and of the compiler's versions.

        The definition is the final value of each binding, wherever the files have it, and the command's flags.
        """
        from espalier.launch.config import gin_check, moved

        checked = gin_check.check(self.files, self.bindings, fragment=True)
        values = {name: bound.meaning() for name, bound in checked.macros.items()}
        for (scope, target, argument), bound in checked.bindings.items():
            values[f"{scope}/{target}.{argument}"] = bound.meaning()
        definition = [values, self.topology, self.flags, versions]
        text = moved.as_before(json.dumps(definition, sort_keys=True, default=str))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def broken(self, report: Mapping[str, Any]) -> list[str]:
        """Returns what a report breaks of what the row states: whether it fits, and its bounds."""
        if report["fits"] != self.fits:
            return ["does not fit" if self.fits else "fits, but its row says that it does not"]
        sent = sum(total["bytes"] for total in (report["collectives"] or {}).values())
        figures = {"HBM": (report["hbm_bytes"]["peak"], self.hbm_gb), "sent": (sent, self.sent_gb)}
        return [
            f"{name}: {size / 1e9:.2f} GB of at most {bound:.2f} ({self.bounds_from})"
            for name, (size, bound) in figures.items()
            if bound is not None and size > bound * 1e9
        ]


def tokens(rows: int, length: int) -> tuple[str, str]:
    """Returns the bindings of a batch of rows of tokens."""
    return (f"BATCH_SIZE={rows}", f'TASK_FEATURE_LENGTHS={{"targets": {length}}}')


def mesh(rules: str, **sizes: int) -> tuple[str, str]:
    """Returns the bindings of a mesh and a rule set."""
    return (f"MESH={json.dumps(sizes)}", f"recipe.Recipe.rules='{rules}'")


# 6.74e9 parameters: weights are gathered twice in bfloat16, and gradients reduced once in float32.
_LLAMA_SENT_GB = 6.74 * (2 + 2 + 4)
_LLAMA_BOUNDS = "sent: 8 bytes for each of 6.74e9 parameters"


def _llama(topology: str, chips: int, *bindings: str, **stated: Any) -> Row:
    return Row(
        name=f"llama2_7b_{topology.replace(':', '_')}",
        title=f"Llama 2 7B, pre-training on {topology}",
        files=_LLAMA,
        topology=topology,
        bindings=(*tokens(chips, 2048), *bindings),
        sent_gb=_LLAMA_SENT_GB,
        **{"bounds_from": _LLAMA_BOUNDS, **stated},
    )


LLAMA_ROWS = (
    _llama(
        "v5e:4x4",
        16,
        hbm_gb=9.2,
        bounds_from=f"HBM: the goal of docs/benchmarks.md with jax 0.10.2; {_LLAMA_BOUNDS}",
    ),
    _llama("v4:2x2x4", 16),
    _llama("v5p:2x2x4", 16),
    _llama("v6e:4x4", 16),
    _llama("2xv5e:4x4", 32, *mesh("fsdp", data=2, fsdp=16), note="Slices are copies (`data`)."),
)


def rows() -> dict[str, tuple[Row, ...]]:
    """Returns the rows of each paper by its name, and Llama 2 7B's as 'llama'.

    Raises:
      ValueError: a name that two rows have.
    """
    tables: dict[str, tuple[Row, ...]] = {"llama": LLAMA_ROWS}
    for paper, module in cli.papers_with(r"^ROWS\b"):
        tables[paper] = importlib.import_module(module).ROWS
    names = [row.name for table in tables.values() for row in table]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"launch/papers/ has several rows named {sorted(twice)}.")
    return tables
