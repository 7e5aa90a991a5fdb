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

from espalier.launch.papers.nexus import experiment
from espalier.launch.papers.nexus.experiment import (
    APPENDED,
    BUDGETS,
    EXTENDED,
    EXTENSIONS,
    LINEAR,
    LOW,
    MERGED,
    NEW,
    NEXUS,
    OLD,
    PLACED,
    RANDOM,
    RESET,
    ROUTERS,
    SEED,
    STARTED,
    Runs,
    start,
)
from espalier.launch.papers.shared import claim, domains
from espalier.launch.papers.shared.claim import Effect
from espalier.launch.papers.shared.domain_panels import choice_maps, dots, load_dots
from espalier.launch.papers.shared.domains import everywhere, swept
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import panels
from espalier.launch.plots.panels import BLUE, GREEN, GREY, ORANGE, PURPLE

_PROSE = Prose.of(__name__)

MARGIN = 0.02  # nats: what counts as no worse
FLAT = 2.0  # per cent of the loss on the old domains: what an extension may cost
SELECTIVE = 0.1  # by how much more of the new domain than of the old ones must go to the new expert
_LAST = -1  # the layer that is judged

_pairs = functools.partial(domains.pairs, score=OLD)


def _at_budgets(*arms: tuple[str, str], steps: Sequence[int] = BUDGETS, above: float = 0.0):
    """Returns measures of whether the first arm of each pair has the lower loss on the new domain after so many updates."""
    return [_pairs(*arms, score=NEW, step=step, above=above) for step in steps]


def shrinking(runs: Runs, where: str) -> list[Effect]:
    """Compares the gap on the new domain at the smallest budget with that at each other budget."""
    first, *later = BUDGETS
    gaps = {s: runs.at(s).scores(RESET, NEW) - runs.at(s).scores(EXTENDED, NEW) for s in BUDGETS}
    out = []
    for step in later:
        shrunk = (gaps[first] - gaps[step]).dropna()
        if not shrunk.empty:
            what = (
                f"{NEW}, gap of Nexus and the linear router at {first} updates less that at {step}"
            )
            note = ", ".join(
                f"at {s} updates {gaps[s][shrunk.index].mean():.3f}" for s in (first, step)
            )
            out.append(_effect(where, what, shrunk, above=0.0, note=note))
    return out


def flat(runs: Runs, where: str, *, step: int) -> list[Effect]:
    """Measures by how many per cent an extension changes the loss on the old domains."""
    before = runs.scores(NEXUS, OLD)
    change = 100 * (runs.at(step).scores(EXTENDED, OLD) - before) / before
    what = f"{OLD}, change by the extension"
    settings = {"below": FLAT, "unit": "%", "digits": 2}
    return [_effect(f"{where}, {step} updates", what, change.dropna(), **settings)]


def own_experts(runs: Runs, where: str) -> list[Effect]:
    """Measures how much more of the experts' domains goes to their own experts than to the most chosen other one."""
    shares = {arm: _own_shares(runs, arm) for arm in (NEXUS, LINEAR)}
    own = {seed: pair[0] - pair[1] for seed, pair in shares[NEXUS].items()}
    note = "; ".join(
        f"{runs.label(arm)}: own {np.mean([x[0] for x in by_seed.values()]):.2f}, other "
        f"{np.mean([x[1] for x in by_seed.values()]):.2f}"
        for arm, by_seed in shares.items()
        if by_seed
    )
    what = "share of a domain's own expert less that of the most chosen other expert, mean over domains, last layer"
    return [_effect(where, what, own, above=0.0, digits=2, note=note)]


def _own_shares(runs: Runs, arm: str) -> dict[int, tuple[float, float]]:
    """Returns by seed the share of own experts and of the most chosen other one; experts of related domains are one."""
    related_DE = np.array(
        [[one == other for other in _kin(runs.initial)] for one in _kin(runs.initial)]
    )
    out = {}
    for seed, chosen_LDE in runs.choices(arm).items():
        experts = len(runs.initial)
        chosen_DE = chosen_LDE[_LAST, 1 : 1 + experts, :experts]
        own_D = np.where(related_DE, chosen_DE, 0).sum(-1)
        other_D = np.where(related_DE, 0, chosen_DE).max(-1)
        out[seed] = float(own_D.mean()), float(other_D.mean())
    return out


def _kin(names: Sequence[str]) -> list[object]:
    """Returns what generated domains share that are to be counted as one: most rows of a table; else their names."""
    from espalier.launch.papers.nexus import lag_domains

    def table(name: str) -> object:
        made = lag_domains.DOMAINS.get(name)
        if made is None:
            return name
        close = made.related_to is not None and made.related >= lag_domains.RELATED
        return made.related_to if close else made.table

    return [table(name) for name in names]


def selective(runs: Runs, where: str) -> list[Effect]:
    """Measures the new expert's share of the new domain less its share of the old ones, before the extension is trained."""
    notes = []
    for arm in (EXTENDED, *STARTED, *(arm for arm in EXTENSIONS if arm != EXTENDED)):
        if taken := runs.taken(start(arm)):
            taken_LD = np.mean([*taken.values()], axis=0)
            shares = ", ".join(
                f"layer {i} {row_D[-1]:.2f} of the new and {row_D[:-1].mean():.2f} of the old"
                for i, row_D in enumerate(taken_LD)
            )
            notes.append(f"{(EXTENSIONS | STARTED)[arm]}: {shares}")
    last = {seed: x_L[_LAST] for seed, x_L in runs.selectivity(start(EXTENDED)).items()}
    what = "new expert's share of the new domain less its share of the old ones, last layer"
    note = "; ".join(notes)
    return [_effect(where, what, last, above=SELECTIVE, digits=2, note=note)]


def more_selective(runs: Runs, where: str) -> list[Effect]:
    """Compares the selectivity of Nexus with that on random vectors."""
    ones, others = (runs.selectivity(start(arm)) for arm in (EXTENDED, "ext_random"))
    gaps = {seed: ones[seed][_LAST] - others[seed][_LAST] for seed in ones if seed in others}
    what = "new expert's share of the new domain less its share of the old ones, last layer, gain over random vectors"
    return [_effect(where, what, gaps, above=0.0, digits=2)]


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
    return [_effect(where, what, rhos(runs, NEXUS), above=0.0, digits=2)]


def keeping_order(runs: Runs, where: str) -> list[Effect]:
    """Compares placements of embeddings by the rank correlation that they keep."""
    plain, centred, lengthened = (rhos(runs, arm) for arm in PLACED)
    labels = [runs.label(arm) for arm in PLACED]
    out = []
    for label, one in ((labels[0], plain), (labels[2], lengthened)):
        gaps = {seed: one[seed] - centred[seed] for seed in one if seed in centred}
        what = f"rank correlation as in N14, {label} less {labels[1]}"
        out.append(_effect(where, what, gaps, above=0.0, digits=2))
    return out


def _effect(where: str, what: str, by_seed: Mapping[int, float], **settings) -> Effect:
    values = {int(seed): float(value) for seed, value in dict(by_seed).items()}
    return Effect(where=where, what=what, by_seed=values, **settings)


CLAIMS = (
    _PROSE.claim("N1", everywhere(_pairs((NEXUS, LINEAR), above=-MARGIN)), required=True),
    _PROSE.claim(
        "N2", everywhere(_pairs((NEXUS, SEED), (LINEAR, SEED), (SEED, MERGED))), required=True
    ),
    _PROSE.claim("N3", everywhere(_pairs((NEXUS, LINEAR)))),
    _PROSE.claim("N4", everywhere(*_at_budgets((EXTENDED, RESET), above=-MARGIN)), required=True),
    _PROSE.claim("N5", everywhere(*_at_budgets((EXTENDED, RESET), steps=[0])), required=True),
    _PROSE.claim("N6", everywhere(*_at_budgets((EXTENDED, RESET)))),
    _PROSE.claim("N7", everywhere(shrinking)),
    _PROSE.claim(
        "N8", everywhere(*_at_budgets((EXTENDED, APPENDED), steps=(0, *BUDGETS), above=-MARGIN))
    ),
    _PROSE.claim("N9", everywhere(*(functools.partial(flat, step=step) for step in BUDGETS))),
    _PROSE.claim("N11", everywhere(own_experts)),
    _PROSE.claim("N12", everywhere(selective), required=True),
    _PROSE.claim("N14", everywhere(similar), required=True),
    _PROSE.claim("N15", everywhere(_pairs((LINEAR, "linear_low"), unmet=""))),
    _PROSE.claim("N16", everywhere(_pairs(("nexus_low", NEXUS), above=-MARGIN, unmet=""))),
    _PROSE.claim(
        "N17",
        everywhere(
            _pairs((NEXUS, RANDOM)),
            *_at_budgets((EXTENDED, "ext_random"), steps=[0]),
            more_selective,
        ),
    ),
    _PROSE.claim("N20", everywhere(keeping_order)),
)


_STYLES = {EXTENDED: (BLUE, "s"), RESET: (ORANGE, "o"), "ext_random": (PURPLE, "D")}
_MAPPED = ("nexus", start(EXTENDED), EXTENDED, start(APPENDED))


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    out: dict[str, tuple[Any, str]] = {}
    for name, runs in swept(parts).items():
        out |= {
            f"{name}_loss.png": (
                dots(runs, _colours(), OLD),
                _PROSE("loss_figure", name=name),
            ),
            f"{name}_selectivity.png": (
                _selectivity(runs),
                _PROSE("selectivity_figure", name=name),
            ),
            f"{name}_extension.png": (
                _extension(runs),
                _PROSE("extension_figure", name=name),
            ),
            f"{name}_choices.png": (
                choice_maps(runs, [(arm, "mlp") for arm in _MAPPED]),
                _PROSE("choices_figure", name=name),
            ),
            f"{name}_loads.png": (
                load_dots(runs, _colours()),
                _PROSE("loads_figure", name=name),
            ),
            f"{name}_cosines.png": (
                _cosines(runs),
                _PROSE("cosines_figure", name=name),
            ),
        }
    return out


def _colours() -> dict[str, str]:
    """Returns arm -> colour of the mixtures before the extension."""
    return {
        **{arm: BLUE if "nexus" in arm else ORANGE for arm in ROUTERS},
        **{arm: GREEN if "nexus" in arm else GREY for arm in LOW},
    }


def _selectivity(runs: Runs) -> Any:
    by_arm = {
        arm: np.array([*by_seed.values()])
        for arm in {**EXTENSIONS, **STARTED}
        if (by_seed := runs.selectivity(start(arm)))
    }
    if not by_arm:
        return None
    layers = next(iter(by_arm.values())).shape[1]
    size = (3.0 + 2.6 * layers, 1.2 + 0.28 * len(by_arm))
    figure, every = panels.panels(layers, size, share_y=True)
    values = np.concatenate([*by_arm.values()])
    low, high = min(values.min(), 0.0) - 0.05, max(values.max(), SELECTIVE) + 0.05
    for layer, axes in enumerate(every):
        rows = []
        for arm, values_NL in by_arm.items():
            mine = values_NL[:, layer]
            mean = {"value": mine.mean(), "low": np.nan, "high": np.nan}
            rows.append(((EXTENSIONS | STARTED)[arm], list(mine), mean, BLUE))
        panels.paired(axes, rows)
        axes.grid(axis="x", alpha=0.25)
        axes.axvline(0, color="black", lw=0.8)
        axes.set(xlabel="share of the new less share of the old", title=f"layer {layer}")
        axes.set_xlim(low, high)
        axes.axvline(SELECTIVE, color="black", ls="--", lw=1)
    return figure


def _extension(runs: Runs) -> Any:
    steps = runs.steps(*_STYLES, APPENDED)
    if not [step for step in steps if step]:
        return None
    figure, every = panels.panels(2, (10, 4.2))
    # A logarithmic axis has no 0: the start is drawn at half of the first reading.
    at = [step or min(filter(None, steps)) / 2 for step in steps]
    for axes, score in zip(every, (NEW, OLD), strict=True):
        axes.axhline(0, color=GREY, lw=1.2, label=EXTENSIONS[APPENDED])
        for shift, (arm, (colour, marker)) in zip((0.94, 1.0, 1.06), _STYLES.items(), strict=True):
            gaps = [np.subtract(*runs.at(step).paired(score, arm, APPENDED)) for step in steps]
            places = [shift * x for x in at]
            means = [gap.mean() for gap in gaps]
            style = {"color": colour, "marker": marker, "ms": 5}
            axes.plot(places, means, lw=1.8, label=EXTENSIONS[arm], **style)
            for x, gap in zip(places, gaps, strict=True):
                axes.plot([x] * len(gap), gap, ls="", marker=".", ms=4, color=colour, alpha=0.5)
        axes.set_xscale("log")
        ticks = {x: str(step) for x, step in zip(at, steps, strict=True) if step in (0, *BUDGETS)}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.minorticks_off()
        axes.set(xlabel="updates of the extension", ylabel=f"{score} less that of a row appended")
    panels.legend_below(figure, every[0], 4)
    return figure


def _cosines(runs: Runs) -> Any:
    by_arm = {arm: [*by_seed.values()] for arm in PLACED if (by_seed := runs.cosines(arm))}
    if not by_arm:
        return None
    names: Sequence[str] = runs.initial
    figure, axes = panels.heat_map_grid(2, len(by_arm), (len(names), len(names)))
    for at, (arm, seeds) in enumerate(by_arm.items()):
        vectors_EE = np.mean([vectors for vectors, _ in seeds], axis=0)
        projected_EE = np.mean([projected_LEE[-1] for _, projected_LEE in seeds], axis=0)
        shown = {f"{PLACED[arm]}: domains": vectors_EE, "experts' vectors": projected_EE}
        for one, (title, values) in zip(axes[:, at], shown.items(), strict=True):
            panels.heat_map(one, values, names, names, title=title, signed=True, row_names=at == 0)
    return figure


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
    text=[_PROSE("method")],
    parts=tuple(experiment.PARTS),
    runs=Runs,
    claims=CLAIMS,
    figures=figures,
    shuffle=shuffle,
)
