"""The report of the reproduction."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.nexus import claims, figures, measure
from launch.papers.nexus.arms import Runs
from launch.papers.shared import claim, domains

_ARMS = [
    "- *domains*: four families a to d of three, which have a lag each; a domain has 70 or 40 % of the rows of its family's "
    "first table, so that similarity is graded. The new one lies between two old ones: half of its rows are kin_a's, "
    "half kin_b's, and its lag is kin_a's.",
    "- *arms*: a **seed** model is trained on mostly the general domain, and an **expert** of each other domain continues "
    "it. The mixtures have the seed's FFN for every token and beside it, for each token, one of the experts' FFNs "
    "(top-1); all else is the experts' mean. **Nexus** projects embeddings of the experts' data to the vectors it routes "
    "by; the **linear router** is drawn; *weak balance*: with 0.0005 in place of 0.05 as the weight of the balance loss. "
    "*Merged*: the mean of the seed and all experts, not trained.",
    "- *embeddings*: of pairs of characters, and not centred, as the paper's; *centred*: less their mean and of length 1; "
    "*lengthened*: these, of length 3 sqrt(m).",
    "- *extension*: the expert of the new domain, which no mixture has seen, is added; what is neither expert nor router "
    "moves 1/(n + 1) of the way to that expert's. Nexus takes the new domain's embedding and keeps its projection; a linear router is "
    "*drawn anew*, as in the paper, or has a *row appended*. Then all is trained with a tenth of the rate of training, half of "
    "the tokens from the new domain; one run is read at all budgets, so that a budget has the learning rate of the longer "
    "run at that step. *Levelled*: the new expert's vector in each layer is brought to the level of the old ones "
    "(model/nexus/domain_router.py), started only. Subtracting the mean of the old vectors from all of them would change "
    "nothing: a softmax sees differences of logits only.",
    "- *controls*: Nexus with *random* vectors in place of embeddings.",
    "- *shares*: of held-out tokens, by the expert that is the first choice, by layer.",
]
_SHORT = [
    "- *where it falls short*: the paper's models are of 470 million and 2.8 billion parameters, these are as the tables "
    "below say; its embeddings are of a large text encoder, these of hashed n-grams; domains are generated, real text is not "
    "measured, and the last anneal on data of higher quality is omitted. Benchmarks are not run: at this size their scores are "
    "noise.",
]


def shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns measurements with arms exchanged, whether or not they have cosines, and with domains exchanged in each run.

    Cosines stay with their arm; their domains are exchanged, as those of shares are.
    """
    out = {}
    for part, value in measured.items():
        plain = [_evaluated(row, structure=None) for row in value["rows"]]
        rows = claim.shuffle_arms({part: plain}, rng)[part]
        pairs = zip(rows, value["rows"], strict=True)
        out[part] = {**value, "rows": [_exchanged(row, own, rng) for row, own in pairs]}
    return out


def _evaluated(row: Mapping[str, Any], **evaluations: Any) -> dict[str, Any]:
    """Returns a row with other evaluations of these names; none where one is None."""
    changed = {**row["evaluations"], **evaluations}
    return {**row, "evaluations": {name: one for name, one in changed.items() if one}}


def _exchanged(
    row: Mapping[str, Any], own: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, Any]:
    routing, structure = row["evaluations"].get("routing"), own["evaluations"].get("structure")
    if routing:
        names = list(routing["chosen"])
        tables = [routing["chosen"][name] for name in rng.permutation(names)]
        routing = {**routing, "chosen": dict(zip(names, tables, strict=True))}
    if structure:
        order = rng.permutation(len(structure["vectors"]))
        vectors = np.array(structure["vectors"])[np.ix_(order, order)].tolist()
        structure = {**structure, "vectors": vectors}
    return _evaluated(row, routing=routing, structure=structure)


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
    shuffle=shuffle,
)
