"""PyramidKV (Cai et al., arXiv 2406.02069): SnapKV with more slots in shallow layers than in deep."""

import dataclasses

from model.kv_cache.full import Reading
from model.kv_cache.snapkv import SnapKV


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """Budgets fall linearly with depth; on average a layer has `capacity` slots.

    Attributes:
      beta: the deepest layer keeps (capacity - window) / beta tokens before the window.
    """

    beta: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta = {self.beta} must be at least 1")

    def most(self, state: Reading) -> int:
        length = state.slots.length
        if length <= self.capacity:
            return self.capacity
        before = layer_budgets(
            self.capacity - self.window, length - self.window, state.num_layers, self.beta
        )
        return before[state.layer] + self.window


def layer_budgets(average: int, most: int, num_layers: int, beta: float) -> list[int]:
    """Tokens that each layer keeps: average * num_layers together, none above `most`.

    From 2 * average - average / beta in the first layer down to average / beta in the last; where the
    first would exceed `most`, it has that and the last has what keeps the average.
    """
    first = min(2 * average - average / beta, float(most))
    last = 2 * average - first
    step = (first - last) / max(num_layers - 1, 1)
    exact = [first - layer * step for layer in range(num_layers)] if num_layers > 1 else [average]
    # Rounding the sums instead of the terms keeps the total.
    ends = [int(sum(exact[: layer + 1]) + 0.5) for layer in range(num_layers)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]
