"""Fits of P_win on likelihood: a line, a parabola, and bins. Shape: E evaluations."""

import dataclasses
from collections.abc import Callable

import numpy as np

Select = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

CLIP = -4.0  # likelihood of better completions below which texts have broken down
BINS = 6  # of as many evaluations each


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
        """By how many per cent the parabola's RMSE is below the line's."""
        return 100 * (1 - self.rmse_parabola / self.rmse_line)


def fit(x_E: np.ndarray, y_E: np.ndarray) -> Fit | None:
    """Returns the fit; None for fewer than four different places, which a parabola nearly interpolates."""
    if len(np.unique(x_E)) < 4:
        return None
    curves = [np.polyfit(x_E, y_E, degree) for degree in (1, 2)]
    errors = [float(np.sqrt(np.mean((y_E - np.polyval(one, x_E)) ** 2))) for one in curves]
    return Fit(*curves, *errors)


def above(x_E: np.ndarray, y_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the evaluations of likelihood above CLIP."""
    return x_E[x_E > CLIP], y_E[x_E > CLIP]


def binned(x_E: np.ndarray, y_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns means (x, y) of BINS groups of neighbours in x of equal size, up to one evaluation, from the lowest x."""
    groups = np.array_split(np.argsort(x_E, kind="stable"), BINS)
    centres, means = (np.array([values[g].mean() for g in groups]) for values in (x_E, y_E))
    return centres, means
