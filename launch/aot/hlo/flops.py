"""FLOPs of matrix products, two per multiply-add, from the shapes of dots and convolutions.

TPU programs express dots as convolutions whose windows slide over padded and dilated operands. So only window taps
that read data are counted.
"""

import math
import re

from launch.aot.hlo.text import HloError, Instruction, Module

# Fields of a convolution's window and their defaults.
_WINDOW = {"size": "1", "stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}


def product_flops(module: Module, instruction: Instruction) -> int:
    """Returns the FLOPs of one execution of a dot or convolution; 0 for other instructions."""
    if instruction.opcode == "dot":
        return _dot(module, instruction)
    if instruction.opcode == "convolution":
        return _convolution(module, instruction)
    return 0


def _dot(module: Module, dot: Instruction) -> int:
    lhs = module.operand(dot, 0).array
    dims = re.findall(r"\d+", dot.attribute("lhs_contracting_dims") or "")
    return 2 * dot.array.size * math.prod(lhs.dims[int(dim)] for dim in dims)


def _convolution(module: Module, convolution: Instruction) -> int:
    labels = convolution.attribute("dim_labels")
    match = re.fullmatch(r"(\w+)_(\w+)->(\w+)", labels or "")
    if match is None:
        raise HloError(f"convolution {convolution.name} has dim_labels={labels!r}")
    lhs_labels, rhs_labels, out_labels = match.groups()
    lhs = dict(zip(lhs_labels, module.operand(convolution, 0).array.dims, strict=True))
    rhs = dict(zip(rhs_labels, module.operand(convolution, 1).array.dims, strict=True))
    out = dict(zip(out_labels, convolution.array.dims, strict=True))
    window = _window(convolution, sum(label.isdigit() for label in lhs_labels))
    # Window entries are in the order of the spatial digits.
    taps = math.prod(
        _taps(lhs[str(digit)], out[str(digit)], **entry) for digit, entry in enumerate(window)
    )
    batch_groups = int(convolution.attribute("batch_group_count") or 1)
    # rhs["i"] is already the input features of one feature group.
    return 2 * (lhs["b"] // batch_groups) * rhs["i"] * rhs["o"] * taps


def _window(convolution: Instruction, rank: int) -> list[dict[str, int]]:
    """Returns size, stride, lower padding and dilations of each spatial dimension."""
    text = (convolution.attribute("window") or "{}").strip("{}")
    fields = dict(item.split("=") for item in text.split())
    if fields.keys() - {*_WINDOW, "rhs_reversal"}:
        raise HloError(f"convolution {convolution.name} has window={text!r}")
    each = (
        fields[name].split("x") if name in fields else [default] * rank
        for name, default in _WINDOW.items()
    )
    names = [name.replace("pad", "low") for name in _WINDOW]
    # Padding is written as lower_upper.
    return [
        dict(zip(names, (int(value.split("_")[0]) for value in values), strict=True))
        for values in zip(*each, strict=True)
    ]


def _taps(
    lhs: int, out: int, *, size: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Returns the number of pairs (output position, window tap) that read data, not padding or a dilation hole."""
    last = (lhs - 1) * lhs_dilate
    count = 0
    for tap in range(size):
        shift = tap * rhs_dilate - low  # reads dilated position out * stride + shift
        if lhs_dilate == 1:
            first = max(0, -(shift // stride))
            count += max(0, min(out - 1, (last - shift) // stride) - first + 1)
        else:
            positions = range(shift, shift + out * stride, stride)
            count += sum(0 <= p <= last and p % lhs_dilate == 0 for p in positions)
    return count
