"""Names of the arms of launch/papers/bam/sweep.py, as claims compare them and as the report shows them."""

from collections.abc import Sequence

from launch.papers.shared.domains import DomainRuns

BTX = {
    "btx": "BTX",
    "btx6": "BTX, 6 experts",
    "btx6_top3": "BTX, 6 experts, top-3",
}
BAM = {
    "bam": "BAM",
    "bam_shared_kv": "BAM, shared KV",
}
CHOSEN = {  # always with shared keys and values, and at equal compute
    "moa_top2": "top-2 attention, shared KV",
    "moa_top1": "top-1 attention, shared KV",
}
CONTROLS = {"bam_averaged": "BAM, averaged attentions"}
DENSE_LONG = "dense_long"
CACHES = {"shared_kv": "shared keys and values", "expert_kv": "own keys and values"}
SEED = "seed"
_SUFFIXES = {"_cm": "equal compute", "_long": "long"}


def matched(arm: str) -> str:
    """Returns the twin of an arm that ends when it has computed as much as BTX."""
    return f"{arm}_cm"


def long(arm: str) -> str:
    """Returns the twin of an arm that makes as many updates as dense training needs to be matched."""
    return f"{arm}_long"


class Runs(DomainRuns):
    """Runs of a part with the arms' names and their routers."""

    def label(self, arm: str) -> str:
        if arm.startswith("spec_"):
            return arm.replace("spec_", "specialist ", 1)
        if arm == DENSE_LONG:
            return "dense, all tokens"
        base, suffix = _split(arm)
        label = {**BTX, **BAM, **CHOSEN, **CONTROLS}.get(base) or base.replace("_", " ")
        return f"{label} ({_SUFFIXES[suffix]})" if suffix else label

    def top_1(self, arm: str) -> Sequence[str]:
        base, _ = _split(arm)
        if base not in {**BTX, **BAM, **CHOSEN, **CONTROLS} or base == "btx6_top3":
            return ()
        return ("mlp", "attention") if base == "moa_top1" else ("mlp",)


def _split(arm: str) -> tuple[str, str]:
    """Returns the arm of which one is a twin, and its suffix."""
    suffix = next((one for one in _SUFFIXES if arm.endswith(one)), "")
    return arm.removesuffix(suffix), suffix


def specialist(domain: str) -> str:
    return f"spec_{domain}"
