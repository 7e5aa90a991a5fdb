"""Names of the arms of launch/papers/bam/sweep.py, as claims compare them and as the report shows them."""

from launch.papers.shared.domains import DomainRuns

BTX = {
    "btx": "BTX",
    "btx6": "BTX, 6 experts",
    "btx6_top3": "BTX, 6 experts, top-3",
}
BAM = {
    "bam": "BAM",
    "bam_shared_kv": "BAM, shared KV",
    "moa_top2": "top-2 attention",
    "moa_top1": "top-1 attention",
}
CONTROLS = {
    "bam_averaged": "BAM, averaged attentions",
    "dense_continued": "dense, all tokens",
    "soup": "soup of weights",
}
CACHES = {"shared_kv": "shared keys and values", "expert_kv": "own keys and values"}
SEED = "seed"
# Arms that compute more than BTX, and have a twin that makes fewer updates.
COSTLY = ("btx6_top3", *BAM, "bam_averaged")


def matched(arm: str) -> str:
    """Returns the arm with as much compute as BTX: the same, or its twin that makes fewer updates."""
    return f"{arm}_cm" if arm in COSTLY else arm


class Runs(DomainRuns):
    """Runs of a part with the arms' names."""

    def label(self, arm: str) -> str:
        if arm.startswith("spec_"):
            return arm.replace("spec_", "specialist ", 1)
        base = arm.removesuffix("_cm")
        label = {**BTX, **BAM, **CONTROLS}.get(base) or base.replace("_", " ")
        return label if base == arm else f"{label} (equal compute)"


def specialist(domain: str) -> str:
    return f"spec_{domain}"
