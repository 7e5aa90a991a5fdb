"""The report of the reproduction."""

from launch.papers.nexus import claims, figures, measure
from launch.papers.nexus.arms import Runs
from launch.papers.shared import domains

_ARMS = [
    "- *arms*: a **seed** model is trained on mostly the general domain, and an **expert** of each other domain continues "
    "it. The mixtures have the seed's FFN for every token and beside it, for each token, one of the experts' FFNs "
    "(top-1); all else is the experts' mean. **Nexus** projects embeddings of the experts' data to the vectors it routes "
    "by; the **linear router** is drawn; *weak balance*: with 0.0005 in place of 0.05 as the weight of the balance loss. "
    "*Merged*: the mean of the seed and all experts, not trained.",
    "- *extension*: the expert of the last domain, which no mixture has seen, is added; what is neither expert nor router "
    "moves 1/(n + 1) of the way to that expert's. Nexus takes the new domain's embedding and keeps its projection; a linear router is "
    "*drawn anew*, as in the paper, or has a *row appended*. Then all is trained, half of the tokens from the new domain; "
    "one run is read at all budgets, so that a budget has the learning rate of the longer run at that step.",
    "- *controls*: Nexus with *random* and with *one-hot* vectors in place of embeddings; an *MLP router* with as many "
    "parameters as the projection; the seed *continued* on as many tokens of the same mix as all experts and the mixture took; "
    "and Nexus trained with a *router z-loss* of 0.001, which no other arm has: it limits the logits of old experts, "
    "and not that of an expert that is added.",
    "- *shares*: of held-out tokens, by the expert that is the first choice, mean over layers.",
]
_SHORT = [
    "- *not claimed*: that the projection moves experts' vectors further apart than embeddings are. Embeddings here are "
    "centred and of length 1, so that the mean cosine of n of them is already close to -1/(n - 1), the minimum for n "
    "vectors.",
    "- *where it falls short*: the paper's models are of 470 million and 2.8 billion parameters, these are as the tables "
    "below say; its embeddings are of a large text encoder, these of hashed n-grams; domains are generated or small, and "
    "the last anneal on data of higher quality is omitted. Benchmarks are not run: at this size their scores are noise.",
]

REPORT = domains.report(
    slug="nexus",
    title="Nexus: the paper's claims on small models",
    source="[Nexus: Specialization meets Adaptability for Efficiently Training Mixture of Experts, arXiv "
    "2408.15901](https://arxiv.org/abs/2408.15901)",
    text=[*_ARMS, *_SHORT],
    parts=tuple(measure.PARTS),
    runs=Runs,
    claims=claims.CLAIMS,
    figures=figures.figures,
)
write = REPORT.write
