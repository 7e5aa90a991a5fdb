"""The claims of low-rank training on images, with what was measured for each.

Arms are those of launch/papers/low_rank/vision_sweep.py.
"""

from launch.papers.low_rank import vision_sweep as vision
from launch.papers.shared.claim import Claim, Evidence
from launch.papers.shared.low_rank_results import Results, arm_name
from launch.papers.shared.results import better
from launch.plots import intervals

WHERE = "textures"
CLOSE = 0.02  # of accuracy: what is left of the gap to dense


def claims(results: Results) -> list[Claim]:
    """All of them."""
    decays = [
        tuple(vision.arm(init, kind, rate) for kind in ("frobenius", "l2"))
        for init in vision.INITS
        for rate in vision.RATES
    ]
    return [
        Claim(
            "V1",
            "On images factors close the gap to the dense network",
            f"mean accuracy of spectral and spectral ones at most {CLOSE} below dense",
            [e for init in vision.INITS[1:] for e in _close(results, init)],
            required=True,
        ),
        Claim(
            "V2",
            "Decay of the product costs no accuracy beside decay of the factors",
            "L2 has not the better accuracy, for every start and learning rate",
            [
                e
                for pair in decays
                for e in better(results, WHERE, "accuracy", *pair, no_worse=True)
            ],
        ),
        Claim(
            "V3",
            "On images too decay of the product keeps the effective rank higher than decay of the factors",
            "a higher mean effective rank at the end, for every start and learning rate",
            [e for pair in decays for e in better(results, WHERE, "effective_rank", *pair)],
        ),
        Claim(
            "V4",
            "Half the learning rate does not hurt, although the effective step falls",
            "the full rate has not the better accuracy, and has the larger effective step",
            [
                evidence
                for init in vision.INITS
                for kind in vision.DECAYS
                for evidence in _halved(results, init, kind)
            ],
        ),
    ]


def _close(results: Results, init: str) -> list[Evidence]:
    ones, dense = results.paired("accuracy", vision.arm(init), "dense")
    if not len(ones):
        return []
    gap = intervals.over_seeds(ones - dense)
    words = (
        f"accuracy: {arm_name(init)} {intervals.text(intervals.over_seeds(ones), 3)}, dense "
        f"{intervals.text(intervals.over_seeds(dense), 3)}; difference {intervals.text(gap, 3)}"
    )
    return [Evidence(WHERE, words, gap["value"] >= -CLOSE)]


def _halved(results: Results, init: str, kind: str) -> list[Evidence]:
    half, full = (vision.arm(init, kind, rate) for rate in ("half", "full"))
    out = better(results, WHERE, "accuracy", half, full, no_worse=True)
    steps = results.paired("effective_step", half, full)
    if out and len(steps[0]):
        ratio = intervals.over_seeds(steps[0] / steps[1])
        words = f"effective step of {arm_name(half)} over full {intervals.text(ratio)}"
        out.append(Evidence(WHERE, words, ratio["value"] < 1))
    return out
