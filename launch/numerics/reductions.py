"""The sums across chips of a compiled train step, and the parameter that each of them is the gradient of.

A new parameter is followed backwards through the program: through arithmetic, loops, fusions, moves of data and the sums across
chips, of which there may be several in turn, up to the product that computes the gradient on one chip. Scalars, such as the norm of all gradients, are
not followed, so that no parameter leads to the sums of another. Sums that no parameter leads to are those of losses and norms
(all scalars) or of activations.
"""

import collections
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence

from espalier.launch.precompile.hlo.analysis import FREE_TARGETS
from espalier.launch.precompile.hlo.collectives import group_size, kind_of
from espalier.launch.precompile.hlo.text import Array, Instruction, Module, Shape, leaves

RING = "ring of permutations"
SCALARS, ACTIVATIONS = "losses and norms", "activations"
# Bits of a significand, the leading one included: rounding to nearest errs by at most 2^-bits of the value.
_SIGNIFICANDS = {"bf16": 8, "f16": 11, "f32": 24, "f64": 53}
# What computes a gradient from other arrays: nothing is followed further.
_SOURCES = (
    *("constant", "convolution", "custom-call", "dot", "gather", "iota", "partition-id", "recv"),
    *("reduce", "reduce-window", "rng-bit-generator", "select-and-scatter", "sort"),
)


@dataclasses.dataclass(frozen=True)
class Reduction:
    """A sum across chips.

    Attributes:
      of: path of the parameter whose gradient is summed, SCALARS or ACTIVATIONS with the place in the model.
      dtype: of what the chips send, in XLA's words: bf16, f32.
      shape: of the array that is summed.
      terms: number of chips whose arrays are added to one sum.
      algorithm: all-reduce, reduce-scatter, or RING: partial sums go from chip to chip, and each adds its own product.
      combined: what else one collective sums, itself included, by name.
      backend: the compiler's own words on the algorithm, of the instruction's backend_config.
      groups: which chips add to one sum, in XLA's words; two sums of a gradient in turn have different groups.
    """

    of: str
    dtype: str
    shape: tuple[int, ...]
    terms: int
    algorithm: str
    combined: tuple[str, ...] = ()
    backend: str = ""
    groups: str = ""

    @property
    def bound(self) -> float:
        """The most that the sum errs, in any order, as a multiple of the sum of the terms' absolute values."""
        return error_bound(self.terms, unit_roundoff(self.dtype))


def unit_roundoff(dtype: str) -> float:
    """Returns the largest relative error of rounding to nearest in a dtype such as bf16."""
    return 2.0 ** -_SIGNIFICANDS[dtype]


def error_bound(terms: int, roundoff: float) -> float:
    """Returns (n - 1) u for n terms and unit roundoff u.

    A sum of n floats that are added in any order, each time rounded to nearest, errs by at most this multiple of the sum of their
    absolute values (Lange and Rump, BIT Numerical Mathematics 57, 2017), without overflow.
    """
    return (terms - 1) * roundoff


def read(module: Module, outputs: Mapping[int, str]) -> list[Reduction]:
    """Returns the sums across chips of a program.

    Args:
      module: a compiled program.
      outputs: paths of parameters by the index of a result of the program that is the new parameter, or a moment of it.

    Raises:
      HloError: the group of chips of a collective cannot be read.
    """
    program = _Program(module)
    names: dict[tuple[str, str, int], set[str]] = collections.defaultdict(set)
    for index, path in outputs.items():
        for found in program.sums_of(index):
            names[found].add(path)
    # A sum of several parameters' gradients, as of a table that is used twice, has all their names.
    groups: dict[object, list[Reduction]] = {}
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            at = (computation.name, instruction.name)
            if (one := program.ring(instruction)) and (of := names.get((*at, 0))):
                groups[at] = [Reduction(" + ".join(sorted(of)), *one, RING)]
            if not program.is_sum(instruction):
                continue
            terms = group_size(instruction, module.num_partitions)
            if terms > 1:
                parts = enumerate(program.operand_arrays(instruction))
                opcode = instruction.opcode.removesuffix("-start")
                group = [
                    Reduction(
                        of=" + ".join(sorted(names.get((*at, i), ())))
                        or _other(instruction, array),
                        dtype=array.dtype,
                        shape=array.dims,
                        terms=terms,
                        algorithm=kind_of(opcode, computation.name),
                        backend=program.backend(instruction),
                        groups=instruction.attribute("replica_groups") or "",
                    )
                    for i, array in parts
                    if array.dtype in _SIGNIFICANDS
                ]
                # The compiler repeats an asynchronous collective in fusions, and the results lead to one of them. Outside of
                # fusions a channel tells nothing: all collectives that JAX's functions name share one.
                channel = instruction.attribute("channel_id")
                key = at if channel is None or computation.name not in module.fused else channel
                if key not in groups or any((*at, i) in names for i in range(len(group))):
                    groups[key] = group
    # One entry for each ring: the permutations of a parameter's ring have the same facts.
    distinct: dict[Reduction, None] = {}
    for group in groups.values():
        combined = tuple(sorted({one.of for one in group}))
        distinct |= dict.fromkeys(dataclasses.replace(one, combined=combined) for one in group)
    return sorted(distinct, key=lambda one: (one.of, one.algorithm, one.dtype, one.shape))


def _other(instruction: Instruction, array: Array) -> str:
    """Returns what a sum is that no parameter leads to."""
    if array.size == 1:
        return SCALARS
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    parts = (name[1] if name else "").split("/")
    # Words of tracing, such as jit(step) or while, are no place in the model.
    place = [p for p in parts[:-1] if re.fullmatch(r"[a-z_]\w*", p)]
    place = [p for p in place if p not in ("while", "body", "closed_call", "cond", "branch")]
    return " ".join([ACTIVATIONS, *(["/".join(place)] if place else [])])


class _Program:
    """A module with what calls each computation."""

    def __init__(self, module: Module):
        self.module = module
        self.callers: dict[str, list[Instruction]] = collections.defaultdict(list)
        for computation in module.computations.values():
            for instruction in computation.instructions.values():
                for callee in _callees(instruction):
                    self.callers[callee].append(instruction)

    def is_sum(self, instruction: Instruction) -> bool:
        """Whether an instruction adds arrays of several chips."""
        if instruction.opcode.removesuffix("-start") not in ("all-reduce", "reduce-scatter"):
            return False
        (reducer,) = instruction.callees("to_apply")
        return self.module.computations[reducer].result.opcode == "add"

    def operand_arrays(self, instruction: Instruction) -> Iterator[Array]:
        for i in range(len(instruction.operands)):
            yield from leaves(self.module.operand(instruction, i).shape)

    def backend(self, instruction: Instruction) -> str:
        """Returns emitter, strategy and the details of a collective; of one inside a fusion, the fusion's."""
        for one in (instruction, *self.callers[instruction.computation]):
            text = one.attribute("backend_config")
            config = json.loads(text) if text else {}
            fields = config.get("collective_algorithm_config") if isinstance(config, dict) else None
            if isinstance(fields, dict):
                words = [
                    str(value)
                    for key in ("emitter", "strategy", "debug")
                    if (value := fields.get(key))
                ]
                return " ".join(" ".join(words).split())
        return ""

    def ring(self, instruction: Instruction) -> tuple[str, tuple[int, ...], int] | None:
        """Returns dtype, shape and number of chips of a permutation."""
        if instruction.opcode.removesuffix("-start") != "collective-permute":
            return None
        array = next(self.operand_arrays(instruction))
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attribute("source_target_pairs") or "")
        following, chip, seen = dict(pairs), pairs[0][0] if pairs else "", set[str]()
        while chip not in seen:
            seen.add(chip)
            chip = following.get(chip, chip)
        return (array.dtype, array.dims, len(seen)) if array.dtype in _SIGNIFICANDS else None

    def sums_of(self, index: int) -> set[tuple[str, str, int]]:
        """Returns (computation, instruction, operand) of the sums that lead to a result of the program."""
        root = self.module.entry.result
        path = (index,) if isinstance(root.shape, tuple) else ()
        sums: set[tuple[str, str, int]] = set()
        permutations: set[Instruction] = set()
        self._walk(root, path, sums, permutations)
        for one in permutations:
            below: set[Instruction] = set()
            # A permutation that only moves a finished sum leads to no product.
            if self._walk(self.module.operand(one, 0), (), None, below):
                sums.add((one.computation, one.name, 0))
        return sums

    def _walk(
        self,
        start: Instruction,
        path: tuple[int, ...],
        sums: set[tuple[str, str, int]] | None,
        permutations: set[Instruction],
    ) -> bool:
        """Adds the sums and permutations that lead to a part of an instruction's result; whether a product leads to it.

        With None for `sums` it ends at sums.
        """
        seen: set[tuple[str, str, tuple[int, ...]]] = set()
        waiting, products = [(start, path)], False
        while waiting:
            one, path = waiting.pop()
            if (key := (one.computation, one.name, path)) in seen or _is_scalar(one.shape, path):
                continue
            seen.add(key)
            opcode = one.opcode.removesuffix("-start").removesuffix("-done")
            if self.is_sum(one):
                last = path[-1] if path and len(one.operands) > 1 else 0
                if sums is not None:
                    sums.add((one.computation, one.name, last))
                    waiting.append((self.module.operand(one, last), ()))
            elif opcode in _SOURCES and not _is_free(one):
                products |= opcode in ("dot", "convolution", "reduce", "custom-call")
            else:
                if opcode == "collective-permute" and one.opcode != "collective-permute-done":
                    permutations.add(one)
                waiting += self._before(one, opcode, path)
        return products

    def _before(
        self, one: Instruction, opcode: str, path: tuple[int, ...]
    ) -> Iterator[tuple[Instruction, tuple[int, ...]]]:
        """Yields the instructions, and the parts of their results, that a part of an instruction's result is made of."""
        module = self.module
        operand = functools.partial(module.operand, one)
        roots = [module.computations[name].result for name in _callees(one)]
        if opcode == "parameter":
            number = int(one.argument)
            for caller in self.callers[one.computation]:
                if caller.opcode == "while":
                    yield module.operand(caller, 0), path
                    yield module.computations[_callees(caller)[0]].result, path
                elif caller.opcode == "conditional":
                    place = _callees(caller).index(one.computation)
                    yield module.operand(caller, place + 1), path
                else:
                    yield module.operand(caller, number), path
        elif opcode == "get-tuple-element":
            yield operand(0), (int(one.attribute("index") or 0), *path)
        elif opcode == "tuple":
            parts = range(len(one.operands)) if not path else path[:1]
            for i in parts:
                yield operand(i), path[1:]
        elif one.opcode.endswith("-done"):
            # The beginning of an asynchronous instruction has its operands, its results and its state.
            yield operand(0), path
        elif roots:
            for root in roots:
                yield root, path
            if opcode == "while":
                yield operand(0), path
        elif opcode in ("opt-barrier", "async-update", "domain"):
            yield operand(0), path
        else:
            used = {
                "dynamic-slice": 1,
                "dynamic-update-slice": 2,
                "copy": 1,
                "collective-permute": 1,
                "scatter": 1,  # what it adds to, such as the gradient of an output layer that is tied to the table
            }
            for i in range(len(one.operands))[: used.get(opcode)]:
                yield operand(i), path if opcode == "add-dependency" and i == 0 else ()


def _is_free(one: Instruction) -> bool:
    """Whether a call into the compiler's own code only passes arrays on."""
    return (one.attribute("custom_call_target") or "").strip('"') in FREE_TARGETS


def _callees(one: Instruction) -> list[str]:
    """Returns the computations whose results an instruction has."""
    if one.opcode == "call":
        return one.callees("to_apply")
    return one.callees(
        *("calls", "body", "branch_computations", "true_computation", "false_computation")
    )


def _is_scalar(shape: Shape, path: Sequence[int]) -> bool:
    for index in path:
        if isinstance(shape, Array) or index >= len(shape):
            break
        shape = shape[index]
    return isinstance(shape, Array) and shape.size == 1
