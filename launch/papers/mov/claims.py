"""The claims of MoV and MoLORA and how each is measured.

Arms of the same seed share the frozen model, the rows and their order, so that they are compared in pairs. The score is
the accuracy of ranked answer choices: per held-out composition the median over prompt templates, then the mean over
compositions. Of four choices, chance is 0.25. Margins are shares of right answers, written down before the runs.
"""

import functools
from collections.abc import Sequence

import numpy as np

from launch.papers.mov.arms import ACCURACY, FULL, IA3, LORA, MOLORA, MOV, Runs
from launch.papers.mov.evaluations import KINDS
from launch.papers.shared import results
from launch.papers.shared.claim import Claim, Effect, Measure, RequiredClaim

PART = "operations"
SEEDS = 4  # the least number for a verdict, of five: one frozen model may not have learned
MARGIN = 0.02  # what counts as no worse
SPECIALISED = 0.05  # of total variation: by how much tasks must differ in what routers choose
REACH = 0.05  # by how much a method may be worse than full tuning to be within reach
TOP_1, TOP_1_RENORMALISED, TOP_2, LAYER_INPUT, SENTENCE = (
    f"{MOV[0]}_{name}" for name in ("top1", "top1_renormalised", "top2", "layer_input", "sentence")
)

_better = functools.partial(results.compare, ACCURACY, seeds=SEEDS)


def saturating(runs: Runs, where: str) -> list[Effect]:
    """Compares the gain of the first vectors with the gain of the last ones."""
    first, middle, last = MOV
    scores = [runs.scores(arm, ACCURACY) for arm in (IA3, first, middle, last)]
    early, late = scores[1] - scores[0], scores[3] - scores[2]
    gaps = (early - late).dropna()
    if gaps.empty:
        return []
    one, other = (
        f"of {runs.label(a)} over {runs.label(b)}" for a, b in ((first, IA3), (last, middle))
    )
    by_seed = {int(seed): float(gap) for seed, gap in gaps.items()}
    note = f"{early[gaps.index].mean():.3f} and {late[gaps.index].mean():.3f}"
    return [_effect(where, f"accuracy, gain {one} less that {other}", by_seed, note)]


def by_task(runs: Runs, where: str, *, arm: str) -> list[Effect]:
    """Measures how much further apart routers keep two compositions than the halves of one's rows, by kind of site."""
    out = []
    for kind in KINDS:
        by_seed = runs.specialisation(arm, kind)
        if by_seed:
            layers, wordings = (
                ", ".join(f"{x:.3f}" for x in np.mean([*values.values()], axis=0))
                for values in (by_seed, runs.specialisation(arm, kind, "wordings"))
            )
            note = f"by layer, the encoder's first: {layers}; in place of halves, two wordings: {wordings}"
            what = f"distance of two compositions' experts less that of halves of rows, {runs.label(arm)}, {_plain(kind)}"
            means = {seed: float(values.mean()) for seed, values in by_seed.items()}
            out.append(_effect(where, what, means, note, above=SPECIALISED))
    return out


def _plain(kind: str) -> str:
    return kind.replace("_", "-")


def _effect(
    where: str, what: str, by_seed: dict[int, float], note: str, above: float = 0.0
) -> Effect:
    return Effect(where=where, what=what, by_seed=by_seed, above=above, note=note, seeds=SEEDS)


def _here(*measures: Measure) -> dict[str, Sequence[Measure]]:
    return {PART: measures}


CLAIMS = (
    RequiredClaim(
        "M1",
        "Several vectors are better than one",
        "MoV with 10, 30 and 60 vectors each has a higher accuracy on held-out compositions than (IA)3",
        _here(_better(*((arm, IA3) for arm in MOV))),
        paper="MoV-10, MoV-30 and MoV-60 59.93, 60.61 and 59.83 against 52.90 (3B)",
    ),
    RequiredClaim(
        "M2",
        "The gain grows with the number of vectors, then saturates",
        f"MoV-30 is at most {MARGIN} worse than MoV-10, and the gain of 10 vectors over one is larger than that of 60 over 30",
        _here(_better((MOV[1], MOV[0]), above=-MARGIN), saturating),
        paper="59.93, 60.61 and 59.83 with 10, 30 and 60 vectors (3B); not monotone at any size",
    ),
    RequiredClaim(
        "M3",
        "MoLORA is better than LoRA of its rank",
        "MoLORA-10 and MoLORA-15 have a higher accuracy than LoRA of rank 4",
        _here(_better(*((arm, LORA[0]) for arm in MOLORA))),
        paper="59.77 and 60.79 against 57.51 (3B)",
    ),
    RequiredClaim(
        "M4",
        "A soft mixture is no worse than the best expert alone",
        f"MoV-10 is at most {MARGIN} worse mixed softly than with top-1, whose weight is not renormalised, as in the paper's code",
        _here(_better((MOV[0], TOP_1), above=-MARGIN)),
        paper="59.93 against 54.92 (MoV-10, 3B)",
    ),
    RequiredClaim(
        "M5",
        "Light experts are within reach of full tuning",
        f"MoLORA-10 and MoLORA-15 are at most {REACH} worse than full tuning",
        _here(_better(*((arm, FULL) for arm in MOLORA), above=-REACH)),
        paper="59.77 and 60.79 against 60.06 (3B)",
    ),
    Claim(
        "M6",
        "and so are mixtures of vectors",
        f"MoV-30 and MoV-60 are at most {REACH} worse than full tuning",
        _here(_better(*((arm, FULL) for arm in MOV[1:]), above=-REACH)),
        paper="60.61 and 59.83 against 60.06 (3B), 62.22 and 64.08 against 65.03 (11B)",
    ),
    Claim(
        "M7",
        "A mixture of vectors is better than LoRA",
        "MoV-10 has a higher accuracy than LoRA of rank 4",
        _here(_better((MOV[0], LORA[0]))),
        paper="59.93 against 57.51 (3B)",
    ),
    Claim(
        "M8",
        "More experts of a token are better",
        "MoV-10 has a higher accuracy mixed softly than with top-2, and with top-2 than with top-1, not renormalised",
        _here(_better((MOV[0], TOP_2), (TOP_2, TOP_1))),
        paper="59.93, 57.45 and 54.92 (3B)",
    ),
    Claim(
        "M9",
        "Renormalising makes up for a part of that (a control, not a claim of the paper)",
        "top-1 has a higher accuracy with a weight of 1 than with the expert's probability",
        _here(_better((TOP_1_RENORMALISED, TOP_1))),
    ),
    Claim(
        "M10",
        "What a router reads matters little (a control, not a claim of the paper)",
        f"MoV-10 is at most {MARGIN} worse with routers that read the rescaled tensor, as the paper's code, than with those "
        "that read the layer's input, as its text",
        _here(_better((MOV[0], LAYER_INPUT), above=-MARGIN)),
    ),
    Claim(
        "M11",
        "Routers choose by task, also by tasks that they have not seen",
        "mean probabilities of experts of two held-out compositions in one wording lie further apart than those of the "
        f"halves of one composition's rows, by more than {SPECIALISED} of total variation, mean over layers, of MoV-10 and "
        "MoLORA-10 at each kind of site",
        _here(*(functools.partial(by_task, arm=arm) for arm in (MOV[0], MOLORA[0]))),
        paper="shown as a picture",
    ),
    Claim(
        "M12",
        "Routing by tokens is better than routing by sentences",
        "MoV-10 has a higher accuracy with a router that reads each token than with one that reads the mean embedding of the "
        "inputs (the paper's is of another frozen model)",
        _here(_better((MOV[0], SENTENCE))),
        paper="sentences 0.94 to 8.86 % worse",
    ),
)
