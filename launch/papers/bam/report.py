"""The claims of BAM and how each is measured, with plots and the page.

Arms of the same seed start from the same seed model and specialists, and read the same data in the same order, so
that they are compared in pairs. *Data-matched* arms train on as many tokens as BTX, and BAM computes more;
*compute-matched* ones end when they have computed as much as BTX.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from espalier.launch.papers.bam import experiment
from espalier.launch.papers.bam.experiment import (
    BAM,
    BTX,
    CACHE_LENGTH,
    CACHES,
    CHOSEN,
    CONTROLS,
    DENSE_LONG,
    LONG_SEEDS,
    SEED,
    Runs,
    long,
    matched,
    specialist,
)
from espalier.launch.papers.shared import domains
from espalier.launch.papers.shared.claim import Effect
from espalier.launch.papers.shared.domain_panels import choice_maps, curve, dots, load_dots
from espalier.launch.papers.shared.domains import (
    LOAD_BOUND,
    MEAN,
    everywhere,
    off,
    on,
    pairs,
    swept,
)
from espalier.launch.papers.shared.page import Prose
from espalier.launch.plots import panels
from espalier.launch.plots.panels import BLUE, GREEN, ORANGE, PURPLE, RED

_PROSE = Prose.of(__name__)

MARGIN = 0.02  # nats: what counts as no worse; the paper's top-1 is 0.008 behind top-2
SAME = 2.0  # per cent of BTX's loss: what counts as about as good
RESCUED = 0.5  # of the gap between BTX and BAM, that copies of the seed may close
ENOUGH = 1500  # updates of a mixture; fewer allow no conclusion against dense training
PLACES = {"caches": "models"}
_BOUND = f"no layer of a top-1 router may send more than {LOAD_BOUND} of the tokens to one expert"


def home(runs: Runs, where: str) -> list[Effect]:
    """Compares each specialist with the seed and the other specialists on its own domain."""
    special = runs.domains[1:]
    return [
        effect
        for domain in special
        for other in (SEED, *(specialist(x) for x in special if x != domain))
        for effect in runs.gain(where, on(domain), specialist(domain), other)
    ]


def elsewhere(runs: Runs, where: str) -> list[Effect]:
    """Compares the seed with each specialist on the other domains."""
    return [
        effect
        for domain in runs.domains[1:]
        for effect in runs.gain(where, off(domain), SEED, specialist(domain))
    ]


def same(runs: Runs, where: str) -> list[Effect]:
    """Compares chosen attentions with BTX, within a margin on either side."""
    return [
        effect
        for arm in ("moa_top2", "moa_top1")
        for effect in runs.gain(
            where, MEAN, matched(arm), "btx", relative=True, above=-SAME, below=SAME, digits=2
        )
    ]


def beside_the_middle(runs: Runs, where: str, *, arm: str, nearer_to_bam: bool) -> list[Effect]:
    """Measures on which side of the middle between BTX and BAM an arm's loss lies."""
    cases = ("btx", "bam", arm)
    losses = pd.concat([runs.scores(case, MEAN) for case in cases], axis=1, join="inner")
    if losses.empty:
        return []
    btx, bam, other = (losses.iloc[:, i] for i in range(3))
    gap, closed = (btx - bam).mean(), (btx - other).mean()
    middle = btx - RESCUED * (btx - bam)
    beyond = middle - other if nearer_to_bam else other - middle
    side = "below" if nearer_to_bam else "above"
    what = f"{MEAN}, by how much {runs.label(arm)} lies {side} the middle between BTX and BAM"
    note = f"of a gap of {gap:.3f} it closes {closed:.3f}"
    no_gap = "" if gap > 0 else "BAM is not ahead of BTX: there is no gap to close"
    return [
        Effect(
            where=where,
            what=what,
            by_seed={int(seed): float(value) for seed, value in beyond.items()},
            above=0.0,
            note=note,
            unmet=no_gap or runs.unmet(MEAN, *cases),
        )
    ]


def caches(measured: Mapping[str, Sequence[int]], where: str) -> list[Effect]:
    """Measures the bytes of caches in units of a dense model's, less the number that is claimed."""
    out = []
    for kind in ("shared_kv", "expert_kv"):
        ratios = [
            size / dense for size, dense in zip(measured[kind], measured["dense"], strict=True)
        ]
        counts = [n if kind == "expert_kv" else 1 for n in measured["experts"]]
        excess = {
            n: ratio - c for n, ratio, c in zip(measured["experts"], ratios, counts, strict=True)
        }
        what = (
            f"{CACHES[kind]}: bytes in caches of a dense model, less the number claimed, by experts"
        )
        note = ", ".join(f"{n}: {r:.4g}" for n, r in zip(measured["experts"], ratios, strict=True))
        exact = {"above": -1e-9, "below": 1e-9, "exact": True, "digits": 0}
        out.append(Effect(where=where, what=what, by_seed=excess, note=note, **exact))
    return out


def beside_dense(runs: Runs, where: str) -> list[Effect]:
    """Compares mixtures that were trained for long with the seed trained on all tokens."""
    out = []
    for arm in map(long, ("bam", "btx")):
        steps = min((row["step"] for row in runs.find(arm).values()), default=0)
        few = {"unmet": f"{steps:,} of {ENOUGH:,} updates"} if steps < ENOUGH else {}
        place = f"{where}, {steps:,} updates of the mixture"
        out += runs.gain(place, MEAN, arm, DENSE_LONG, seeds=LONG_SEEDS, **few)
    return out


_BTX, _SHARED, _BAM = "btx", matched("bam_shared_kv"), matched("bam")
CLAIMS = (
    _PROSE.claim("B1", everywhere(home), required=True),
    _PROSE.claim("B2", everywhere(elsewhere), required=True),
    _PROSE.claim(
        "B3", everywhere(pairs(("bam", "bam_shared_kv"), ("bam_shared_kv", _BTX))), required=True
    ),
    _PROSE.claim("B4", everywhere(pairs((_BAM, _SHARED), (_SHARED, _BTX)))),
    _PROSE.claim("B5", everywhere(pairs(*(("bam", other) for other in BTX))), required=True),
    _PROSE.claim("B6", everywhere(pairs((_BAM, "btx"), (_BAM, "btx6")))),
    _PROSE.claim(
        "B7",
        everywhere(
            pairs((_SHARED, matched("moa_top2")), (_SHARED, matched("moa_top1"))),
            pairs((matched("moa_top2"), matched("moa_top1")), above=-MARGIN),
        ),
        required=True,
    ),
    _PROSE.claim("B9", everywhere(same)),
    _PROSE.claim(
        "B11",
        everywhere(functools.partial(beside_the_middle, arm="btx6", nearer_to_bam=False)),
        required=True,
    ),
    _PROSE.claim("B12", {"caches": [caches]}, required=True),
    _PROSE.claim("B13", everywhere(pairs(("bam", "bam_averaged")))),
    _PROSE.claim("B14", everywhere(beside_dense)),
    _PROSE.claim(
        "B16",
        everywhere(functools.partial(beside_the_middle, arm="bam_averaged", nearer_to_bam=True)),
    ),
)


_CURVES = {
    "btx": {"color": ORANGE, "marker": "o"},
    "btx6": {"color": RED, "marker": "v"},
    "bam_shared_kv": {"color": GREEN, "marker": "^"},
    "bam": {"color": BLUE, "marker": "s"},
}
_MAPPED = (("btx", "mlp"), ("bam", "mlp"), ("bam", "attention"), (matched("moa_top1"), "attention"))


def figures(parts: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Returns file name -> (figure, caption)."""
    out: dict[str, tuple[Any, str]] = {}
    for name, runs in swept(parts).items():
        out |= {
            f"{name}_loss.png": (
                dots(runs, _colours(), MEAN),
                _PROSE("loss_figure", name=name),
            ),
            f"{name}_loads.png": (
                load_dots(runs, _colours()),
                _PROSE("loads_figure", name=name),
            ),
            f"{name}_choices.png": (
                choice_maps(runs, _MAPPED),
                _PROSE("choices_figure", name=name),
            ),
            f"{name}_curves.png": (
                _curves(runs),
                _PROSE("curves_figure", name=name),
            ),
        }
    out["cache.png"] = (
        _caches(parts.get("caches", {})),
        f"Bytes of keys and values of {CACHE_LENGTH} tokens against the number of attention experts",
    )
    return out


def _colours() -> dict[str, str]:
    """Returns arm -> colour of the mixtures, twins of equal compute after those of equal data."""
    colours = {
        **dict.fromkeys(BTX, ORANGE),
        **dict.fromkeys(BAM, BLUE),
        **dict.fromkeys(CONTROLS, PURPLE),
    }
    return colours | {matched(arm): GREEN for arm in (*BAM, *CHOSEN)}


def _curves(runs: Runs) -> Any:
    if not runs.has("btx", "bam") or not runs.steps("btx", "bam"):
        return None
    columns = len(runs.domains)
    figure, every = panels.panels(columns, (3.1 * columns, 3.6))
    for domain, axes in zip(runs.domains, every, strict=True):
        floor = runs.floor(on(domain)) or 0.0
        for arm, style in _CURVES.items():
            scale = _millions(runs, arm)
            curve(axes, runs, arm, on(domain), style, scale=scale, less=floor)
        axes.set_yscale("log")
        panels.plain_ticks(axes.yaxis)
        axes.set_title(domain.replace("_", " "), fontsize=10)
        axes.set(xlabel="tokens, millions")
    every[0].set_ylabel("loss over the entropy, nats per token" if runs.floors else "loss")
    panels.legend_below(figure, every[0], len(_CURVES))
    return figure


def _millions(runs: Runs, arm: str) -> float:
    """Returns the millions of tokens of an update."""
    rows = [row for row in runs.find(arm).values() if row["tokens"]]
    return float(np.mean([row["tokens"] / row["step"] for row in rows])) / 1e6 if rows else 1.0


def _caches(measured: Mapping[str, Sequence[int]]) -> Any:
    if not measured:
        return None
    figure, (axes,) = panels.panels(1, (6.5, 4.2))
    styles = {
        "expert_kv": (BLUE, "s", f"BAM, {CACHES['expert_kv']}"),
        "shared_kv": (GREEN, "^", f"BAM, {CACHES['shared_kv']}"),
        "dense": ("black", "", "dense, BTX"),
    }
    for kind, (colour, marker, label) in styles.items():
        kilobytes = np.array(measured[kind]) / 1024
        style = "--" if kind == "dense" else "-"
        axes.plot(
            measured["experts"], kilobytes, style, color=colour, marker=marker, lw=2, label=label
        )
    axes.set_xticks(measured["experts"])
    axes.set(ylim=(0, None), xlabel="attention experts", ylabel="cache, KiB")
    axes.legend(frameon=False)
    return figure


REPORT = domains.report(
    slug="bam",
    intro=_PROSE("intro") + "\n",
    title="BAM: the paper's claims on small models",
    source="[BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts, arXiv "
    "2408.08274](https://arxiv.org/abs/2408.08274)",
    text=[_PROSE("method")],
    parts=tuple(experiment.PARTS),
    runs=Runs,
    claims=CLAIMS,
    figures=figures,
    places=PLACES,
)
