"""The claims of Nexus and how each is measured, with plots and the page.

Arms of the same seed share the seed model, the experts and the data with their order, so that they are compared in
pairs. Before the extension losses are means over the general domain and those of the experts; after it the new domain
is judged by itself. Shares are of tokens of held-out rows whose first choice an expert is. They are judged in the last
layer, the one that knows domains: a mean over layers hides that one layer sends half of everything to an expert and
another nothing.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.nexus import experiment, figures
from espalier.launch.papers.nexus.experiment import (
    APPENDED,
    BIASED_EXTENSIONS,
    BUDGETS,
    DENSE,
    EXTENDED,
    EXTENDED_BIAS,
    EXTENSIONS,
    KEPT,
    LINEAR,
    LINEAR_BIAS,
    NEW,
    NEXUS,
    NEXUS_BIAS,
    OLD,
    RANDOM,
    RESET,
    RESET_BIAS,
    SEED,
    STARTED,
    Runs,
    start,
)
from espalier.launch.papers.shared import domains
from espalier.launch.papers.shared.claim import Effect, Measure, Planned
from espalier.launch.papers.shared.domains import BALANCE, SYNTHETIC, TEXT
from espalier.launch.papers.shared.headline import Headline
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.shared.results import average

_PROSE = Prose.of(__name__)

MARGIN = 0.02  # nats: what counts as no worse
GAIN = 0.01  # nats: what counts as better, or as harm
FLAT = 2.0  # per cent of the loss on the old domains: what an extension may cost
SELECTIVE = figures.SELECTIVE
_LAST = -1  # the layer that is judged

_pairs = functools.partial(domains.pairs, score=OLD)


def _at_budgets(*arms: str, steps: Sequence[int] = BUDGETS) -> list[Measure]:
    """Returns measures of the first arm's gain over the second one on the new domain after so many updates."""
    return [_pairs(arms, score=NEW, step=step) for step in steps]


def _over_budgets(*arms: str) -> Measure:
    labels = [{**EXTENSIONS, **BIASED_EXTENSIONS}[arm] for arm in arms]
    what = f"{NEW}, gain of {labels[0]} over {labels[1]}, mean over budgets"
    return average(what, *_at_budgets(*arms))


def flat(runs: Runs, where: str, *, arm: str, other: str, step: int) -> list[Effect]:
    """Measures by how many per cent the loss of an arm on the old domains lies below another one's.

    The other one's is that at the same step, or at its end if it is the mixture before the extension.
    """
    before = (runs if other == NEXUS else runs.at(step)).scores(other, OLD)
    change = 100 * (before - runs.at(step).scores(arm, OLD)) / before
    what = f"{OLD}, {runs.label(arm)} below {runs.label(other)}"
    place = f"{where}, {step} updates"
    return _effect(place, what, change.dropna(), runs.unmet(OLD, arm, other), unit="%", digits=2)


def _flat(arm: str, other: str) -> list[Measure]:
    return [functools.partial(flat, arm=arm, other=other, step=step) for step in BUDGETS]


def own_family(runs: Runs, where: str, *, arm: str) -> list[Effect]:
    """Measures how much more of a domain's tokens goes to the experts of its family than with even routing."""
    return _of_choices(
        runs,
        where,
        arm,
        "share of a domain's tokens that goes to experts of its family minus that of even routing, mean over domains, last layer",
        lambda own_D, chance_D, _: (own_D - chance_D).mean(),
    )


def own_expert(runs: Runs, where: str, *, arm: str) -> list[Effect]:
    """Measures how much more of a domain's tokens goes to its own expert than to the most chosen other one."""
    return _of_choices(
        runs,
        where,
        arm,
        "share of a domain's own expert minus that of the most chosen other one, mean over domains, last layer",
        lambda own_D, chance_D, chosen_DE: (
            np.diag(chosen_DE) - (chosen_DE - 2 * np.eye(len(chosen_DE))).max(-1)
        ).mean(),
    )


def _of_choices(runs: Runs, where: str, arm: str, what: str, statistic: Any) -> list[Effect]:
    """Returns the effect of a statistic of the shares of families, those of even routing, and of experts by domain."""
    names = _families(runs.initial)
    related_DE = np.array([[one == other for other in names] for one in names])
    experts, values = len(names), {}
    for seed, chosen_LDE in runs.choices(arm).items():
        chosen_DE = chosen_LDE[_LAST, 1 : 1 + experts, :experts]
        own_D = np.where(related_DE, chosen_DE, 0).sum(-1)
        values[seed] = statistic(own_D, related_DE.mean(-1), chosen_DE)
    gates = runs.gates(arm)
    note = f"mean gate of the chosen expert {np.mean([*gates.values()]):.2f}" if gates else ""
    label = f"{runs.label(arm)}: {what}"
    return _effect(where, label, values, runs.unmet(OLD, arm), digits=2, note=note)


def _families(names: Sequence[str]) -> list[object]:
    """Returns what tells the families of domains apart: the first table of generated ones; others are each its own."""
    from espalier.launch.papers.nexus import lag_domains

    def family(name: str) -> object:
        made = lag_domains.DOMAINS.get(name)
        return name if made is None else made.related_to or made.table

    return [family(name) for name in names]


def selective(runs: Runs, where: str, *, arm: str) -> list[Effect]:
    """Measures the new expert's share of the new domain minus its share of the old ones."""
    last = {seed: x_L[_LAST] for seed, x_L in runs.selectivity(arm).items()}
    taken = [*runs.taken(arm).values()]
    note = "; ".join(
        f"layer {i} {row_D[-1]:.2f} of the new and {row_D[:-1].mean():.2f} of the old"
        for i, row_D in enumerate(np.mean(taken, axis=0) if taken else ())
    )
    what = f"{runs.label(arm)}: new expert's share of the new domain minus its share of the old ones, last layer"
    # A made start has no load that could be too large; it has not been trained.
    return _effect(where, what, last, runs.unmet(NEW, arm), digits=2, note=note)


def rhos(runs: Runs, arm: str) -> dict[int, float]:
    """Returns by seed the rank correlation of the cosines of domains and of their experts' vectors, in the last layer."""
    from scipy import stats

    out = {}
    for seed, (vectors_EE, projected_LEE) in runs.cosines(arm).items():
        pairs = np.triu_indices(len(vectors_EE), 1)
        rho = stats.spearmanr(vectors_EE[pairs], projected_LEE[_LAST][pairs]).statistic
        out[seed] = float(rho)
    return out


def similar(runs: Runs, where: str) -> list[Effect]:
    """Correlates the similarity of experts' vectors with the similarity of their domains."""
    what = "rank correlation of the cosines of domains and of their experts' vectors, last layer"
    return _effect(where, what, rhos(runs, NEXUS), digits=2)


def _effect(where: str, what: str, by_seed: Any, unmet: str = "", **settings: Any) -> list[Effect]:
    values = {int(seed): float(value) for seed, value in dict(by_seed).items()}
    return (
        [Effect(where=where, what=what, by_seed=values, unmet=unmet, **settings)] if values else []
    )


def _planned(sd: float, expected: float, source: str = "seeds 10 to 14") -> Planned:
    return Planned(sd=sd, expected=expected, source=source)


_ON_TEXT = "seeds 0 to 2, with six experts"
_choice = {
    name: [functools.partial(measure, arm=arm) for arm in (NEXUS, LINEAR)]
    for name, measure in (("family", own_family), ("expert", own_expert))
}
CLAIMS = (
    _PROSE.claim(
        "N1",
        SYNTHETIC,
        _pairs((NEXUS, LINEAR)),
        above=-MARGIN,
        planned=_planned(0.0039, 0.0),
        required=True,
    ),
    _PROSE.claim(
        "N3", SYNTHETIC, _pairs((NEXUS, LINEAR)), above=GAIN, planned=_planned(0.0039, 2 * GAIN)
    ),
    _PROSE.claim(
        "N4",
        SYNTHETIC,
        _over_budgets(EXTENDED, RESET),
        above=-MARGIN,
        planned=_planned(0.0036, 0.0),
        required=True,
        secondary={SYNTHETIC: _at_budgets(EXTENDED, RESET)},
    ),
    _PROSE.claim(
        "N5",
        SYNTHETIC,
        # Before training a loss may be above that of a model that has learned nothing.
        _pairs((start(EXTENDED), start(RESET)), score=NEW, unmet=""),
        above=0.0,
        planned=_planned(0.012, 0.06),
        required=True,
    ),
    _PROSE.claim(
        "N6",
        SYNTHETIC,
        _over_budgets(EXTENDED, RESET),
        above=0.0,
        planned=_planned(0.0036, 0.008),
    ),
    _PROSE.claim(
        "N9",
        SYNTHETIC,
        average(
            f"{OLD}, with a new expert below without one, mean over budgets", *_flat(EXTENDED, KEPT)
        ),
        above=-FLAT,
        planned=_planned(0.33, 0.0),
        secondary={
            SYNTHETIC: [*_flat(EXTENDED, KEPT), *_flat(EXTENDED, NEXUS), *_flat(KEPT, NEXUS)]
        },
    ),
    _PROSE.claim(
        "N11",
        SYNTHETIC,
        _choice["family"][0],
        above=SELECTIVE,
        planned=_planned(0.012, 0.3),
        secondary={
            SYNTHETIC: [_choice["family"][1], *_choice["expert"]],
            TEXT: _choice["expert"],
        },
    ),
    _PROSE.claim(
        "N12",
        SYNTHETIC,
        functools.partial(selective, arm=EXTENDED),
        above=SELECTIVE,
        planned=_planned(
            0.018, 0.2, "seeds 10 to 14, of a domain between two old ones after 400 updates"
        ),
        required=True,
        secondary={
            SYNTHETIC: [
                *(functools.partial(selective, arm=arm) for arm in (RESET, APPENDED)),
                *(
                    functools.partial(selective, arm=start(arm))
                    for arm in (EXTENDED, *STARTED, RESET, APPENDED)
                ),
            ],
            TEXT: [functools.partial(selective, arm=arm) for arm in (EXTENDED, start(EXTENDED))],
        },
    ),
    _PROSE.claim(
        "N14",
        SYNTHETIC,
        similar,
        above=0.0,
        planned=_planned(0.11, 0.5),
        required=True,
        secondary={TEXT: [similar]},
    ),
    _PROSE.claim(
        "N15",
        SYNTHETIC,
        _pairs((LINEAR, "linear_low"), unmet=""),
        above=GAIN,
        planned=_planned(0.0061, 0.03),
    ),
    _PROSE.claim(
        "N16",
        SYNTHETIC,
        _pairs(("nexus_low", NEXUS), unmet=""),
        above=-MARGIN,
        planned=_planned(0.0025, 0.0),
    ),
    _PROSE.claim(
        "N21",
        TEXT,
        _pairs((NEXUS, LINEAR)),
        above=-MARGIN,
        planned=_planned(0.0052, 0.0, _ON_TEXT),
        required=True,
        secondary={TEXT: [_pairs((NEXUS, DENSE), (NEXUS, SEED))]},
    ),
    _PROSE.claim(
        "N22",
        TEXT,
        _over_budgets(EXTENDED, RESET),
        above=0.0,
        planned=_planned(0.005, 0.02, _ON_TEXT),
        secondary={TEXT: _at_budgets(EXTENDED, RESET, steps=(0, *BUDGETS))},
    ),
    _PROSE.claim(
        "N8",
        SYNTHETIC,
        _over_budgets(EXTENDED, APPENDED),
        above=-MARGIN,
        planned=_planned(0.0039, 0.0),
        control=True,
        secondary={SYNTHETIC: _at_budgets(EXTENDED, APPENDED, steps=(0, *BUDGETS))},
    ),
    _PROSE.claim(
        "N17",
        SYNTHETIC,
        _pairs((NEXUS, RANDOM)),
        above=0.0,
        planned=_planned(0.0021, 0.005),
        control=True,
        secondary={
            SYNTHETIC: [_pairs((start(EXTENDED), start("ext_random")), score=NEW, unmet="")]
        },
    ),
    _PROSE.claim(
        "N18",
        SYNTHETIC,
        _pairs((NEXUS, DENSE)),
        above=0.0,
        planned=_planned(0.02, 0.05, "seeds 0 to 2 of the same comparison on text"),
        control=True,
        secondary={SYNTHETIC: [_pairs((LINEAR, DENSE))]},
    ),
    _PROSE.claim(
        "N19",
        SYNTHETIC,
        domains.pairs((EXTENDED, KEPT), score=NEW),
        above=0.0,
        planned=_planned(0.01, 0.03, "a guess"),
        control=True,
        secondary={SYNTHETIC: [domains.pairs((EXTENDED, KEPT), score=NEW, step=BUDGETS[0])]},
    ),
    _PROSE.claim(
        "N23",
        BALANCE,
        _pairs((NEXUS_BIAS, LINEAR_BIAS)),
        above=-MARGIN,
        planned=_planned(0.0039, 0.0, "seeds 10 to 14 with a balance loss"),
        control=True,
    ),
    _PROSE.claim(
        "N24",
        BALANCE,
        _over_budgets(EXTENDED_BIAS, RESET_BIAS),
        above=-MARGIN,
        planned=_planned(0.0036, 0.0, "seeds 10 to 14 with a balance loss"),
        control=True,
        secondary={BALANCE: _at_budgets(EXTENDED_BIAS, RESET_BIAS)},
    ),
)


def shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns measurements with arms exchanged, and with domains exchanged in the choices and cosines of each run."""
    return {
        part: {**value, "rows": [_other_domains(row, rng) for row in value["rows"]]}
        for part, value in domains.shuffle(measured, rng).items()
    }


def _other_domains(row: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    evaluations = dict(row["evaluations"])
    if routing := evaluations.get("routing"):
        names = list(routing["chosen"])
        tables = [routing["chosen"][name] for name in rng.permutation(names)]
        evaluations["routing"] = {**routing, "chosen": dict(zip(names, tables, strict=True))}
    if structure := evaluations.get("structure"):
        order = rng.permutation(len(structure["vectors"]))
        vectors = np.array(structure["vectors"])[np.ix_(order, order)].tolist()
        evaluations["structure"] = {**structure, "vectors": vectors}
    return {**row, "evaluations": evaluations}


REPORT = domains.report(
    slug="nexus",
    title="Nexus: the paper's claims on small models",
    source="[Nexus: Specialization meets Adaptability for Efficiently Training Mixture of Experts, arXiv "
    "2408.15901](https://arxiv.org/abs/2408.15901)",
    text=[_PROSE("method")],
    parts=tuple(experiment.PARTS),
    runs=Runs,
    claims=CLAIMS,
    figures=functools.partial(figures.figures, _PROSE),
    shuffle=shuffle,
    headline=Headline(
        claim="N3",
        what="loss on the old domains of a linear router minus that of Nexus' router",
        unit="nats",
        paper=None,
        tie=MARGIN,
        measure=_pairs((NEXUS, LINEAR)),
        part=SYNTHETIC,
        why=_PROSE("headline_why"),
        mind=_PROSE("headline_mind"),
        digits=3,
    ),
)
