"""The cost of a compiled train step on one chip: memory, FLOPs, communication.

All figures are per chip and per step. The compiler reports memory; FLOPs, collectives and traffic are
counted in the program's text with loop trip counts applied (launch/precompile/hlo), since XLA's cost analysis
counts a loop body once and hand-written kernels as nothing.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from espalier.launch.precompile.hlo import analysis
from espalier.launch.precompile.hlo.analysis import Kernel
from espalier.launch.precompile.hlo.collectives import Total
from espalier.launch.precompile.hlo.text import Array

# Part of an attention kernel's name -> number of matrix products of the size of queries x keys^T in it.
# Backward kernels recompute the logits.
_KERNEL_PRODUCTS = {"_dkv": 4, "_dq": 3, "_fwd": 2}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of main memory on one chip.

    Attributes:
      arguments: state and batch.
      temporaries: all other memory of the running program, packing slack included.
      outputs: the new state and metrics.
      aliased: outputs that reuse the memory of donated arguments.
      peak: the most memory in use at one time, arguments included; it must fit into the chip's memory.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    peak: int


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one step on one chip, two per multiply-add.

    Attributes:
      compiled: FLOPs of the program: `products` + `kernels`.
      products: FLOPs of its matrix products, recomputation included.
      kernels: FLOPs of its attention kernels and grouped products, computed from their shapes; of keys, only unmasked
        ones count, about half of all.
      analytic: FLOPs of the model: forward and backward without recomputation, causal attention too; None if they are
        not counted for this program.
    """

    compiled: float
    products: float
    kernels: float
    analytic: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """Costs of a program; only `memory` is known if the program does not fit."""

    memory: Memory
    fits: bool
    flops: Flops | None = None
    collectives: dict[str, Total] | None = None
    traffic: int | None = None
    unknown_kernels: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Returns plain values; the keys are a contract (docs/scale/precompile_report.md)."""
        values = dataclasses.asdict(self)
        return {
            "hbm_bytes": values["memory"],
            "fits": self.fits,
            "flops": values["flops"],
            "collectives": values["collectives"] or {},
            "hbm_traffic_bytes": self.traffic,
            "unknown_kernels": list(self.unknown_kernels),
        }


def measure(
    compiled: Any,
    *,
    model_flops: float | None,
    mean_keys: float,
    hbm_bytes: float,
    open_loops: int = 0,
) -> Report:
    """Returns the costs of a compiled program.

    Args:
      compiled: from `jax.jit(step).lower(...).compile()`.
      model_flops: analytic FLOPs of the step, divided by the number of chips; None if they are not counted.
      mean_keys: mean number of keys per query, over rows and layers.
      hbm_bytes: memory of a chip.
      open_loops: see launch/precompile/hlo/loops.py.

    Raises:
      HloError: the program has a part whose cost cannot be counted.
    """
    stats = compiled.memory_analysis()
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        peak=stats.peak_memory_in_bytes,
    )
    program = analysis.analyse(compiled.as_text(), open_loops=open_loops)
    per_call = {kernel: kernel_flops(kernel, mean_keys) for kernel in program.kernels}
    in_kernels = float(sum(kernel.count * each for kernel, each in per_call.items() if each))
    return Report(
        memory=memory,
        fits=memory.peak <= hbm_bytes,
        flops=Flops(
            compiled=program.flops + in_kernels,
            products=float(program.flops),
            kernels=in_kernels,
            analytic=model_flops,
        ),
        collectives=program.collectives,
        traffic=program.hbm_bytes,
        unknown_kernels=tuple(kernel.name for kernel, each in per_call.items() if each is None),
    )


def kernel_flops(kernel: Kernel, mean_keys: float) -> float | None:
    """Returns the FLOPs of one call of an attention kernel or a grouped product; None for kernels of another kind."""
    if kernel.name.startswith("ragged-dot"):
        return _grouped_flops(kernel)
    if kernel.name.startswith("tgmm"):
        return _transposed_flops(kernel)
    products = next((n for part, n in _KERNEL_PRODUCTS.items() if part in kernel.name), None)
    # The operands are integer tables of the mask first, then queries [..., T, H] and keys.
    queries = next((a for a in kernel.operands if _is_float(a) and len(a.dims) >= 3), None)
    if products is None or queries is None:
        return None
    return products * 2.0 * queries.size * mean_keys


def _grouped_flops(kernel: Kernel) -> float:
    """Returns the FLOPs of jax.lax.ragged_dot, rows [R, X] by kernels [E, X, Y], as if every row had an expert.

    A second kernel computes where the groups begin, without products.
    """
    floats = [array for array in kernel.operands if _is_float(array)]
    rows = next((array for array in floats if len(array.dims) == 2), None)
    kernels = next((array for array in floats if len(array.dims) == 3), None)
    if rows is None or kernels is None:
        return 0.0
    return 2.0 * rows.size * kernels.size / (kernels.dims[0] * rows.dims[1])


def _transposed_flops(kernel: Kernel) -> float | None:
    """Returns the FLOPs of megablox's transposed product, rows [X, R] or [R, X] by gradients [R, Y], as if every row had an expert."""
    matrices = [array for array in kernel.operands if _is_float(array) and len(array.dims) == 2]
    if len(matrices) != 2:
        return None
    rows, gradients = matrices
    return 2.0 * rows.size * gradients.dims[1]


def _is_float(array: Array) -> bool:
    return array.dtype.startswith(("bf", "f"))


_SIZE = r"([\d.]+)([KMGT]?)"
_OUT_OF_MEMORY = (
    # Both patterns match the memory in use, then the memory of a chip.
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
)


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Returns (bytes needed, bytes available) of a RESOURCE_EXHAUSTED; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _OUT_OF_MEMORY:
        match = re.search(pattern, message)
        if match:
            needed, needed_unit, available, available_unit = match.groups()
            return _bytes(needed, needed_unit), _bytes(available, available_unit)
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** " KMGT".index(unit or " "))


def table(report: Report, facts: Sequence[tuple[str, str]]) -> str:
    """Returns the report as text: `facts` first, one line each."""
    lines = [f"{name:<16}{value}" for name, value in facts]
    lines += ["", "memory of a chip"]
    lines += [
        f"  {name:<16}{amount(size, 'B'):>12}"
        for name, size in dataclasses.asdict(report.memory).items()
    ]
    lines.append(f"  {'fits':<16}{'yes' if report.fits else 'NO':>12}")
    if report.flops:
        lines += ["", "FLOPs of a chip"]
        lines += [
            f"  {name:<14}{amount(value, 'FLOP'):>14}"
            for name, value in dataclasses.asdict(report.flops).items()
            if value is not None
        ]
        if report.flops.analytic:
            ratio = report.flops.compiled / report.flops.analytic
            lines.append(f"  {'ratio':<16}{ratio:>12.3f}")
    if report.collectives:
        lines += ["", f"{'collectives':<30}{'count':>8}{'sent':>12}{'largest':>12}"]
        lines += [
            f"  {kind:<28}{total.count:>8}{amount(total.bytes, 'B'):>12}"
            f"{amount(total.largest, 'B'):>12}"
            for kind, total in report.collectives.items()
        ]
    if report.unknown_kernels:
        lines.append(f"FLOPs not counted of kernels {', '.join(report.unknown_kernels)}")
    return "\n".join(lines)


def amount(value: float, unit: str) -> str:
    """Returns `value` with a decimal prefix."""
    thousands = 0
    while abs(value) >= 1000 and thousands < 4:
        value, thousands = value / 1000, thousands + 1
    return f"{value:.{3 if thousands else 0}f} {' kMGT'[thousands].strip()}{unit}"
