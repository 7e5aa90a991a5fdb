"""Names of the arms of launch/papers/nexus/sweep.py, and the evaluations of their runs.

The domains of a part are the general one, the domains of a mixture's experts in their order, and last the new one, for
which an expert is added.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from launch.papers.shared.domains import DomainRuns

OLD, NEW = "old-domain loss", "new-domain loss"
SEED, MERGED = "seed", "merged"
ROUTERS = {
    "nexus": "Nexus",
    "linear": "linear router",
    "mlp_router": "MLP router",
    "nexus_random": "Nexus, random vectors",
    "nexus_one_hot": "Nexus, one-hot vectors",
}
LOW = {"nexus_low": "Nexus, weak balance", "linear_low": "linear router, weak balance"}
Z_LOSS = {"nexus_z_loss": "Nexus, router z-loss"}
EXTENSIONS = {
    "ext_nexus": "Nexus",
    "ext_linear_reset": "linear router, drawn anew",
    "ext_linear_append": "linear router, row appended",
    "ext_random": "Nexus, random vectors",
}
CONTINUED = "dense_continued"
BALANCE = {"": 0.05, "_low": 0.0005}  # suffix of an arm -> weight of the balance loss
BUDGETS = (50, 100, 200, 400)  # updates of an extension


_LABELS = {
    **ROUTERS,
    **LOW,
    **Z_LOSS,
    **{arm: f"{label}, extended" for arm, label in EXTENSIONS.items()},
    MERGED: "experts merged",
    CONTINUED: "dense, all tokens",
}


class Runs(DomainRuns):
    """Runs of a part with the arms' names."""

    def label(self, arm: str) -> str:
        if arm.startswith("expert_"):
            return f"expert of {arm.removeprefix('expert_')}"
        return _LABELS.get(arm, arm.replace("_", " "))

    @classmethod
    def more_groups(cls, domains: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return {OLD: domains[:-1], NEW: domains[-1:]}

    @property
    def initial(self) -> Sequence[str]:
        """The domains of the experts before the extension."""
        return self.domains[1:-1]

    def chosen(self, arm: str) -> np.ndarray | None:
        """Returns the share of each domain's tokens by the expert that is their first choice: [seed, domain, expert].

        A mean over layers; None where no run of the arm has the evaluation 'routing' on all domains.
        """
        tables = [
            [np.mean(routing["chosen"][domain]["mlp"], axis=0) for domain in self.domains]
            for routing in self.evaluation(arm, "routing")
            if all(domain in routing["chosen"] for domain in self.domains)
        ]
        return np.array(tables) if tables else None

    def cosines(self, arm: str) -> tuple[list[str], np.ndarray, np.ndarray] | None:
        """Returns (names, cosines of the domains' vectors [seed, i, j], of the experts', mean over layers), or None."""
        runs = self.evaluation(arm, "structure")
        if not runs:
            return None
        vectors = np.array([one["vectors"] for one in runs])
        projected = np.array([np.mean(list(one["projected"].values()), axis=0) for one in runs])
        return list(runs[0]["domains"]), vectors, projected


def expert(domain: str) -> str:
    return f"expert_{domain}"


def start(arm: str) -> str:
    """Returns the arm that another one starts from; it is made, not trained."""
    return f"{arm}_start"
