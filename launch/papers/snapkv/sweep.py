"""The retrieval models of SnapKV's small experiment, trained phase by phase.

A phase ends when the model answers its share of each kind of prompts exactly, or at its limit of updates; the next starts from
its parameters and moments. Three runs for each seed, together some minutes on one core; the number of seeds after a colon:

  python -m launch.sweep --sweep launch/papers/snapkv/sweep.py:5 --out runs/snapkv/retrieval --workers 2
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_collections

from launch.papers.shared import sweeps

GIN = "t5x_configs/experiments/snapkv/retrieval.gin"


class Phase(NamedTuple):
    """A phase of training.

    Attributes:
      shares: what is read, by share of tokens.
      length: tokens of a row, which hold the longest of these documents.
      kinds: the prompts that end it.
      limit: of updates.
      share: of prompts of each kind that are answered exactly, at which it ends.
    """

    shares: Mapping[str, float]
    length: int
    kinds: tuple[tuple[int, str], ...]
    limit: int
    share: float


# A document with the question first has four answer tokens at any length: it needs a large share. The last phase reads
# 12 lines too: both positions of the question are compared at 12 lines, and would be forgotten.
PHASES = {
    "lines_3": Phase({"retrieval_3": 1.0}, 128, ((3, "last"),), 3000, 0.95),
    "lines_12": Phase(
        {"retrieval_12": 0.4, "retrieval_first_6": 0.3, "retrieval_first_12": 0.3},
        256,
        ((12, "last"), (6, "first")),
        4000,
        0.8,
    ),
    "lines_48": Phase(
        {"retrieval_48": 0.4, "retrieval_12": 0.1, "retrieval_first_12": 0.5},
        512,
        ((48, "last"), (12, "last"), (12, "first")),
        4000,
        0.95,
    ),
}
LAST = list(PHASES)[-1]
# Models of the first two seeds did not learn with earlier settings, and so chose these.
_CHOSE = 2


def get_config(seeds: str = "5") -> ml_collections.ConfigDict:
    arms, parent = {}, None
    for name, phase in PHASES.items():
        arms[name] = _arm(phase, parent)
        parent = name
    return sweeps.config(arms, seeds=sweeps.seeds(seeds, after=_CHOSE))


def _arm(phase: Phase, parent: str | None) -> dict[str, Any]:
    # The rate of the last phase falls to 0 at its limit, where a model that has not ended it needs small steps.
    falls = (
        "SCHEDULE=@schedules.linear()",
        "schedules.linear.peak=%LEARNING_RATE",
        "schedules.linear.total_steps=None",
        "schedules.linear.warmup_steps=100",
    )
    bindings = (
        f"TRAIN_STEPS={phase.limit}",
        f"TASK_FEATURE_LENGTHS={{'targets': {phase.length}}}",
        f"stream.make_stream.phases=((0, {dict(phase.shares)!r}),)",
        f"until_answered.UntilAnswered.kinds={phase.kinds!r}",
        f"until_answered.UntilAnswered.share={phase.share}",
        *(("INITIAL_SCOPE='phase'",) if parent else ()),
        *(falls if phase is PHASES[LAST] else ()),
    )
    return sweeps.arm(GIN, bindings=bindings, parent=parent)
