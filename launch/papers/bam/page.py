"""The report of the reproduction."""

from launch.papers.bam import claims, figures, measure
from launch.papers.bam.arms import Runs
from launch.papers.shared import domains

_ARMS = [
    "- *arms*: a **seed** model is trained on mostly the general domain; a **specialist** of each other domain continues "
    "it with 90 % of that domain and 10 % of the general one. All mixtures are made of the seed and the specialists "
    "and train on a quarter of each domain. **BTX**: FFNs become experts (top-1), all else is averaged; *6 experts*: "
    "with two more copies of the seed's FFN, as many parameters as BAM; *top-3*: as many active ones too. **BAM**: "
    "attentions become experts as well, with keys and values of their own or one shared set, all of them mixed for every "
    "token (soft); *top-1* and *top-2 attention*: the router chooses.",
    "- *controls*: *averaged attentions*: BAM whose attention experts all begin as the averaged attention, so that it "
    "has BAM's capacity and nothing of the specialists' attention; *dense, all tokens*: the seed trained on as many "
    "tokens as all specialists and the mixture together; *soup*: the average of all weights of the seed and the specialists, "
    "not trained.",
    "- *equal compute*: such an arm makes fewer updates, so that its training takes as many FLOPs as BTX's by count of the "
    "products of forward and backward pass; its learning rate falls over its own updates. "
    "Attention experts that the router does not choose are computed here all the same, and counted so: at equal compute "
    "*top-1* and *top-2 attention* make as many updates as BAM. Where experts that are not chosen cost nothing they "
    "would make more.",
]
_SHORT = [
    "- *where it falls short*: the paper's models are of 590 million and 2 billion parameters, these are as the tables "
    "below say; domains are generated or small; compute is counted, not measured; a seed has seen little. "
    "Benchmarks are not run: at this size their scores are noise.",
]

REPORT = domains.report(
    slug="bam",
    title="BAM: the paper's claims on small models",
    source="[BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts, arXiv "
    "2408.08274](https://arxiv.org/abs/2408.08274)",
    text=[*_ARMS, *_SHORT],
    parts=tuple(measure.PARTS),
    runs=Runs,
    claims=claims.CLAIMS,
    figures=figures.figures,
    places=claims.PLACES,
    columns={"flops": ("10¹² FLOPs", 1e12)},
)
write = REPORT.write
