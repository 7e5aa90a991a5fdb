"""Influence of documents (arXiv 2411.12580) in a small model, and what retraining without some of them does.

A model is trained on a small corpus of facts, procedures and real text: the `start`, then for RETRAINED updates the `model`. Its
documents are scored by each method. From the same start, models are trained again on halves of the corpus, and on the
corpus without the top documents of a method. The number of seeds after a colon; `pilot` for one seed that judges nothing:

  python -m launch.sweep --sweep launch/papers/influence/sweep.py:5 --out runs/influence/language --workers 2
"""

import ml_collections

from launch.papers.influence import corpus, scoring
from launch.papers.shared import sweeps

CPU = "t5x_configs/experiments/influence/cpu/"
STARTED, RETRAINED = 1800, 300  # updates
RATE = 1.5e-3  # of the updates after the start
PILOT_SEED = 90


def get_config(text: str = "5") -> ml_collections.ConfigDict:
    seeds = (PILOT_SEED,) if text == "pilot" else sweeps.seeds(text)
    own = ("launch.papers.influence.corpus", "--to={run}", "--seed={SEED}")
    score = (
        *("launch.papers.influence.scoring", "--checkpoint={model}", "--corpus={corpus}"),
        *("--to={run}", "--seed={SEED}"),
    )
    arms = {
        "corpus": sweeps.made(*own),
        "start": _trained("corpus", "documents", f"TRAIN_STEPS={STARTED}"),
        "model": _again("corpus", "documents"),
        "scores": sweeps.made(*score),
    }
    for half in corpus.half_names():
        arms[half] = _again("corpus", half)
    for what in scoring.REMOVED_FOR:
        for method in scoring.REMOVED_BY:
            name = scoring.without(method, what)
            arms[name] = _again("scores", name)
    retrained = [name for name in arms if name.startswith(("half_", "without_"))]
    measure = (
        *("launch.papers.influence.losses", "--to={run}", "--corpus={corpus}"),
        *("--scores={scores}", "--model={model}"),
    )
    arms["losses"] = sweeps.made(*measure, *(f"{name}={{{name}}}" for name in retrained))
    return sweeps.config(arms, seeds=seeds, gin_files=(f"{CPU}corpus.gin",))


def _trained(folder: str, name: str, *bindings: str, **settings: object) -> dict:
    """Returns an arm that is trained on a file of another arm's folder."""
    files = (
        f"FILES='{{{folder}}}/{name}.jsonl'",
        f"VALIDATION_FILES='{{corpus}}/{corpus.HELD_OUT}'",
    )
    return sweeps.arm(bindings=(*files, *bindings), **settings)


def _again(folder: str, name: str) -> dict:
    """Returns an arm that continues the start."""
    settings = (f"TRAIN_STEPS={RETRAINED}", f"LEARNING_RATE={RATE}", "INITIAL_SCOPE='phase'")
    return _trained(folder, name, *settings, parent="start")
