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
    "- *balance*: all mixtures have a balance loss of 0.05 on the routers that choose, and no z-loss. With 0.01 and a z-loss of "
    "0.001 one expert of a layer got .99 of BTX's tokens in two of three seeds: BTX was a dense model in all but name, and "
    "whatever was compared with it said nothing.",
    "- *controls*: *averaged attentions*: BAM whose attention experts all begin as the averaged attention, so that it "
    "has BAM's capacity and nothing of the specialists' attention; *dense, all tokens*: the seed trained on as many "
    "tokens as all specialists and the *long* mixtures together.",
    "- *equal compute*: such an arm makes as many updates as would cost what BTX's 600 do, were the models the paper's of 590 "
    "million parameters at a context of 1,024 tokens, which is not published: BAM costs 1.28 times as much as BTX there, "
    "with shared keys and values 1.17 (1.25 to 1.34 and 1.13 to 1.22 at 256 to 2,048 tokens). By its own count BAM costs 2.3 "
    "times as much here, because the head of 51 symbols is nearly free. Learning rates fall over an arm's own updates. "
    "Attentions that the router does not choose are counted as if they were computed.",
]
_SHORT = [
    "- *where it falls short*: the paper's models are of 590 million and 2 billion parameters, these are as the tables "
    "below say; domains are generated, and real text is not measured; compute is counted, not measured. "
    "Benchmarks are not run: at this size their scores are noise.",
]

_INTRO = (
    "Earlier runs, on other seeds and with a balance loss of 0.01, had BAM 0.143 nats ahead of BTX (1.492 against 1.635). In two\n"
    "of their three seeds BTX's router sent .99 of a layer's tokens to one expert, so that this was a lead over a dense model in\n"
    "all but name. B3 and B5 measure the lead over a BTX whose loads are even; where it is smaller, this is why.\n"
)

REPORT = domains.report(
    slug="bam",
    intro=_INTRO,
    title="BAM: the paper's claims on small models",
    source="[BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts, arXiv "
    "2408.08274](https://arxiv.org/abs/2408.08274)",
    text=[*_ARMS, *_SHORT],
    parts=tuple(measure.PARTS),
    runs=Runs,
    claims=claims.CLAIMS,
    figures=figures.figures,
    places=claims.PLACES,
)
