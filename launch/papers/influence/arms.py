"""Names of methods and queries as the report shows them, and the measurements of the sweep by seed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.papers.influence import sweep

METHODS = {
    "hessian": "exact Hessian",
    "gauss_newton": "exact Gauss-Newton",
    "ekfac_cg": "EK-FAC + CG",
    "ekfac": "EK-FAC",
    "kfac": "K-FAC",
    "identity": "dot product",
    "cosine": "cosine",
    "trak": "TRAK",
    "embedding": "embeddings",
    "bm25": "BM25",
    "tfidf": "TF-IDF",
    "random": "random",
}
GROUPS = {"fact": "facts", "add_one": "add one", "reverse": "reverse", "procedure": "procedures"}
LEARNED = (
    0.75  # of the queries of a group that the model must complete; else it has nothing to explain
)


class Seeds:
    """The measurements of the small corpus by seed.

    Attributes:
      rows: of `measure.run`: 'seed', 'seconds', 'scores' (of scoring.py) and 'losses' (of losses.py), either possibly None.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self.rows = rows

    @property
    def seeds(self) -> list[int]:
        return [int(row["seed"]) for row in self.rows]

    def scores(self, value: Callable[[Mapping[str, Any]], float | None]) -> dict[int, float]:
        """Returns a number of the scores of each seed that has it."""
        return self._each("scores", value)

    def losses(self, value: Callable[[Mapping[str, Any]], float | None]) -> dict[int, float]:
        """Returns a number of the retrained models of each seed that has it."""
        return self._each("losses", value)

    def _each(self, part: str, value: Callable[[Mapping[str, Any]], Any]) -> dict[int, float]:
        out = {}
        for row in self.rows:
            if row.get(part) and (number := value(row[part])) is not None:
                out[int(row["seed"])] = float(number)
        return out

    def unmet(self, *groups: str) -> str:
        """Returns which seeds' models do not complete the queries of a group; empty if all do."""
        return "; ".join(
            f"seed {row['seed']}: the model completes {share:.0%} of the queries of {GROUPS[group]}, fewer than {LEARNED:.0%}"
            for row in self.rows
            if row.get("scores")
            for group in groups
            if (share := row["scores"]["answered"][group]) < LEARNED
        )

    def amount(self) -> str:
        """Returns seeds and minutes, as text."""
        minutes = sum(row["seconds"] for row in self.rows) / 60
        seeds = ", ".join(map(str, self.seeds))
        retrained = sum(
            1 for arm in sweep.get_config("1").arms if arm.startswith(("half_", "without_"))
        )
        return f"seeds {seeds}, {retrained} retrained models each; {minutes:.0f} minutes of runs"
