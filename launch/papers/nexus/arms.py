"""Names of the arms of launch/papers/nexus/sweep.py, and the evaluations of their runs.

The domains of a part are the general one, the domains of a mixture's experts in their order, and last the new one, for
which an expert is added.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from launch.papers.shared.domains import DomainRuns

OLD, NEW = "old-domain loss", "new-domain loss"
SEED, MERGED = "seed", "merged"
NEXUS, LINEAR, RANDOM = "nexus", "linear", "nexus_random"
# Nexus by how its embeddings are placed; the first one is the paper's, and Nexus elsewhere on the page.
PLACED = {
    NEXUS: "Nexus",
    "nexus_centred": "Nexus, centred",
    "nexus_lengthened": "Nexus, centred and lengthened",
}
ROUTERS = {**PLACED, RANDOM: "Nexus, random vectors", LINEAR: "linear router"}
LOW = {"nexus_low": "Nexus, weak balance", "linear_low": "linear router, weak balance"}
EXTENDED, RESET, APPENDED = "ext_nexus", "ext_linear_reset", "ext_linear_append"
EXTENSIONS = {
    EXTENDED: "Nexus",
    RESET: "linear router, drawn anew",
    APPENDED: "linear router, row appended",
    "ext_random": "Nexus, random vectors",
}
STARTED = {  # only started, not trained
    "ext_centred": "Nexus, centred",
    "ext_lengthened": "Nexus, centred and lengthened",
    "ext_levelled": "Nexus, levelled",
}
BUDGETS = (50, 100, 200, 400)  # updates of an extension
_LABELS = {
    **ROUTERS,
    **LOW,
    **{arm: f"{label}, extended" for arm, label in {**EXTENSIONS, **STARTED}.items()},
    MERGED: "experts merged",
}


class Runs(DomainRuns):
    """Runs of a part with the arms' names and their routers."""

    def label(self, arm: str) -> str:
        if arm.startswith("expert_"):
            return f"expert of {arm.removeprefix('expert_')}"
        base = arm.removesuffix("_start")
        label = _LABELS.get(base, base.replace("_", " "))
        return label if base == arm else f"{label}, before training"

    def top_1(self, arm: str) -> Sequence[str]:
        return ("mlp",) if arm in {**ROUTERS, **LOW, **EXTENSIONS} else ()

    @classmethod
    def more_groups(cls, domains: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return {OLD: domains[:-1], NEW: domains[-1:]}

    @property
    def initial(self) -> Sequence[str]:
        """The domains of the experts before the extension."""
        return self.domains[1:-1]

    def selectivity(self, arm: str) -> dict[int, np.ndarray]:
        """Returns by seed the new expert's share of the new domain's tokens less its share of the old domains': [layer]."""
        out = {}
        for seed, taken_LD in self.taken(arm).items():
            out[seed] = taken_LD[:, -1] - taken_LD[:, :-1].mean(-1)
        return out

    def taken(self, arm: str) -> dict[int, np.ndarray]:
        """Returns by seed the new expert's share of each domain's tokens: [layer, domain]."""
        return {seed: chosen_LDE[..., -1] for seed, chosen_LDE in self.choices(arm).items()}

    def cosines(self, arm: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Returns by seed the cosines of the domains' vectors [i, j] and of the experts' in each layer [layer, i, j]."""
        structures = {
            seed: row["evaluations"]["structure"]
            for seed, row in self.find(arm).items()
            if row["evaluations"].get("structure")
        }
        return {
            seed: (np.array(one["vectors"]), np.array([*one["projected"].values()]))
            for seed, one in structures.items()
        }


def expert(domain: str) -> str:
    return f"expert_{domain}"


def start(arm: str) -> str:
    """Returns the arm that another one starts from; it is made, not trained."""
    return f"{arm}_start"
