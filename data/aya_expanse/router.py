"""A learned router: a linear classifier of prompts that predicts which teacher's answer has the largest reward.

It minimises the mean over prompts of KL(p || pi(.|x)) plus an L2 penalty, where p_k is proportional to exp(R(x, y_k) / tau) over
the teachers that answered (arXiv 2408.14960, section 2; the form of p is this project's). The features are hashed
n-grams of characters with the language, so it is trained in seconds and its choice costs nothing.

Shapes: N prompts, D features, K teachers.
"""

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
import scipy.special

from espalier.common.storage import output_files
from espalier.data.languages import table
from espalier.data.text.documents import DataError

_DIMENSIONS = 1 << 12
_ORDERS = (1, 2, 3)  # of the n-grams
_MAX_CHARACTERS = 2000  # of a prompt that are read


def targets(
    rewards: Sequence[Mapping[str, float]], names: Sequence[str], *, tau: float
) -> np.ndarray:
    """Returns p, float64 [N, K]: the softmax of rewards / tau over the teachers that answered.

    tau = 0 is the limit: all probability for the best teacher, the first of equals.

    Raises:
      ValueError: tau is negative or not finite.
    """
    if not 0 <= tau < np.inf:
        raise ValueError(f"--tau={tau} must be 0 or positive, and finite.")
    rewards_NK = np.array([[row.get(name, -np.inf) for name in names] for row in rewards])
    if tau == 0:
        return np.eye(len(names))[np.argmax(rewards_NK, axis=1)]
    # The largest is subtracted first, so that a small tau does not overflow.
    largest_N1 = rewards_NK.max(axis=1, keepdims=True)
    with np.errstate(over="ignore"):
        return scipy.special.softmax((rewards_NK - largest_N1) / tau, axis=1)


def features(texts: Sequence[str], languages: Sequence[str]) -> scipy.sparse.csr_matrix:
    """Returns features, sparse [N, D]: counts of n-grams with Euclidean norm 1, the language, and a constant."""
    rows, columns, values = [], [], []
    for row, (text, language) in enumerate(zip(texts, languages, strict=True)):
        counts: dict[int, float] = {}
        text = f"\n{text[:_MAX_CHARACTERS].lower()}\n"
        for order in _ORDERS:
            for start in range(len(text) - order + 1):
                column = _hashed(text[start : start + order])
                counts[column] = counts.get(column, 0.0) + 1.0
        norm = np.sqrt(sum(value**2 for value in counts.values()))
        own = {
            _hashed(f"language {table.code_of(language)}") + _DIMENSIONS: 1.0,
            2 * _DIMENSIONS: 1.0,
        }
        for column, value in ({c: v / norm for c, v in counts.items()} | own).items():
            rows.append(row)
            columns.append(column)
            values.append(value)
    shape = (len(texts), 2 * _DIMENSIONS + 1)
    return scipy.sparse.csr_matrix((values, (rows, columns)), shape=shape)


def _hashed(text: str) -> int:
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % _DIMENSIONS


@dataclasses.dataclass(frozen=True)
class Router:
    """A trained router: `weights_DK` float64, and the names of the K teachers."""

    names: tuple[str, ...]
    weights_DK: np.ndarray

    def log_probs(self, texts: Sequence[str], languages: Sequence[str]) -> np.ndarray:
        """Returns log pi(k|x), float64 [N, K]."""
        return scipy.special.log_softmax(features(texts, languages) @ self.weights_DK, axis=1)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the router to a file of NumPy arrays."""
        with output_files.opened(path) as file:
            np.savez(file, weights=self.weights_DK, names=np.array(self.names))


def load(path: str | os.PathLike) -> Router:
    """Returns the router in a file of `Router.save`; raises DataError if it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names, weights_DK = tuple(map(str, arrays["names"])), arrays["weights"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{os.fspath(path)} is not a router: {error}. Train it again") from None
    if weights_DK.shape != (2 * _DIMENSIONS + 1, len(names)) or not np.isfinite(weights_DK).all():
        raise DataError(f"{os.fspath(path)} has weights of another form. Train the router again")
    return Router(names, weights_DK)


def fit(
    texts: Sequence[str],
    languages: Sequence[str],
    p_NK: np.ndarray,
    names: Sequence[str],
    *,
    penalty: float = 1e-3,
) -> Router:
    """Trains a router; a convex problem, solved by L-BFGS from zero, so equal inputs give equal routers.

    Args:
      texts, languages: of N prompts.
      p_NK: result of `targets`.
      names: of the K teachers.
      penalty: weight of half the squared norm of the weights.
    """
    features_ND = features(texts, languages)
    shape = (features_ND.shape[1], len(names))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights_DK = flat.reshape(shape)
        return loss(weights_DK, features_ND, p_NK, penalty=penalty)

    solved = scipy.optimize.minimize(
        objective, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200}
    )
    return Router(tuple(names), solved.x.reshape(shape))


def loss(
    weights_DK: np.ndarray,
    features_ND: scipy.sparse.csr_matrix,
    p_NK: np.ndarray,
    *,
    penalty: float,
) -> tuple[float, np.ndarray]:
    """Returns the mean KL(p || pi) with the penalty, and its gradient, flattened."""
    log_pi_NK = scipy.special.log_softmax(features_ND @ weights_DK, axis=1)
    divergence = (scipy.special.xlogy(p_NK, p_NK) - p_NK * log_pi_NK).sum() / len(p_NK)
    error_NK = (np.exp(log_pi_NK) - p_NK) / len(p_NK)
    gradient_DK = features_ND.T @ error_NK + penalty * weights_DK
    return divergence + 0.5 * penalty * (weights_DK**2).sum(), gradient_DK.ravel()
