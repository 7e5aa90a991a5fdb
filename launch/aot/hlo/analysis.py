"""Analyses the cost of a compiled program per execution and chip, from its text."""

import collections
import dataclasses

from launch.aot.hlo import collectives, flops, loops, text, traffic


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Executions of one hand-written (Pallas) kernel, loop trips included; XLA does not know its FLOPs."""

    name: str
    count: int
    operands: tuple[text.Array, ...]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Costs of one execution on one chip.

    Attributes:
      flops: FLOPs of matrix products, with loop trip counts applied; kernels excluded.
      collectives: totals by kind.
      hbm_bytes: estimated traffic to and from main memory.
    """

    flops: int
    kernels: tuple[Kernel, ...]
    collectives: dict[str, collectives.Total]
    hbm_bytes: int


def analyse(program: str, *, open_loops: int = 0) -> Analysis:
    """Returns the costs of a program from its text, `compiled.as_text()`.

    Args:
      program: the text.
      open_loops: see `loops.executions`.

    Raises:
      HloError: the text, a loop or a collective cannot be understood.
    """
    module = text.parse(program)
    executions = loops.executions(module, open_loops=open_loops)
    products = 0
    kernels: collections.Counter = collections.Counter()
    for name, computation in module.computations.items():
        for instruction in computation.instructions.values():
            products += executions[name] * flops.product_flops(module, instruction)
            if instruction.attribute("custom_call_target") == '"tpu_custom_call"':
                operands = [
                    module.operand(instruction, i) for i in range(len(instruction.operands))
                ]
                arrays = tuple(leaf for o in operands for leaf in text.leaves(o.shape))
                kernels[_kernel_name(instruction.name), arrays] += executions[name]
    return Analysis(
        flops=products,
        kernels=tuple(
            Kernel(name, count, arrays)
            for (name, arrays), count in sorted(kernels.items(), key=lambda item: item[0][0])
        ),
        collectives=collectives.totals(module, executions),
        hbm_bytes=traffic.hbm_bytes(module, executions),
    )


def _kernel_name(instruction: str) -> str:
    """Returns an instruction's name without the numbers that make it unique."""
    return instruction.rstrip("0123456789.").removesuffix(".clone")
