"""The needle grid: which haystacks, policies and capacities, a stage for each haystack."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from launch.papers.shared.stages import Stages
from launch.papers.snapkv import needles
from launch.papers.snapkv.methods import Method, kernels, methods
from launch.run.load_run import LoadedRun

WINDOW = 32
KERNEL = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Haystacks of one length.

    Attributes:
      tokens: the length they are padded to.
      haystacks: how many of them; each has five needles.
      fifth: capacity at which all methods are compared, a fifth of the length.
      others: further capacities of a few methods.
    """

    tokens: int
    haystacks: int
    fifth: int
    others: Sequence[int] = ()


GRIDS = (
    Grid(tokens=1024, haystacks=8, fifth=192, others=(96, 384)),
    Grid(tokens=2048, haystacks=4, fifth=384, others=(1024,)),
)
_CURVES = ("snapkv", "h2o", "streaming_llm", "random")


def cases(grid: Grid) -> list[tuple[str, Method, int]]:
    """(name, method, capacity) to measure."""
    known = {
        **methods(window=WINDOW, kernel=KERNEL),
        **kernels(window=WINDOW, sizes=(1, 3)),
    }
    del known["snapkv_int8"]
    at_fifth = [(name, method, grid.fifth) for name, method in known.items()]
    return at_fifth + [(name, known[name], c) for c in grid.others for name in _CURVES]


def measure(
    run: LoadedRun, stages: Stages, grids: Sequence[Grid] = GRIDS, *, seed: int = 0
) -> list[Mapping[str, Any]]:
    """Results of all haystacks, in order; each also says its `tokens`."""
    reader, lines = needles.Reader(run), needles.paragraphs()
    plan = [(grid, i) for grid in grids for i in range(grid.haystacks)]
    found = []
    for grid, i in tqdm(plan, desc="needles", unit="haystack"):
        rng = np.random.default_rng((seed, grid.tokens, i))
        snapkv = methods(window=WINDOW, kernel=KERNEL)["snapkv"]

        def one(grid: Grid = grid, rng: Any = rng, snapkv: Method = snapkv) -> dict[str, Any]:
            room = needles.SUFFIX  # what the template puts before the haystack
            hay = needles.haystack(rng, lines, reader.count, grid.tokens - room)
            return needles.measure(
                reader, hay, grid.tokens, cases(grid), unseen=(snapkv, grid.fifth)
            )

        settings = {
            "seed": seed,
            "tokens": grid.tokens,
            "haystack": i,
            "cases": [(name, capacity) for name, _, capacity in cases(grid)],
        }
        stage = stages.get(f"needles_{grid.tokens}_{i}", settings, one)
        found.append({"tokens": grid.tokens, **stage["result"]})
    return found
