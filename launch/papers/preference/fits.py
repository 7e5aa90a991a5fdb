"""P_win by likelihood: bins, a line and a parabola. Shape: E evaluations.

Likelihoods are read as falls, in nats per token below the value before the first update: another model starts elsewhere.
"""

import dataclasses

import numpy as np

# Edges of the bins of falls, and the bins between which one in the middle is best: the two in the middle, as one.
EDGES = (0.08, 0.23, 0.63, 1.43, 3.43)
MIDDLE = (0.23, 1.43)
CLIP = 1.43  # the fall at which texts begin to break down


@dataclasses.dataclass(frozen=True)
class Fit:
    """Least squares of degree 1 and 2.

    Attributes:
      line, parabola: coefficients, the highest power first.
      rmse_line, rmse_parabola: root mean squares of their residuals.
    """

    line: np.ndarray
    parabola: np.ndarray
    rmse_line: float
    rmse_parabola: float

    @property
    def curvature(self) -> float:
        return float(self.parabola[0])

    @property
    def reduction(self) -> float:
        """The share of the line's RMSE that the parabola saves."""
        return 1 - self.rmse_parabola / self.rmse_line


def fit(x_E: np.ndarray, y_E: np.ndarray) -> Fit | None:
    """Returns the fit; None for fewer than four different places, which a parabola nearly interpolates."""
    if len(np.unique(x_E)) < 4:
        return None
    curves = [np.polyfit(x_E, y_E, degree) for degree in (1, 2)]
    errors = [float(np.sqrt(np.mean((y_E - np.polyval(one, x_E)) ** 2))) for one in curves]
    return Fit(*curves, *errors)


def near(fall_E: np.ndarray, y_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the evaluations whose likelihood has fallen by less than CLIP."""
    return fall_E[fall_E < CLIP], y_E[fall_E < CLIP]


def between(fall_E: np.ndarray, y_E: np.ndarray, low: float, high: float) -> float | None:
    """Returns the mean of y where the fall lies in [low, high); None where there are fewer than three."""
    inside_E = (fall_E >= low) & (fall_E < high)
    return float(y_E[inside_E].mean()) if inside_E.sum() >= 3 else None


def binned(fall_E: np.ndarray, y_E: np.ndarray) -> list[float | None]:
    """Returns the mean of y in each bin, from the smallest fall, that is the highest likelihood."""
    edges = (-np.inf, *EDGES, np.inf)
    return [between(fall_E, y_E, *bounds) for bounds in zip(edges, edges[1:], strict=False)]
