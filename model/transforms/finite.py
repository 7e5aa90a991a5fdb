"""Values that are not finite: weights with NaN or infinity are refused where they come in, and not passed on."""

import numpy as np


def problem_of(values: np.ndarray) -> str | None:
    """Returns how many values of an array of floats are not finite, in words; None if all are finite."""
    if _all_finite(values):
        return None
    bad = ~np.isfinite(values.astype(np.float64))
    nan = int(np.isnan(values.astype(np.float64)).sum())
    kinds = "NaN" if nan == bad.sum() else "infinite" if not nan else "NaN or infinite"
    return f"{int(bad.sum()):,} values of {values.size:,} that are {kinds}"


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype.itemsize != 2:
        return bool(np.isfinite(values).all())
    exponent = np.array(np.inf, values.dtype).view(
        np.uint16
    )  # all of its bits are set if a value is not finite
    return not ((values.view(np.uint16) & exponent) == exponent).any()
