"""pass@k: the probability that one of k samples of a program passes its tests (Chen et al., 2107.03374)."""

import dataclasses
import math
import statistics
from collections.abc import Sequence


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased estimate for one problem: 1 - C(n - c, k) / C(n, k), as a product (equation 1).

    Args:
      samples: n, number of samples drawn.
      passed: c, number of samples that passed.
      k: number of tries.

    Raises:
      ValueError: more have passed than were drawn, or k is not between 1 and the number drawn.
    """
    if not 0 <= passed <= samples:
        raise ValueError(f"{passed} of {samples} samples cannot have passed.")
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} samples: draw at least k.")
    if samples - passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - passed + 1, samples + 1))


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over problems.

    Attributes:
      value: the mean.
      low, high: Wilson interval of the mean, with the problems as a sample of all such problems.
      problems: number of problems.
    """

    value: float
    low: float
    high: float
    problems: int


def mean_pass_at_k(
    counts: Sequence[tuple[int, int]], k: int, *, confidence: float = 0.95
) -> Estimate:
    """Returns the mean of pass@k over problems.

    The Wilson interval assumes one sample per problem. With more samples it is conservative: values between 0 and 1
    with mean p have a variance of at most p (1 - p).

    Args:
      counts: (samples, passed) of each problem.
      k: number of tries.
      confidence: confidence of the interval.

    Raises:
      ValueError: there is no problem; see also `pass_at_k`.
    """
    if not counts:
        raise ValueError("pass@k of no problem is not defined.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must lie between 0 and 1.")
    n = len(counts)
    value = math.fsum(pass_at_k(samples, passed, k) for samples, passed in counts) / n
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return Estimate(value, max(centre - half, 0.0), min(centre + half, 1.0), n)
