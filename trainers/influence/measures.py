"""How well scores predict retraining, and how alike two rankings are. Shapes: N documents, S subsets, Q queries."""

import numpy as np


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Returns Spearman's rank correlation; NaN if one side is constant."""
    from scipy import stats

    x, y = stats.rankdata(x) - 1, stats.rankdata(y) - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(x, y)[0, 1])


def linear_datamodeling_score(
    scores_NQ: np.ndarray, subsets_SN: np.ndarray, losses_SQ: np.ndarray
) -> np.ndarray:
    """Returns the linear datamodeling score of each query [Q] (Park et al., arXiv 2303.14186).

    It is the rank correlation, over subsets of the training data, of a query's loss after training on the subset with the
    loss that the scores predict: minus the sum of the scores of the subset's documents, because a positive score lowers it.

    Args:
      scores_NQ: scores of documents.
      subsets_SN: whether each subset has each document.
      losses_SQ: the queries' losses after training on each subset.
    """
    predicted_SQ = -(np.asarray(subsets_SN, np.float64) @ np.asarray(scores_NQ, np.float64))
    columns = zip(predicted_SQ.T, np.asarray(losses_SQ).T, strict=True)
    return np.array([spearman(predicted, loss) for predicted, loss in columns])
