"""The claims of Aya 23 that small models can judge, and how each is measured.

Arms of the same seed have the same order of data where they read the same mixture, so that they are compared in pairs.
"""

from collections.abc import Mapping
from typing import Any

from launch.papers.aya23.arms import LOSS, PLAIN, TURNS, Runs
from launch.papers.aya23.measure import CACHED_KV
from launch.papers.aya23.sweep import BASE, COUNTS, WIDTHS, breadth, heads
from launch.papers.shared.claim import Effect, RequiredClaim
from launch.papers.shared.results import compare

SAME = 1.0  # per cent of the loss: what counts as no worse
CACHE = 2.0  # the same for fewer heads of keys and values
PLACES = {"toy": "made languages", "fertility": "real languages", "caches": "models"}
_FEWEST, *_, _MOST = COUNTS


def less_by_width(runs: Runs, where: str) -> list[Effect]:
    """Compares what many languages cost a narrow and a wide model."""
    cases = [breadth(count, width) for width in WIDTHS for count in (_MOST, _FEWEST)]
    narrow_most, narrow_fewest, wide_most, wide_fewest = (runs.scores(arm, LOSS) for arm in cases)
    costs = (narrow_most - narrow_fewest).dropna(), (wide_most - wide_fewest).dropna()
    gaps = (costs[0] - costs[1]).dropna()
    if gaps.empty:
        return []
    note = ", ".join(
        f"{width} {cost.mean():.3f}" for width, cost in zip(WIDTHS, costs, strict=True)
    )
    return [
        Effect(
            where=where,
            what=f"what {_MOST} languages cost over {_FEWEST}, narrow less wide model",
            by_seed={int(seed): float(gap) for seed, gap in gaps.items()},
            above=0.0,
            unit="nats",
            note=note,
            unmet=runs.unmet(LOSS, *cases),
        )
    ]


def format_matters(runs: Runs, where: str) -> list[Effect]:
    """Compares the answers of a tuned model with turns and without them."""
    gaps = (runs.scores("tuned_full", TURNS) - runs.scores("tuned_full", PLAIN)).dropna()
    if gaps.empty:
        return []
    means = [runs.scores("tuned_full", score).mean() for score in (TURNS, PLAIN)]
    return [
        Effect(
            where=where,
            what="share of right answers, with turns less without",
            by_seed={int(seed): float(gap) for seed, gap in gaps.items()},
            above=0.0,
            note=f"with {means[0]:.3f}, without {means[1]:.3f}",
            unmet="nothing is answered" if max(means) < 0.02 else "",
        )
    ]


def spread(measured: Mapping[str, Any], where: str) -> list[Effect]:
    """Compares the highest over the lowest parity under vocabularies of unequal and of equal shares."""
    by_seed = {
        int(seed): one["raw"]["spread"] - one["balanced"]["spread"]
        for seed, one in measured.items()
    }
    means = {
        name: sum(one[name]["spread"] for one in measured.values()) / len(measured)
        for name in ("raw", "balanced")
    }
    note = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    what = "highest over lowest parity to English, raw less balanced"
    return [Effect(where=where, what=what, by_seed=by_seed, above=0.0, note=note)]


def caches(measured: Mapping[str, int], where: str) -> list[Effect]:
    """Measures the bytes of caches in units of that of one head, less the number of heads."""
    excess = {count: measured[str(count)] / measured["1"] - count for count in CACHED_KV}
    what = "bytes of a cache in those of one head, less the heads of keys and values, by heads"
    exact = {"above": -1e-9, "below": 1e-9, "exact": True, "digits": 0}
    note = ", ".join(f"{count}: {measured[str(count)]:,}" for count in CACHED_KV)
    return [Effect(where=where, what=what, by_seed=excess, note=note, **exact)]


_BREADTH = [
    (breadth(fewer, width), breadth(more, width))
    for width in WIDTHS
    for fewer, more in zip(COUNTS, COUNTS[1:], strict=False)
]
CLAIMS = (
    RequiredClaim(
        "Y1",
        "More languages at equal compute cost each of them",
        "at both widths the mean loss on the four common languages is lower with 4 languages than with 8, and with 8 than "
        "with 16, at equally many tokens",
        {"toy": [compare(LOSS, *_BREADTH)]},
        paper="23 languages at 8 billion parameters beat 101 at 13 billion: 67.6 against 62.1 mean accuracy on unseen tasks",
    ),
    RequiredClaim(
        "Y2",
        "and a wider model less",
        f"the loss with {_MOST} languages less that with {_FEWEST} is larger for the narrow model",
        {"toy": [less_by_width]},
    ),
    RequiredClaim(
        "Y3",
        "A base that knows the languages is worth more than a larger mixture of instructions",
        "after as many updates, the base answers more instructions right, tuned on a quarter of the mixture and on all of it, than "
        "a new model that is tuned on all of it",
        {"toy": [compare(TURNS, ("tuned", "scratch"), ("tuned_full", "scratch"))]},
        paper="win rate of the 8 billion model over Aya 101, of 13 billion on an older base, 82.4",
    ),
    RequiredClaim(
        "Y4",
        "Parallel blocks are no worse than sequential ones",
        f"loss at most {SAME:g} % above that of sequential blocks, which have one norm more in each layer",
        {"toy": [compare(LOSS, (BASE, "sequential"), relative=True, above=-SAME)]},
    ),
    RequiredClaim(
        "Y5",
        "SwiGLU is no worse than GELU with as many parameters",
        f"loss at most {SAME:g} % above that of GELU with an FFN one and a half times as wide",
        {"toy": [compare(LOSS, (BASE, "gelu"), relative=True, above=-SAME)]},
    ),
    RequiredClaim(
        "Y6",
        "Fewer heads of keys and values make the cache smaller in proportion, at about the same quality",
        f"bytes are proportional to the heads; loss with two heads, and with one, at most {CACHE:g} % above that with four",
        {
            "caches": [caches],
            "toy": [
                compare(LOSS, (BASE, heads(4)), (heads(1), heads(4)), relative=True, above=-CACHE)
            ],
        },
    ),
    RequiredClaim(
        "Y7",
        "A vocabulary of equal shares of languages treats them more alike",
        "the highest over the lowest parity to English of 16 languages is smaller than with a vocabulary of shares as rank ** -1.5",
        {"fertility": [spread]},
        paper="none; the vocabulary is trained on a balanced subset",
    ),
    RequiredClaim(
        "Y8",
        "Without the format of turns the tuned model answers worse",
        "the share of right answers is higher with turns than without",
        {"toy": [format_matters]},
        paper="none; said of the released models",
    ),
)
