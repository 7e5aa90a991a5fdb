"""The paper's sizes: parameters that each method trains by formula, and the accuracies that it reports."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from espalier.launch.papers.shared import page

# Trainable parameters of each method on T5 1.1, by formula, at the paper's sizes. An encoder-decoder of L layers in each stack has
# 3 L attentions and 2 L MLPs; heads of width k fill the width d.


class Size(NamedTuple):
    """Sizes of a T5: layers L of each stack, width d, hidden width f of its MLPs, width k of a head, all parameters."""

    layers: int
    width: int
    hidden: int
    head: int
    parameters: float


SIZES = {
    "770M": Size(24, 1024, 2816, 64, 783.15e6),
    "3B": Size(24, 2048, 5120, 64, 2_849.76e6),
    "11B": Size(24, 4096, 10240, 64, 11_135.33e6),
}


def ia3(size: Size) -> int:
    """Returns the number of parameters of (IA)3: vectors at keys and values of each attention and hidden units of each MLP."""
    return 6 * size.layers * size.width + 2 * size.layers * size.hidden


def mov(size: Size, experts: int) -> int:
    """Returns the number of parameters of MoV: (IA)3 vectors of each expert, and routers that read a head or the hidden units."""
    return experts * (ia3(size) + 6 * size.layers * size.head + 2 * size.layers * size.hidden)


def lora(size: Size, rank: int) -> int:
    """Returns the number of parameters of LoRA at all four projections of attention and two of the MLP's three."""
    layers, width, hidden = size.layers, size.width, size.hidden
    return 24 * layers * width * rank + 4 * layers * (width + hidden) * rank


def molora(size: Size, experts: int, rank: int = 4) -> int:
    """Returns the number of parameters of MoLORA: LoRA factors of each expert, and routers that read the projections' inputs."""
    routers = 12 * size.layers * size.width + 2 * size.layers * (size.width + size.hidden)
    return experts * (lora(size, rank) + routers)


# Method as in the paper -> its parameters.
METHODS: dict[str, Callable[[Size], int]] = {
    "(IA)3": ia3,
    **{f"LoRA-{rank}": functools.partial(lora, rank=rank) for rank in (4, 8, 16)},
    **{f"MoV-{n}": functools.partial(mov, experts=n) for n in (10, 30, 60)},
    **{f"MoLORA-{n}": functools.partial(molora, experts=n) for n in (10, 15)},
}
# Per cent of the model's, as the paper reports them; those of MoV at 3B do not follow from the shapes.
REPORTED = {
    ("(IA)3", "3B"): 0.018,
    ("LoRA-4", "3B"): 0.3,
    ("LoRA-8", "3B"): 0.6,
    ("LoRA-16", "3B"): 1.2,
    ("MoV-10", "3B"): 0.32,
    ("MoV-30", "3B"): 0.68,
    ("MoV-60", "3B"): 1.22,
    ("MoLORA-10", "3B"): 3.18,
    ("MoLORA-15", "3B"): 4.69,
    ("MoV-60", "11B"): 0.86,
}


def per_cent(method: str, size: str) -> float:
    """Returns the parameters that a method trains, in per cent of the model's."""
    return 100 * METHODS[method](SIZES[size]) / SIZES[size].parameters


# The paper's mean accuracies over its unseen data sets in points, by size.
ACCURACIES = {
    "(IA)3": (51.12, 52.90, 59.12),
    "LoRA-4": (None, 57.51, None),
    "LoRA-16": (52.30, 59.54, None),
    "MoV-10": (51.57, 59.93, 62.29),
    "MoV-20": (51.89, None, None),
    "MoV-30": (51.22, 60.61, 62.22),
    "MoV-60": (None, 59.83, 64.08),
    "MoLORA-10": (55.52, 59.77, None),
    "MoLORA-15": (None, 60.79, None),
    "full tuning": (56.01, 60.06, 65.03),
}


def accuracy_table() -> list[str]:
    """Returns the table of the paper's accuracies by size."""
    cells = [
        (name, *("" if x is None else f"{x:.2f}" for x in values))
        for name, values in ACCURACIES.items()
    ]
    title = "Mean accuracy on unseen data sets in the paper, points"
    return page.table(("method", *SIZES), cells, title)


def parameter_table() -> list[str]:
    """Returns the table of trainable parameters at the paper's sizes."""
    cells = []
    for method in METHODS:
        shares = [f"{per_cent(method, size):.3g}" for size in SIZES]
        reported = [
            f"{value:g} ({size})" for (name, size), value in REPORTED.items() if name == method
        ]
        cells.append((method, *shares, ", ".join(reported)))
    header = ("method", *(f"T5 1.1, {size}" for size in SIZES), "the paper")
    title = "Trained parameters at full size, per cent of the model's, from its shapes"
    return page.table(header, cells, title)
