"""The board in words: a table of what runs began, were best and ended with, and what their signals say."""

from collections.abc import Sequence

from launch.papers.preference.board_series import Run
from trainers.preference.indicators import measures
from trainers.preference.indicators.alarm import StoppingRule

LEGEND = (
    "LLH is the mean log-likelihood per token of held-out chosen completions, entropy (bits) and mass are of the ten "
    "likeliest tokens where the policy writes, EAD is expectation-adjusted distinct n-grams, KL the mean log-ratio of "
    "policy and reference on what the policy wrote. An arrow goes from the first value to the last, @ names a step."
)
_NONE = "–"


def table(runs: Sequence[Run]) -> list[list[str]]:
    """Rows of cells, the header first; columns that no run has are left out."""
    columns = {
        "run": [run.name for run in runs],
        "steps": [f"{run.last:,}" for run in runs],
        "alarm": [_NONE if run.alarm is None else f"@ {run.alarm:,}" for run in runs],
        "best P_win": [_best(run, "p_win", 3) for run in runs],
        "last P_win": [_number(run.final("p_win"), 3) for run in runs],
        "best reward": [_best(run, "reward", 3) for run in runs],
        "last reward": [_number(run.final("reward"), 3) for run in runs],
        "LLH": [_change(run, "llh_chosen", 2) for run in runs],
        "gap": [_change(run, "llh_gap", 2) for run in runs],
        "highest entropy": [_best(run, "entropy", 2) for run in runs],
        "last entropy": [_number(run.final("entropy"), 2) for run in runs],
        "mass": [_change(run, "mass", 3) for run in runs],
        "EAD": [_change(run, "ead", 2) for run in runs],
        "KL": [_number(run.final("kl"), 1) for run in runs],
        "length": [_change(run, "length", 1) for run in runs],
        "accuracy": [_number(run.final(_accuracy(run)), 2) for run in runs],
    }
    kept = {
        name: cells
        for name, cells in columns.items()
        if name == "alarm" or any(c != _NONE for c in cells)
    }
    return [list(kept), *(list(row) for row in zip(*kept.values(), strict=True))]


def sentence(run: Run) -> str:
    """What the signals say of a run."""
    first, last = run.first("llh_chosen"), run.final("llh_chosen")
    assert first is not None and last is not None  # see board_series.read
    moved = f"likelihood of chosen completions {_moved(first, last)} nats per token"
    peak, entropy = run.highest("entropy"), run.final("entropy")
    if peak is None or entropy is None:
        return f"{moved}; it has no indicators (t5x_configs/methods/preference/indicators.gin)."
    best = run.highest("p_win") or run.highest("reward")
    kind = "P_win" if run.highest("p_win") else "reward"
    judged = "" if best is None else f"; best {kind} {best[1]:.3f} at step {best[0]:,}"
    first_mass, mass = run.first("mass"), run.final("mass")
    assert first_mass is not None and mass is not None  # written with the entropy
    spread = (
        f"entropy was highest at step {peak[0]:,} ({peak[1]:.2f} bits) and is {entropy:.2f} at the end, mass went from "
        f"{first_mass:.3f} to {mass:.3f}"
    )
    if run.alarm is not None:
        verdict = f"signs of over-optimisation at step {run.alarm:,}, where the alarm was raised"
    elif entropy < (1 - StoppingRule.entropy_drop) * peak[1] and last < first:
        verdict = f"an early warning, for entropy falls since step {peak[0]:,}, and no alarm"
    else:
        verdict = "no sign of over-optimisation"
    return f"{verdict}: {moved}, {spread}{judged}."


def _moved(first: float, last: float) -> str:
    """From where to where, as far as two digits show it."""
    if f"{first:.2f}" == f"{last:.2f}":
        return f"stayed at {last:.2f}"
    return f"{'fell' if last < first else 'rose'} from {first:.2f} to {last:.2f}"


def length_link(runs: Sequence[Run]) -> str | None:
    """The correlation of likelihood with length of output over all evaluations; None for fewer than three."""
    points = [
        (run.series["llh_chosen"][step], length)
        for run in runs
        for step, length in run.series.get("length", {}).items()
        if step in run.series["llh_chosen"]
    ]
    if len(points) < 3:
        return None
    r = measures.pearson(*zip(*points, strict=True))
    if r != r:
        return None
    return f"length: r = {r:.2f} between likelihood and length of output, over {len(points)} evaluations."


def _accuracy(run: Run) -> str:
    return "accuracy_held_out" if "accuracy_held_out" in run.series else "accuracy"


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}".replace("-", "−")


def _change(run: Run, name: str, digits: int) -> str:
    first, last = run.first(name), run.final(name)
    return _NONE if first is None else f"{_number(first, digits)} → {_number(last, digits)}"


def _best(run: Run, name: str, digits: int) -> str:
    best = run.highest(name)
    return _NONE if best is None else f"{_number(best[1], digits)} @ {best[0]:,}"
