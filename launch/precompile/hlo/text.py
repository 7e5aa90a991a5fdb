"""Parses the text of a compiled XLA program into computations and instructions.

Only names, shapes with their memory space, operands and attributes are parsed.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    **{f"{kind}{bits}": bits for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    **{f"f{bits}": bits for bits in (16, 32, 64)},
    "bf16": 16,
    "c64": 64,
    "c128": 128,
}
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.$<>-]+)\s*\(.*\)\s*->\s*.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT\s+)?%?([\w.$<>-]+)\s+=\s+")
# One that another unit runs, such as a SparseCore, says so behind its bracket.
_END = re.compile(r'\}(, execution_thread="[^"]*")?')
_STRING = re.compile(r'"(?:\\.|[^"\\])*"')
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](?:\{([^{}]*)\})?")
_MARK = re.compile(r'"(?:\\.|[^"\\])*"|[()\[\]{},]')
_SPACE = re.compile(r"S\((\d+)\)")


class HloError(ValueError):
    """Raised if the program's text has a part that cannot be read or counted; ignoring it would give wrong numbers."""


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result; `space` 0 is the device's main memory (HBM)."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        if self.dtype not in _BITS and not self.dtype.startswith("f8"):
            raise HloError(f"unknown element type {self.dtype!r}")
        return (self.size * _BITS.get(self.dtype, 8) + 7) // 8


# A result is one array or a (nested) tuple of them.
Shape = Array | tuple["Shape", ...]


def leaves(shape: Shape) -> Iterator[Array]:
    """Yields all arrays of a shape."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from leaves(part)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation. `argument` is the text in its parentheses, `attributes` the text after them."""

    name: str
    opcode: str
    shape: Shape
    argument: str
    attributes: str
    computation: str

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Returns the names of the operands; empty for parameters and constants."""
        if self.opcode in ("parameter", "constant"):
            return ()
        parts = _split(_COMMENT.sub("", self.argument))
        return tuple(part.split()[-1].lstrip("%") for part in parts if part.strip())

    def attribute(self, name: str) -> str | None:
        """Returns the text of attribute `name`, brackets included; None if it is absent."""
        match = re.search(rf"(?:^|[\s,]){name}=", self.attributes)
        if match is None:
            return None
        rest = self.attributes[match.end() :]
        return _split(rest)[0].strip()

    def callees(self, *names: str) -> list[str]:
        """Returns the computations in the attributes `names`."""
        texts = [text for name in names if (text := self.attribute(name)) is not None]
        return [part.strip().lstrip("%") for text in texts for part in text.strip("{}").split(",")]

    @property
    def array(self) -> Array:
        """Returns the result; raises HloError if it is a tuple."""
        if not isinstance(self.shape, Array):
            raise HloError(f"{self.opcode} {self.name} has a tuple where one array is expected")
        return self.shape


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order; the last instruction marked ROOT computes the result."""

    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: Instruction | None = None

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        parameters = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(parameters, key=lambda i: int(i.argument))

    @functools.cached_property
    def result(self) -> Instruction:
        if self.root is None:
            raise HloError(f"computation {self.name} has no ROOT")
        return self.root


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: the same one runs on each of `num_partitions` chips."""

    computations: dict[str, Computation]
    entry: Computation
    num_partitions: int

    @functools.cached_property
    def fused(self) -> frozenset[str]:
        """The names of the computations that are bodies of fusions."""
        return frozenset(
            name
            for computation in self.computations.values()
            for instruction in computation.instructions.values()
            if instruction.opcode == "fusion"
            for name in instruction.callees("calls")
        )

    def operand(self, instruction: Instruction, index: int) -> Instruction:
        return self.computations[instruction.computation].instructions[instruction.operands[index]]


def parse(text: str) -> Module:
    """Returns the parsed text of a compiled program, `compiled.as_text()`.

    Raises:
      HloError: the text is not a compiled program.
    """
    computations: dict[str, Computation] = {}
    entry = current = None
    pending = ""
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = Computation(header[2])
                entry = current if header[1] else entry
            continue
        if not pending and _END.fullmatch(line.strip()):
            computations[current.name] = current
            current = None
            continue
        # Metadata of a kernel may span lines; an instruction ends where its brackets close.
        pending = f"{pending}\n{line}" if pending else line
        if _open_brackets(pending):
            continue
        _add(current, pending)
        pending = ""
    if current is not None or entry is None:
        where = f"computation {current.name} does not end" if current else "there is no ENTRY"
        raise HloError(f"not the text of a compiled XLA program: {where}")
    partitions = re.search(r"\bnum_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _open_brackets(text: str) -> bool:
    bare = _STRING.sub("", text)
    return any(bare.count(a) > bare.count(b) for a, b in ("()", "{}", "[]"))


def _add(computation: Computation, text: str) -> None:
    match = _INSTRUCTION.match(text)
    if match is None:
        if text.strip():
            raise HloError(f"cannot read in computation {computation.name}: {text.strip()[:120]}")
        return
    rest = text[match.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = _shape(rest[:end]), rest[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    instruction = Instruction(
        name=match[2],
        opcode=rest[:start],
        shape=shape,
        argument=rest[start + 1 : close],
        attributes=rest[close + 1 :].lstrip(", "),
        computation=computation.name,
    )
    computation.instructions[instruction.name] = instruction
    if match[1]:
        computation.root = instruction


def _shape(text: str) -> Shape:
    text = _COMMENT.sub("", text).strip()
    if text.startswith("("):
        return tuple(_shape(part) for part in _split(text[1:-1]) if part.strip())
    match = _ARRAY.match(text)
    if match is None:
        raise HloError(f"cannot read the shape {text[:80]!r}")
    dims = tuple(int(d.strip(" <=")) for d in match[2].split(",") if d.strip())
    space = _SPACE.search(match[3] or "")
    return Array(match[1], dims, int(space[1]) if space else 0)


def _depths(text: str, start: int = 0) -> Iterator[tuple[re.Match[str], int]]:
    """Yields brackets and commas outside strings, each with the number of open brackets after it."""
    depth = 0
    for match in _MARK.finditer(text, start):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        yield match, depth


def _closing(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the bracket at `start`."""
    for match, depth in _depths(text, start):
        if depth == 0:
            return match.start()
    raise HloError(f"unbalanced brackets in {text[:80]!r}")


def _split(text: str) -> list[str]:
    """Splits a text at commas outside brackets and strings."""
    commas = [m.start() for m, depth in _depths(text) if m[0] == "," and depth == 0]
    return [text[a + 1 : b] for a, b in itertools.pairwise([-1, *commas, len(text)])]
